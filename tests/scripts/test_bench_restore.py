"""``fewstep bench restore`` measures what a user's own lines would measure, and says what follows from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fewstep.metrics import DigitsClassifier, Estimate, frechet_distance
from fewstep.samplers import MRSamplerScheduler
from fewstep.scripts.bench.restore import MEASURES, METHODS, Bench, Point
from fewstep.scripts.bench.restore_report import claims, equal_or_better
from fewstep.scripts.generation.model import load_model
from fewstep.scripts.training.degradation import degrade
from model_folders import assert_refused, invoke

COUNT, SEED = 100, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rectangles of many sizes, twice as many as are measured."""
    images = np.zeros((2 * COUNT, 28, 28), np.uint8)
    draw = np.random.default_rng(0)
    for image in images:
        top, left = draw.integers(2, 12, 2)
        image[top : top + draw.integers(3, 14), left : left + draw.integers(3, 14)] = draw.integers(128, 256)
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    np.savez(path, x_test=images, y_test=np.arange(2 * COUNT) % 10)
    return path


def bench(data: Path, *words: object) -> Any:
    return invoke("bench", "restore", "--data", data, "--count", COUNT, "--seed", SEED, *words)


def structural_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004: a Gaussian window of 11 pixels, over images that are mirrored at their edges."""

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, radius=5, mode="mirror")

    means = blur(one), blur(other)
    variances = blur(one * one) - means[0] ** 2, blur(other * other) - means[1] ** 2
    covariance = blur(one * other) - means[0] * means[1]
    c1, c2 = 0.01**2, 0.03**2
    upper = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    return float((upper / ((means[0] ** 2 + means[1] ** 2 + c1) * (variances[0] + variances[1] + c2))).mean())


def test_figures(data: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    result = bench(
        data, "--methods", "mr-ode-2,posterior", "--calls", "3", "--batch-size", 70, "--json", file, "--plot", plot
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert plot.read_bytes().startswith(b"\x89PNG")
    points = {point["method"]: point for point in json.loads(file.read_text())["points"]}
    assert list(points) == ["degraded", "posterior", "mr-ode-2"]
    with np.load(data) as archive:
        clean = torch.from_numpy(np.pad(archive["x_test"][::2], ((0, 0), (2, 2), (2, 2))))[:, None] / 255.0
    degraded = (degrade(clean, range(SEED, SEED + COUNT)) * 255).round() / 255
    pipeline = load_model("digits-restore", "float32", "cpu").pipeline
    options = {"solver": "dpm++-heun", "solver_options": {"solver_order": 2}}
    pipeline.scheduler = MRSamplerScheduler.from_config(pipeline.scheduler.config, **options)
    generators = [torch.Generator().manual_seed(2**31 + SEED + k) for k in range(COUNT)]
    pictures = pipeline(degraded, 3, generators).images
    restored = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))[:, None] / 255.0
    classifier = DigitsClassifier.bundled()
    for name, images in (("degraded", degraded), ("mr-ode-2", restored)):
        with torch.no_grad():
            features = [classifier.features(each * 2 - 1).double() for each in (images, clean)]
        moments = [part for each in features for part in (each.mean(0), each.T.cov())]
        pairs = list(zip(images[:, 0].double().numpy(), clean[:, 0].double().numpy(), strict=True))
        expected = {
            "psnr": np.mean([-10 * math.log10(np.mean((one - other) ** 2)) for one, other in pairs]),
            "ssim": np.mean([structural_similarity(one, other) for one, other in pairs]),
            "feature": float((features[0] - features[1]).square().sum(1).sqrt().mean()),
            "frechet": frechet_distance(*moments),
        }
        for measure, value in expected.items():
            # A rounded pixel may differ in another batch.
            assert points[name]["figures"][measure]["value"] == pytest.approx(value, rel=2e-3), measure
    assert f"{points['mr-ode-2']['figures']['psnr']['value']:.2f} +- " in result.stdout
    assert "PSNR (dB): posterior at 3 calls " in result.stdout


def test_a_file_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(self: Bench, method: str, calls: int) -> Point:
        measured.append((method, calls))
        return Point(method, calls, {name: Estimate(1.0, (1.0,) * 20) for name in MEASURES})

    monkeypatch.setattr(Bench, "measure", measure)
    words = ("--methods", "euler,unipc", "--json", tmp_path / "f.json")
    first = bench(data, *words, "--calls", "1")
    assert first.exit_code == 0, (first.output, first.exception)
    second = bench(data, *words, "--calls", "2,1")
    assert measured == [("euler", 1), ("unipc", 1), ("euler", 2), ("unipc", 2)]
    assert len(second.stdout.splitlines()) == 6
    before = (tmp_path / "f.json").read_bytes()
    third = bench(data, *words, "--calls", "1,2")
    assert third.stdout == second.stdout
    assert len(measured) == 4
    assert_refused(bench(data, *words, "--seed", 4), "made with seed=3, not 4", "another file")
    assert (tmp_path / "f.json").read_bytes() == before


def point(method: str, calls: int, psnr: float, frechet: float, spread: float = 0.0) -> Point:
    values = {"psnr": psnr, "ssim": psnr / 50, "feature": frechet, "frechet": frechet}
    wave = [spread * (-1) ** g for g in range(20)]
    return Point(method, calls, {k: Estimate(v, tuple(v + w for w in wave)) for k, v in values.items()})


def test_claims_name_the_fewest_calls_without_loss() -> None:
    points = [
        point("euler", 50, 10.0, 9.0),
        point("euler", 100, 20.0, 3.0),
        point("mr-ode-2", 5, 20.0, 3.5),
        point("mr-sde-1", 10, 19.0, 2.5),
        point("unipc", 1, 30.0, 0.0),
    ]
    lines = claims(points)
    assert lines[0] == "PSNR (dB): euler at 100 calls 20.00 (100 do as well); mr-ode-2 at 5 20.00: 20 times fewer (20)"
    assert lines[3] == (
        "Frechet distance: euler at 100 calls 3.000 (100 do as well); mr-sde-1 at 10 2.500: 10 times fewer (10)"
    )
    assert len(lines) == 4
    lines = claims([*points[:3], point("posterior", 100, 40.0, 1.0), point("posterior", 20, 40.0, 1.0)])
    assert lines[4] == ("PSNR (dB): posterior at 100 calls 40.00 (20 do as well); the MR Sampler does not reach it")
    assert claims(points[:2]) == []


def test_a_loss_counts_where_it_exceeds_the_interval_of_the_difference() -> None:
    """The jackknife of a difference that goes up and down by 0.02: t(19) = 2.093 times sqrt(19 / 20 * 20 * 0.02^2)."""
    baseline = point("euler", 100, 20.0, 3.0)
    assert equal_or_better(point("mr-ode-1", 5, 19.82, 3.18, 0.02), baseline, "psnr")
    assert equal_or_better(point("mr-ode-1", 5, 19.82, 3.18, 0.02), baseline, "frechet")
    assert not equal_or_better(point("mr-ode-1", 5, 19.81, 3.19, 0.02), baseline, "psnr")
    assert not equal_or_better(point("mr-ode-1", 5, 19.81, 3.19, 0.02), baseline, "frechet")
    assert equal_or_better(point("mr-ode-1", 5, 25.0, 1.0), baseline, "frechet")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methods", "mr-ode-4"), ("methods 'mr-ode-4'", "(nearest first) mr-ode-", *METHODS)),
        (("--calls", "0,1"), ("--calls '0,1'", "whole numbers from 1")),
        (("--calls", "5,5"), ("--calls '5,5'", "each once")),
        (("--calls", "some"), ("--calls 'some'",)),
        (("--count", 99), ("--count", "99")),
        (("--count", 201), ("shapes.npz has 200 test images of 1 channels", "needed are 201")),
        (("--model", "digits-small"), ("--model digits-small restores no grey images",)),
        (("--json", "{folder}/none/f.json"), ("no folder",)),
        (("--json", "{folder}/other.json"), ("other.json holds no table of this benchmark",)),
        (("--plot", "{folder}/f.txt"), ("plot", "must end in")),
        (("--data", "{folder}/missing.npz"), ("neither an .npz file nor a folder",)),
    ],
)
def test_bad_words(data: Path, tmp_path: Path, words: tuple[Any, ...], said: tuple[str, ...]) -> None:
    (tmp_path / "other.json").write_text('{"settings": {}}')
    filled = [str(word).format(folder=tmp_path) for word in words]
    assert_refused(bench(data, *filled), *said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json"]
