"""Nearest neighbours by definition, one at a time, and published values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fewstep.metrics import average_knn_distance, local_outlier_factor, neighbours, rarity_score

METRICS = [average_knn_distance, local_outlier_factor, rarity_score]


def points(count: int, seed: int, size: int = 3) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(x: list[float], others: list[list[float]], count: int) -> list[tuple[float, int]]:
    return sorted((math.dist(x, other), number) for number, other in enumerate(others))[:count]


class BruteForce:
    """The metrics as their papers define them, in loops over lists."""

    def __init__(self, reference: torch.Tensor, count: int) -> None:
        self.real, self.count = reference.tolist(), count
        self.near = [self._without(i) for i in range(len(self.real))]
        self.radius = [near[-1][0] for near in self.near]
        self.density = [self._density(near) for near in self.near]

    def _without(self, own: int) -> list[tuple[float, int]]:
        found = [(d, number) for d, number in nearest(self.real[own], self.real, len(self.real)) if number != own]
        return found[: self.count]

    def _density(self, near: list[tuple[float, int]]) -> float:
        return self.count / sum(max(distance, self.radius[number]) for distance, number in near)

    def knn(self, near: list[tuple[float, int]]) -> float:
        return sum(distance for distance, _ in near) / self.count

    def lof(self, near: list[tuple[float, int]]) -> float:
        return sum(self.density[number] for _, number in near) / self.count / self._density(near)

    def rarity(self, x: list[float], without: int | None = None) -> float:
        balls = [
            r
            for k, (r, c) in enumerate(zip(self.radius, self.real, strict=True))
            if k != without and math.dist(x, c) <= r
        ]
        return min(balls, default=math.nan)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_metrics_are_their_definitions(count: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    real, others = points(40, 0), 1.3 * points(25, 1)
    truth = BruteForce(real, count)
    near = [nearest(x, truth.real, count) for x in others.tolist()]
    options: dict[str, Any] = {"neighbours": count}

    def same(found: torch.Tensor, expected: list[float]) -> None:
        torch.testing.assert_close(
            found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0, equal_nan=True
        )

    same(average_knn_distance(real, others, **options), [truth.knn(one) for one in near])
    same(average_knn_distance(real, **options), [truth.knn(one) for one in truth.near])
    same(local_outlier_factor(real, others, **options), [truth.lof(one) for one in near])
    same(local_outlier_factor(real, **options), [truth.lof(one) for one in truth.near])
    scores = rarity_score(real, others, **options)
    same(scores, [truth.rarity(x) for x in others.tolist()])
    same(rarity_score(real, **options), [truth.rarity(x, k) for k, x in enumerate(truth.real)])
    assert bool(scores.isnan().any())
    assert not bool(scores.isnan().all())


def test_the_example_of_scikit_learn() -> None:
    """Of the documentation of ``LocalOutlierFactor``: four points, two neighbours."""
    real = torch.tensor([[-1.1], [0.2], [101.1], [0.3]])
    found = local_outlier_factor(real, neighbours=2)
    expected = torch.tensor([0.9821, 1.0370, 73.3697, 0.9821], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_a_lattice_is_known_by_hand() -> None:
    """Whole numbers: two neighbours at distance 1, so every inner ball has radius 1."""
    real = torch.arange(20.0)[:, None]
    inside = torch.tensor([[7.5], [10.25]])
    torch.testing.assert_close(average_knn_distance(real, inside, neighbours=2), torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close(rarity_score(real, inside, neighbours=2), torch.ones(2).double())
    # The end points' balls reach as far as their second neighbour, 2 away; beyond them there is none.
    outside = rarity_score(real, torch.tensor([[-1.5], [-2.0], [-2.5]]), neighbours=2)
    torch.testing.assert_close(outside, torch.tensor([2.0, 2.0, math.nan]).double(), equal_nan=True)


def test_rarer_samples_score_higher_by_every_metric() -> None:
    """Of a broad Gaussian's samples, those far from the middle."""
    real = points(2000, 0, 2)
    rare, common = (torch.tensor([[r, 0.0], [0.0, -r], [-r, 0.0]]).double() for r in (2.5, 0.3))
    for metric in METRICS:
        assert metric(real, rare).nanmean() > metric(real, common).nanmean()  # type: ignore[operator]


def test_duplicates_and_large_offsets_lose_no_digits() -> None:
    real = torch.cat([points(30, 0), points(30, 0)])
    assert float(average_knn_distance(real, neighbours=1).max()) == 0.0
    assert bool(torch.isfinite(local_outlier_factor(real, neighbours=1)).all())
    near, far = points(30, 0), points(30, 0) + 1e6
    torch.testing.assert_close(average_knn_distance(far), average_knn_distance(near), rtol=1e-7, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((points(6, 0), points(2, 0, 4)), r"samples has shape \(2, 4\)"),
        ((points(5, 0)[0], None), r"reference has shape \(3,\)"),
        ((points(5, 0) / 0.0, None), "reference has values that are not finite"),
        ((points(6, 0), points(5, 0) * math.nan), "samples has values that are not finite"),
        ((points(4, 0), points(2, 0)), r"neighbours 5 must lie in 1 to [34]"),
        ((points(5, 0), None), "neighbours 5 must lie in 1 to 4"),
    ],
)
def test_refusals(metric: Any, arguments: tuple[Any, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        metric(*arguments, neighbours=5)
