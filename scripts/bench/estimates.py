"""Figures of images that a benchmark made, with intervals from the jackknife of groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewstep.metrics import Estimate, FeatureStatistics, ReferenceStatistics, frechet_distance, jackknife


def frechet_estimate(features: torch.Tensor, reference: ReferenceStatistics) -> Estimate:
    """The Frechet distance of features ``(count, D)`` to a reference of the same extractor."""

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
