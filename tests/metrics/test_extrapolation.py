from __future__ import annotations

import pytest
import torch

from fewstep.metrics import FeatureStatistics, FrechetDistance, frechet_distance_infinity, jackknife

SIZE = 6


def points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def to_standard_normal() -> FrechetDistance:
    return FrechetDistance(torch.zeros(SIZE), torch.eye(SIZE))


def distance(features: torch.Tensor) -> float:
    statistics = FeatureStatistics(SIZE)
    statistics.update(features)
    return to_standard_normal()(*statistics.compute())


def test_bias_of_few_images_is_gone() -> None:
    """The truth is known: |shift|^2, and 0 for the very distribution."""
    for shift in (0.0, 0.5):
        truth = SIZE * shift**2
        sets = [shift + points(500, seed) for seed in range(40)]
        plain = torch.tensor([distance(x) for x in sets])
        extrapolated = torch.tensor([frechet_distance_infinity(x, to_standard_normal()) for x in sets])
        error = float(extrapolated.std()) / 40**0.5
        assert float(extrapolated.mean()) == pytest.approx(truth, abs=4.0 * error)
        # The bias: mean D / N, covariance about D (D + 1) / 4 N.
        bias = (SIZE + SIZE * (SIZE + 1) / 4) / 500
        assert float(plain.mean()) - truth == pytest.approx(bias, abs=0.2 * bias + 4.0 * float(plain.std()) / 40**0.5)


def test_draws_nothing_from_the_global_generator_and_repeats_itself() -> None:
    state = torch.random.get_rng_state()
    x = points(200, 0)
    first = frechet_distance_infinity(x, to_standard_normal())
    assert first == frechet_distance_infinity(x, to_standard_normal())
    assert first == frechet_distance_infinity(x, to_standard_normal(), torch.arange(200))
    assert torch.equal(state, torch.random.get_rng_state())


def test_interval_is_not_that_of_the_draws() -> None:
    """As wide as the spread over sets, within the jackknife's own error."""
    sets = [points(400, seed) + 0.5 for seed in range(20)]
    spread = float(torch.tensor([frechet_distance_infinity(x, to_standard_normal()) for x in sets]).std())
    found = jackknife(lambda kept: frechet_distance_infinity(sets[0], to_standard_normal(), kept), 400, 20)
    low, high = found.interval(0.95)
    assert 0.5 * 2.09 * spread < (high - low) / 2 < 2.0 * 2.09 * spread


def test_refusals() -> None:
    with pytest.raises(ValueError, match="25 images of 6 numbers each are too few to extrapolate; give at least 30"):
        frechet_distance_infinity(points(25, 0), to_standard_normal())
    with pytest.raises(ValueError, match=r"give \(N, D\)"):
        frechet_distance_infinity(torch.zeros(6), to_standard_normal())
