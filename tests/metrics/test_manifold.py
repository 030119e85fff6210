"""Balls around points by definition, one at a time, and sets whose figures are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep.metrics import density_coverage, jackknife_groups, neighbours, precision_recall
from fewstep.metrics.manifold import density_coverage_estimates, precision_recall_estimates


def points(count: int, seed: int, size: int = 3) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def balls(x: list[list[float]], count: int) -> list[float]:
    return [sorted(math.dist(a, b) for j, b in enumerate(x) if j != i)[count - 1] for i, a in enumerate(x)]


def by_definition(real: torch.Tensor, fake: torch.Tensor, count: int) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage."""
    r, f = real.tolist(), fake.tolist()
    reach_r, reach_f = balls(r, count), balls(f, count)
    precision = sum(any(math.dist(x, c) <= d for c, d in zip(r, reach_r, strict=True)) for x in f) / len(f)
    recall = sum(any(math.dist(x, c) <= d for c, d in zip(f, reach_f, strict=True)) for x in r) / len(r)
    density = sum(math.dist(x, c) <= d for c, d in zip(r, reach_r, strict=True) for x in f) / (count * len(f))
    coverage = sum(any(math.dist(x, c) <= d for x in f) for c, d in zip(r, reach_r, strict=True)) / len(r)
    return precision, recall, density, coverage


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 23])
def test_figures_are_their_definitions(count: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    real, fake = 1e3 + points(40, 0), 1e3 + 1.0 + 0.8 * points(33, 1)
    expected = by_definition(real, fake, count)
    found = (*precision_recall(real, fake, neighbours=count), *density_coverage(real, fake, neighbours=count))
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(0.0 < value < 1.0 for value in expected[:2])


def test_a_set_against_itself_and_against_one_far_away() -> None:
    x = points(100, 2)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert density_coverage(x, x).coverage == 1.0
    assert precision_recall(x, x + 1e3) == (0.0, 0.0)
    assert density_coverage(x, x + 1e3) == (0.0, 0.0)


def test_equal_distributions_have_the_coverage_that_the_authors_derive() -> None:
    """Equation 9 of arXiv 2002.09797: 1 - (N - 1) ... (N - k) / ((2N - 1) ... (2N - k)); density is 1."""
    count, k = 200, 5
    expected = 1.0 - math.prod((count - i) / (2 * count - i) for i in range(1, k + 1))
    figures = torch.tensor([density_coverage(points(count, s), points(count, 500 + s)) for s in range(60)])
    density, coverage = figures.double().mean(0).tolist()
    error = (figures.double().std(0) / math.sqrt(60)).tolist()
    assert density == pytest.approx(1.0, abs=4 * error[0])
    assert coverage == pytest.approx(expected, abs=4 * error[1])


def test_fewer_modes_cost_recall_and_blur_costs_precision() -> None:
    modes = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]]).double()
    real = modes.repeat(60, 1) + points(240, 3, 2)
    two_modes = modes[:2].repeat(120, 1) + points(240, 4, 2)
    precision, recall = precision_recall(real, two_modes)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    blurred = modes.repeat(60, 1) + 3.0 * points(240, 5, 2)
    assert precision_recall(real, blurred).precision < 0.7
    # An outlier of the real images has a large ball, which precision takes in and density nearly not.
    outlier = torch.cat([real, torch.tensor([[200.0, 200.0]]).double()])
    far = torch.full((240, 2), 60.0).double() + points(240, 6, 2)
    assert precision_recall(outlier, far).precision == 1.0
    assert density_coverage(outlier, far).density < 0.25


@pytest.mark.parametrize("estimates", [precision_recall_estimates, density_coverage_estimates])
def test_leaving_groups_out_is_computing_anew(estimates: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Groups smaller than the neighbours asked for, and several chunks.
    monkeypatch.setattr(neighbours, "CHUNK", 1000)
    plain = {precision_recall_estimates: precision_recall, density_coverage_estimates: density_coverage}[estimates]
    real, fake = points(60, 7), 0.3 + 0.9 * points(47, 8)
    group = jackknife_groups(47, 20)
    found = estimates(real, fake, group, 20, neighbours=4)
    whole = plain(real, fake, neighbours=4)
    parts = [plain(real, fake[group != g], neighbours=4) for g in range(20)]
    for k, estimate in enumerate(found):
        assert estimate.value == pytest.approx(whole[k], rel=1e-12)
        assert estimate.left_out == pytest.approx([part[k] for part in parts], rel=1e-12)
        assert len(set(estimate.left_out)) > 1


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
@pytest.mark.parametrize(
    ("real", "fake", "said"),
    [
        (points(9, 0), points(9, 0, 4), r"samples has shape \(9, 4\)"),
        (points(9, 0)[0], points(9, 0), r"reference has shape \(3,\)"),
        (points(9, 0) * math.nan, points(9, 0), "reference has values that are not finite"),
        (points(5, 0), points(9, 0), "neighbours 5 must lie in 1 to 4, the other images of reference"),
        (points(9, 0), points(3, 0), "neighbours 5 must lie in 1 to 2, the other images of samples"),
    ],
)
def test_refusals(metric: Callable[..., Any], real: torch.Tensor, fake: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        metric(real, fake, neighbours=5)
