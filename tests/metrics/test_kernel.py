from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from fewstep.metrics import jackknife_groups, kernel, kernel_distance
from fewstep.metrics.kernel import kernel_distance_estimate


def points(count: int, seed: int, size: int = 6) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_by_pair(real: torch.Tensor, fake: torch.Tensor) -> float:
    """By definition, in loops."""

    def mean(a: torch.Tensor, b: torch.Tensor, same: bool) -> float:
        values = [
            (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1.0) ** 3
            for i, x in enumerate(a.tolist())
            for j, y in enumerate(b.tolist())
            if not (same and i == j)
        ]
        return math.fsum(values) / len(values)

    return mean(real, real, True) + mean(fake, fake, True) - 2.0 * mean(real, fake, False)


@pytest.mark.parametrize("chunk", [1, 70, 1 << 24])
def test_is_its_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_CHUNK", chunk)
    real, fake = points(21, 0), 0.3 + 1.2 * points(30, 1)
    assert kernel_distance(real, fake) == pytest.approx(pair_by_pair(real, fake), rel=1e-10)


def test_is_torchmetrics_of_one_subset_of_all() -> None:
    real, fake = points(200, 2, 16), 0.2 + points(200, 3, 16)
    metric = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=200)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert kernel_distance(real, fake) == pytest.approx(float(metric.compute()[0]), rel=1e-10)


def test_of_shifted_gaussians_in_closed_form() -> None:
    """One feature, N(0, 1) against N(m, 1): E (xy + 1)^3 is 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3."""
    m = 0.8
    moments = [(0.0, 1.0, 0.0), (m, 1.0 + m**2, 3.0 * m + m**3)]

    def expected(a: int, b: int) -> float:
        (a1, a2, a3), (b1, b2, b3) = moments[a], moments[b]
        return 1.0 + 3.0 * a1 * b1 + 3.0 * a2 * b2 + a3 * b3

    truth = expected(0, 0) + expected(1, 1) - 2.0 * expected(0, 1)
    # Without bias: the mean over small sets is right.
    found = torch.tensor([kernel_distance(points(40, k, 1), m + points(40, 1000 + k, 1)) for k in range(400)])
    assert float(found.mean()) == pytest.approx(truth, abs=4.0 * float(found.std()) / math.sqrt(400))


def test_leaving_groups_out_is_computing_anew() -> None:
    real, fake = points(25, 4), 0.5 * points(47, 5)
    group = jackknife_groups(47, 7)
    found = kernel_distance_estimate(real, fake, group, 7)
    assert found.value == pytest.approx(kernel_distance(real, fake), rel=1e-12)
    expected = [kernel_distance(real, fake[group != g]) for g in range(7)]
    assert found.left_out == pytest.approx(expected, rel=1e-10)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"samples has shape \(5, 4\)"):
        kernel_distance(points(5, 0), points(5, 0, 4))
    with pytest.raises(ValueError, match=r"reference has shape \(1, 6\); give \(count, D\), two images"):
        kernel_distance(points(1, 0), points(5, 0))
    with pytest.raises(ValueError, match="samples has values that are not finite"):
        kernel_distance(points(5, 0), points(5, 0) / 0.0)
