"""``fewstep bench stitch``: its figures are those of the models themselves, and a curve goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from fewstep.metrics import DigitsClassifier, Estimate, digits_statistics
from fewstep.samplers import SAMPLERS, StitchedDenoiser
from fewstep.scripts.bench.digits import measure
from fewstep.scripts.bench.output import environment
from fewstep.scripts.bench.stitch import (
    Point,
    Settings,
    plot_stitch,
    read_points,
    report,
    stitch_table,
)
from fewstep.scripts.commands.stitch import stitch
from fewstep.scripts.commands.words import parse_numbers
from fewstep.scripts.generation.model import load_model
from model_folders import assert_refused, invoke, pictures, save_class_model, save_unconditional_model

COUNT, STEPS, BATCH, SEED = 100, 3, 50, 4


def bench(*words: object) -> Result:
    return CliRunner().invoke(stitch, [str(word) for word in words])


def run(file: Path, fractions: str, **options: object) -> Result:
    chosen = {"count": COUNT, "steps": STEPS, "batch-size": BATCH, "seed": SEED, "sampler": "unipc", **options}
    return bench("--json", file, "--fractions", fractions, *(w for k, v in chosen.items() for w in (f"--{k}", v)))


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("curve") / "curve.json"
    result = run(file, "1,0,0.4")
    assert result.exit_code == 0, (result.output, result.exception)
    return file


def test_the_ends_of_the_curve_are_the_two_models(curve: Path) -> None:
    content = json.loads(curve.read_text())
    assert [point["fraction"] for point in content["points"]] == [0.0, 0.4, 1.0]
    assert [point["small_steps"] for point in content["points"]] == [0, 1, 3]
    classifier = DigitsClassifier.bundled()
    for name, point in (("digits-large", content["points"][0]), ("digits-small", content["points"][2])):
        pipeline = load_model(name, "float32", "cpu").pipeline
        pipeline.scheduler = SAMPLERS["unipc"].build(pipeline.scheduler.config)
        expected = measure(
            pipeline, classifier, digits_statistics("train", classifier),
            steps=STEPS, count=COUNT, scale=1.0, batch_size=BATCH, seed=SEED,
        )  # fmt: skip
        # A rounded pixel may differ where the weights lie elsewhere in memory.
        assert point["frechet"]["value"] == pytest.approx(expected["frechet_distance"], rel=1e-3)
        assert point["class_agreement"] == pytest.approx(expected["class_agreement"], abs=0.011)
    distances = [point["frechet"]["value"] for point in content["points"]]
    assert len(set(distances)) == 3


def test_a_curve_goes_on_where_it_stopped(curve: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, picture = tmp_path / "curve.json", tmp_path / "curve.png"
    content = json.loads(curve.read_text())
    content["points"] = content["points"][:2]
    file.write_text(json.dumps(content))
    measured: list[float] = []
    settings = Settings("digits-small", "digits-large", "unipc", STEPS, COUNT, 1.0, BATCH, SEED, "cpu")

    class Fake:
        def __init__(self, given: Settings) -> None:
            assert given == settings

        def warm_up(self) -> None:
            pass

        def measure(self, fraction: float) -> Point:
            measured.append(fraction)
            if fraction == 0.9:
                raise KeyboardInterrupt
            return Point(fraction, 2, Estimate(7.0, (7.0,) * 20), 1.0, 0.1)

    monkeypatch.setattr("fewstep.scripts.bench.stitch.Curve", Fake)
    interrupted = run(file, "0,0.4,0.7,0.9,1", device="cpu")
    assert interrupted.exit_code != 0
    assert measured == [0.7, 0.9]
    kept = json.loads(file.read_text())["points"]
    assert [point["fraction"] for point in kept] == [0.0, 0.4, 0.7]
    assert kept[:2] == content["points"]
    result = run(file, "0,0.7", device="cpu", plot=picture)
    assert result.exit_code == 0, (result.output, result.exception)
    assert measured == [0.7, 0.9]
    assert result.stdout == stitch_table(read_points(file, settings)) + "\n"
    with Image.open(picture) as image:
        assert image.size == (1440, 630)


def test_changes_are_between_the_same_groups() -> None:
    """Two curves that move together: the change is certain although neither distance is."""
    wobble = [math.sin(k) for k in range(20)]
    points = [
        Point(1.0, 10, Estimate(3.5, tuple(3.5 + w for w in wobble)), 0.9, 0.01),
        Point(0.0, 0, Estimate(3.0, tuple(3.0 + w for w in wobble)), 0.95, 0.04),
    ]
    header, alone, small = stitch_table(points).splitlines()
    assert header.split("  ")[0] == "fraction"
    assert alone.split()[:2] == ["0", "0"]
    assert f"3.500 +- {points[0].frechet.half_width():.3f}" in small
    assert "+0.500 +- 0.000" in small
    assert small.split()[-2:] == ["10.00", "4.00"]
    assert "+0.500" not in stitch_table(points[:1])


def test_the_plot_names_what_it_shows(tmp_path: Path) -> None:
    settings = Settings("digits-small", "/models/mine", "unipc", 12, 300, 2.0, 50, 0, "cpu")
    points = [Point(fraction, 0, Estimate(3.0, (3.0,) * 20), 0.9, 0.01) for fraction in (0.0, 0.5)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_stitch(settings, points, tmp_path / "curve.svg")
    picture = (tmp_path / "curve.svg").read_text()
    assert "digits-small then mine: unipc, 12 steps, 300 images, guidance 2" in picture
    for axis in ("share of the steps by the small model", "Frechet distance (95 %)", "milliseconds an image"):
        assert axis in picture


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fractions", "0,1.5"), "--fractions '0,1.5': give numbers from 0 to 1, each once"),
        (("--fractions", "0,half"), "--fractions '0,half'"),
        (("--fractions", "0,0.5,0.5"), "--fractions '0,0.5,0.5'"),
        (("--fractions", "nan"), "--fractions 'nan'"),
        (("--sampler", "unipcc"), "sampler 'unipcc'"),
        (("--small", "nowhere"), "'nowhere' is neither"),
        (("--json", "/nowhere/at/all.json"), "no folder /nowhere/at"),
        (("--plot", "curve.jpg"), "must end in one of .png"),
        (("--small", "{class}"), "is no DiTPipeline of digits"),
        (("--small", "{other}"), "'digits-large' have a different vae; give models of one latent space"),
        (("--small", "{shifted}"), "differ in beta_end (0.03, 0.02); give models of one noise schedule"),
        (("--json", "{text}"), "holds no curve of this benchmark; give another file"),
        (("--json", "{list}"), "holds no curve of this benchmark; give another file"),
    ],
)
def test_bad_words(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    (tmp_path / "text").write_text("no JSON")
    (tmp_path / "list").write_text("[1]")
    if "{class}" in words:
        save_class_model(tmp_path / "class")
    if "{other}" in words or "{shifted}" in words:
        pipeline: Any = load_model("digits-small", "float32", "cpu").pipeline
        if "{other}" in words:
            with torch.no_grad():
                next(pipeline.vae.parameters()).add_(1.0)
        else:
            pipeline.scheduler.register_to_config(beta_end=0.03)
        pipeline.save_pretrained(tmp_path / words[1].strip("{}"))
    result = bench("--count", 100, *(word.replace("{", f"{tmp_path}/").replace("}", "") for word in words))
    assert isinstance(result.exception, ValueError), (result.output, result.exception)
    assert said in str(result.exception)


def test_a_file_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    settings = Settings("digits-small", "digits-large", "unipc", STEPS, COUNT, 1.0, BATCH, SEED, "cpu")
    file.write_text(json.dumps(report(settings, [])))
    for option, value in (("steps", 4), ("guidance-scale", 2.0), ("seed", 0)):
        before = file.read_text()
        result = run(file, "0", device="cpu", **{option: value})
        assert isinstance(result.exception, ValueError)
        assert f"was made with {option.replace('-', '_')}=" in str(result.exception)
        assert file.read_text() == before
    content = {**report(settings, []), "environment": {**environment(), "processor": "abacus"}}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was made with processor='abacus'"):
        read_points(file, settings)
    assert read_points(tmp_path / "new.json", settings) == []


def test_fractions_are_read_in_order() -> None:
    assert parse_numbers("fractions", "1,0, 0.25", 0.0, 1.0) == [1.0, 0.0, 0.25]


# ------------------------------------------------------------------------------------------------ fewstep generate


def test_generate_stitches_and_its_record_makes_the_images_again(tmp_path: Path) -> None:
    words = ("--sampler", "unipc", "--steps", "5", "--classes", "3,8", "--guidance-scale", "1")
    result = invoke(
        "generate", "--model", "digits-large", "--stitch", "digits-small:0.4", *words, "--output", tmp_path / "a"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    small, large = (load_model(name, "float32", "cpu").pipeline for name in ("digits-small", "digits-large"))
    large.scheduler = SAMPLERS["unipc"].build(large.scheduler.config)
    large.transformer = StitchedDenoiser([small.transformer, large.transformer], [0.4, 0.6], by="step").follow(large)
    for seed, label in ((0, 3), (1, 8)):
        image = large([label], 1.0, torch.Generator().manual_seed(seed), num_inference_steps=5).images[0]
        with Image.open(tmp_path / "a" / f"{seed:05d}.png") as written:
            difference = np.asarray(written, int) - np.asarray(image, int)
        assert np.abs(difference).max() <= 1  # of 255: rounding where the weights lie elsewhere in memory
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    assert record["run"]["stitch"] == "digits-small:0.4"
    assert invoke("generate", "--record", tmp_path / "a" / "record.json", "--output", tmp_path / "b").exit_code == 0
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    assert invoke("generate", "--model", "digits-large", *words, "--output", tmp_path / "c").exit_code == 0
    assert pictures(tmp_path / "a") != pictures(tmp_path / "c")
    # A pipeline saved with its stitched denoiser is a model like any other.
    large.save_pretrained(tmp_path / "model")
    assert invoke("generate", "--model", tmp_path / "model", *words, "--output", tmp_path / "d").exit_code == 0
    assert pictures(tmp_path / "d") == pictures(tmp_path / "a")


@pytest.mark.parametrize(
    ("stitch", "said"),
    [
        ("digits-small", "stitch 'digits-small' is not MODEL:SHARE with a share from 0 to 1"),
        ("digits-small:2", "stitch 'digits-small:2' is not MODEL:SHARE"),
        ("nowhere:0.4", "model 'nowhere' is neither"),
        ("{class}:0.4", "have a different vae; give models of one latent space"),
        ("{plain}:0.4", "are of different kinds (DDPMPipeline and DiTPipeline)"),
    ],
)
def test_generate_refuses_what_cannot_be_stitched(tmp_path: Path, stitch: str, said: str) -> None:
    save_class_model(tmp_path / "class")
    save_unconditional_model(tmp_path / "plain")
    words = stitch.replace("{", f"{tmp_path}/").replace("}", "")
    assert_refused(invoke("generate", "--stitch", words, "--output", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_the_command_line_offers_the_benchmark() -> None:
    assert "stitch" in invoke("bench", "--help").stdout
    assert_refused(invoke("bench", "stitch", "--fractions", "2"), "--fractions '2': give numbers from 0 to 1")
