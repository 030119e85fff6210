"""``fewstep bench minority``: its figures against the metrics themselves, and that a run goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.metrics import DigitsClassifier, Estimate, average_knn_distance, class_agreement, rarity_score
from fewstep.samplers import SAMPLERS
from fewstep.scripts.bench.digits import generate, real_digits
from fewstep.scripts.bench.minority import (
    MEASURES,
    Bench,
    Point,
    agrees,
    minority_table,
    read_points,
    real_features,
    rises,
)
from fewstep.scripts.commands.words import parse_numbers
from fewstep.scripts.generation.model import load_model
from model_folders import assert_refused, invoke

COUNT = 100


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits that the large model made, in the place of real ones."""
    model = load_model("digits-large", "float32", "cpu")
    model.pipeline.scheduler = SAMPLERS["dpm++"].build(model.scheduler_config)
    images = generate(model.pipeline, range(120), steps=4, scale=1.5, seed=90)
    pixels = images[:, 0].mul(255.0).round().byte().numpy()
    labels = np.arange(120) % 10
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:60], y_test=labels[:60])
    return path


def command(archive: Path, *words: object) -> list[object]:
    return ["bench", "minority", "--data", archive, "--steps", 3, "--count", COUNT, *words]


def test_figures_are_those_of_the_pipeline_and_a_run_goes_on(archive: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "m.json", tmp_path / "m.png"
    words = command(archive, "--guidance-scale", 2, "--self-scales", "", "--json", file)
    result = invoke(*words, "--scales", 2)
    assert result.exit_code == 0, (result.output, result.exception)
    real, base, guided = json.loads(file.read_text())["points"]
    assert [one["method"] for one in (real, base, guided)] == ["real", "minority", "minority"]
    assert [one["scale"] for one in (base, guided)] == [0.0, 2.0]

    classifier = DigitsClassifier.bundled()
    reference = real_features(real_digits(archive, "test"), 60)[0]
    pipeline = load_model("digits-small", "float32", "cpu").pipeline
    pipeline.scheduler = SAMPLERS["dpm++"].build(pipeline.scheduler.config)
    images = generate(pipeline, range(COUNT), steps=3, scale=2.0, seed=50_000)
    with torch.no_grad():
        features = classifier.features(images.mul(255.0).round().div(127.5).sub(1.0))
    found = {name: base["figures"][name]["value"] for name in MEASURES}
    assert found["knn"] == pytest.approx(float(average_knn_distance(reference, features).mean()), rel=1e-3)
    scores = rarity_score(reference, features)
    assert found["outside"] == pytest.approx(float(scores.isnan().double().mean()), abs=0.011)
    agreement = class_agreement(classifier.classify(features), torch.arange(COUNT) % 10)
    assert found["agreement"] == pytest.approx(agreement.rate, abs=0.011)
    assert guided["figures"]["knn"]["value"] > found["knn"]

    content = json.loads(file.read_text())
    content["points"][1]["figures"]["knn"]["value"] = 77.0
    file.write_text(json.dumps(content))
    again = invoke(*words, "--scales", "2,4", "--plot", picture)
    assert again.exit_code == 0, (again.output, again.exception)
    points = json.loads(file.read_text())["points"]
    assert [one["scale"] for one in points] == [0.0, 0.0, 2.0, 4.0]
    assert points[1]["figures"]["knn"]["value"] == 77.0
    assert len(again.stdout.splitlines()) == 5
    with Image.open(picture) as image:
        assert image.size == (1950, 525)
    assert_refused(invoke(*words, "--steps", 4), "other steps")


def test_self_guidance_is_of_the_same_noises(archive: Path) -> None:
    """A scale of next to nothing changes next to nothing, and a scale of 2 a lot."""
    reference = torch.rand(60, 64, generator=torch.Generator().manual_seed(0))
    bench = Bench("digits-small", "dpm++", 3, 60, [9], reference)
    plain, same, other = (bench.features("self-minority", 1.0, scale) for scale in (0.0, 1e-6, 2.0))
    # Rounding to 8 bits may tip a pixel over.
    assert float((same - plain).norm(dim=1).median()) < 0.05
    assert float((other - plain).norm(dim=1).median()) > 1.0


def figure(value: float, spread: float = 0.0) -> Estimate:
    return Estimate(value, tuple(value + spread * math.sin(k) for k in range(20)))


def point(scale: float, agreement: Estimate, **changed: Estimate) -> Point:
    figures = dict.fromkeys(("knn", "lof", "rarity", "outside"), figure(1.0 + 0.1 * scale))
    return Point("minority", 2.0, scale, {**figures, "agreement": agreement, **changed})


def test_what_counts_as_rarer_and_as_agreeing() -> None:
    base, rarer = point(0.0, figure(0.99)), point(1.0, figure(0.985))
    assert rises(rarer, base)
    assert not rises(replace(rarer, figures={**rarer.figures, "lof": figure(1.01, spread=0.1)}), base)
    assert not rises(point(1.0, figure(0.985), rarity=figure(0.9)), base)
    assert agrees(rarer, base)
    assert not agrees(point(1.0, figure(0.97)), base)
    # A loss of two points that may be none.
    uncertain = figure(0.97, spread=0.01)
    assert uncertain.half_width() > 0.02
    assert agrees(point(1.0, uncertain), base)
    lines = minority_table([rarer, point(4.0, figure(0.9)), base]).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["none", "2", "0"], ["minority", "2", "1"], ["minority", "2", "4"],
    ]  # fmt: skip
    assert [line.split("  ")[-1].strip() for line in lines[2:]] == ["rarer, agrees", "rarer, agrees less"]


def test_files_of_other_content_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    assert read_points(file, {}) == []
    file.write_text('{"settings": {}, "points": [{}]}')
    with pytest.raises(ValueError, match="no points of this benchmark"):
        read_points(file, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "digits-restore"), "digits-large"),
        (("--sampler", "best"), "sampler"),
        (("--scales", ""), "--scales ''"),
        (("--scales", "1,1"), "each once"),
        (("--self-scales", "-1"), "from 0 to 1000"),
        (("--guidance-scale", "0.5"), "from 1 to 100"),
        (("--target", "1.5"), "whole numbers from 0 to 9"),
    ],
)
def test_refusals(archive: Path, words: Any, message: str) -> None:
    assert_refused(invoke(*command(archive, *words)), message)


def test_numbers() -> None:
    assert parse_numbers("self-scales", "", 0.0, 1.0, empty=True) == []
    assert parse_numbers("scales", "0.5,1", 0.0, 1.0) == [0.5, 1.0]
