"""Figures over images, with intervals that hold for differences too: the jackknife of groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fewstep.metrics import FeatureStatistics, ReferenceStatistics, frechet_distance

GROUPS = 20
_NORMAL = 1.96


@dataclass(frozen=True)
class Estimate:
    """A figure.

    Attributes:
        value: over all images.
        left_out: without each of the groups of images in turn, for intervals.
    """

    value: float
    left_out: tuple[float, ...]


def estimate(statistic: Callable[[torch.Tensor], float], count: int) -> Estimate:
    """A statistic of all images, and of all but each of 20 groups of neighbours in turn.

    Args:
        statistic: takes a mask of the images, ``(count,)``.
        count: number of images.
    """
    group = torch.arange(count) * GROUPS // count
    return Estimate(statistic(group >= 0), tuple(statistic(group != g) for g in range(GROUPS)))


def frechet_estimate(features: torch.Tensor, reference: ReferenceStatistics) -> Estimate:
    """The Frechet distance of features ``(count, D)`` to a reference of the same extractor."""

    def distance(chosen: torch.Tensor) -> float:
        gathered = FeatureStatistics(features.shape[1])
        gathered.update(features[chosen])
        return frechet_distance(*gathered.compute(), reference.mean, reference.covariance)

    return estimate(distance, len(features))


def change(new: Estimate, old: Estimate) -> Estimate:
    """The difference of two figures of the same noises; what they share cancels."""
    return Estimate(new.value - old.value, tuple(a - b for a, b in zip(new.left_out, old.left_out, strict=True)))


def half_width(left_out: Sequence[float]) -> float:
    """Half of the 95 % interval of a statistic, by the jackknife of groups (Efron and Stein, 1981).

    Args:
        left_out: the statistic without each group; the difference of two, for the interval of a difference.
    """
    mean = math.fsum(left_out) / len(left_out)
    squares = math.fsum((value - mean) ** 2 for value in left_out)
    return _NORMAL * math.sqrt(squares * (len(left_out) - 1) / len(left_out))
