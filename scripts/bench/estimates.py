"""Figures with intervals: of images, by the jackknife of groups, and of independent numbers, by their spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student

from fewstep.metrics import Estimate, FeatureStatistics, ReferenceStatistics, frechet_distance, jackknife


def frechet_estimate(features: torch.Tensor, reference: ReferenceStatistics) -> Estimate:
    """The Frechet distance of features ``(count, D)`` to a reference of the same extractor.

    The interval takes the images' classes for drawn. Of classes in turn it is too wide: no effect is claimed that is
    none, and small ones may be missed.
    """

    def distance(kept: torch.Tensor) -> float:
        gathered = FeatureStatistics(features.shape[1])
        gathered.update(features[kept])
        return frechet_distance(*gathered.compute(), reference.mean, reference.covariance)

    return jackknife(distance, len(features))


def to_json(estimate: Estimate) -> dict[str, Any]:
    """A figure for a file."""
    return {"value": estimate.value, "left_out": list(estimate.left_out)}


def from_json(entry: Mapping[str, Any]) -> Estimate:
    """What `to_json` wrote."""
    return Estimate(float(entry["value"]), tuple(map(float, entry["left_out"])))


class Mean(NamedTuple):
    """A mean of independent numbers.

    Attributes:
        value: the mean.
        half_width: of its 95 % interval by Student's t; infinite for a single number.
    """

    value: float
    half_width: float

    def show(self, digits: int, *, sign: bool = False) -> str:
        """As text, such as ``1.2 +- 0.3``."""
        number = f"{self.value:+.{digits}f}" if sign else f"{self.value:.{digits}f}"
        return number if math.isinf(self.half_width) else f"{number} +- {self.half_width:.{digits}f}"


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of independent numbers, with its interval."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean, float(student.ppf(0.975, count - 1)) * math.sqrt(variance / count))
