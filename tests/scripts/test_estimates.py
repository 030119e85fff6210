"""Intervals of benchmarks against textbook formulas."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.metrics import DigitsClassifier, digits_statistics, frechet_distance
from fewstep.scripts.bench.estimates import change, estimate, frechet_estimate, half_width


@pytest.mark.parametrize("groups", [1, 3])
def test_the_interval_of_a_mean_is_the_textbook_one(groups: int) -> None:
    """Without group g, a mean is (sum - sum of g) / (n - n / G): its jackknife is the standard error of group means."""
    values = torch.randn(20 * groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.arange(len(values)) // groups
    left_out = [float(values[group != g].mean()) for g in range(20)]
    expected = 1.96 * float(values.view(20, groups).mean(1).std()) / math.sqrt(20)
    assert half_width(left_out) == pytest.approx(expected, rel=1e-9)


def test_distances_without_a_group_are_those_of_the_other_images() -> None:
    reference = digits_statistics("train", DigitsClassifier.bundled())
    features = torch.randn(130, 64, generator=torch.Generator().manual_seed(0)).abs()
    found = frechet_estimate(features, reference)

    def expected(chosen: torch.Tensor) -> float:
        wide = chosen.double()
        return frechet_distance(wide.mean(0), wide.T.cov(), reference.mean, reference.covariance)

    assert found.value == pytest.approx(expected(features), rel=1e-9)
    assert len(found.left_out) == 20
    # 130 images in 20 groups: 7 and 6 in turn.
    assert found.left_out[0] == pytest.approx(expected(features[7:]), rel=1e-9)
    assert found.left_out[1] == pytest.approx(expected(torch.cat([features[:7], features[13:]])), rel=1e-9)
    assert found.left_out[19] == pytest.approx(expected(features[:124]), rel=1e-9)


def test_a_change_is_between_pairs() -> None:
    """A change that is the same for every image has no spread, however the images differ."""
    values = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old, new = (estimate(lambda chosen, v=v: float(v[chosen].mean()), 60) for v in (values, values + 0.25))
    found = change(new, old)
    assert found.value == pytest.approx(0.25)
    assert half_width(found.left_out) == pytest.approx(0.0, abs=1e-12)
    assert half_width(old.left_out) > 0.1
