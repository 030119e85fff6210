"""Figures of benchmarks: distances without a group, and their way through files."""

from __future__ import annotations

import json

import pytest
import torch

from fewstep.metrics import DigitsClassifier, digits_statistics, frechet_distance, jackknife_groups
from fewstep.scripts.bench.estimates import frechet_estimate, from_json, to_json


def test_distances_without_a_group_are_those_of_the_other_images() -> None:
    reference = digits_statistics("train", DigitsClassifier.bundled())
    features = torch.randn(130, 64, generator=torch.Generator().manual_seed(0)).abs()
    found = frechet_estimate(features, reference)

    def expected(chosen: torch.Tensor) -> float:
        wide = chosen.double()
        return frechet_distance(wide.mean(0), wide.T.cov(), reference.mean, reference.covariance)

    assert found.value == pytest.approx(expected(features), rel=1e-9)
    group = jackknife_groups(130)
    assert list(found.left_out) == pytest.approx([expected(features[group != g]) for g in range(20)], rel=1e-9)
    assert from_json(json.loads(json.dumps(to_json(found)))) == found
