"""``fewstep bench steer`` gives every method the calls that it reports, and says what follows from the images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fewstep.guidance import FeynmanKacSteering, Reward, RewardTilt, class_log_probability
from fewstep.metrics import DigitsClassifier, frechet_distance
from fewstep.samplers import SAMPLERS, Denoiser
from fewstep.scripts.bench.steer import Bench, Point, Settings
from fewstep.scripts.bench.steer_methods import METHODS, systematic
from fewstep.scripts.bench.steer_reference import MEASURES, PixelModel
from fewstep.scripts.bench.steer_report import Results, claims, mean_of
from fewstep.scripts.generation.model import load_model
from model_folders import assert_refused, invoke

COUNT, STEPS = 20, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rectangles: of class k, all of nearly the same place and height."""
    draw = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 500), ("test", 300)):
        images = np.zeros((count, 28, 28), np.uint8)
        for k, image in enumerate(images):
            top, left = 2 * (k % 10) + draw.integers(0, 2), draw.integers(2, 12)
            image[top : top + 3 + k % 3, left : left + draw.integers(3, 14)] = draw.integers(128, 256)
        arrays |= {f"x_{split}": images, f"y_{split}": np.arange(count) % 10}
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    np.savez(path, **arrays)
    return path


def bench(data: Path, *words: object) -> Any:
    return invoke("bench", "steer", "--data", data, "--count", COUNT, "--steps", STEPS, "--device", "cpu", *words)


@pytest.fixture(scope="module")
def figures(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, dict[str, Any]], str]:
    """Points of all methods by name and budget; and what was printed."""
    folder = tmp_path_factory.mktemp("figures")
    words = ("--targets", "8", "--seeds", 1, "--budgets", "2,1", "--scale", 1.5)
    result = bench(data, *words, "--json", folder / "f.json", "--plot", folder / "f.png")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (folder / "f.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((folder / "f.json").read_text())["points"]
    return {(point["method"], point["runs"]): point for point in points}, result.stdout


def test_every_method_spends_the_same_calls(figures: tuple[dict[Any, dict[str, Any]], str]) -> None:
    points, printed = figures
    assert len(points) == 2 + 2 * len(METHODS)
    for (method, runs), point in points.items():
        assert point["calls"] == COUNT * STEPS * runs, method
        assert 1 <= point["figures"]["distinct"] <= COUNT
        assert {*point["figures"]} == {*MEASURES}
    assert len([line for line in printed.splitlines() if line.startswith("8 ")]) == len(points)


def test_a_budget_of_one_run_is_the_sampler_itself(figures: tuple[dict[Any, dict[str, Any]], str]) -> None:
    """Nothing to choose from: one particle, one candidate."""
    points = {key: point["figures"] for key, point in figures[0].items()}
    first = points["best-of-n", 1]
    for method in ("best-of-all", "fk", "svdd", "svdd-greedy"):
        # Another batch rounds otherwise, and a pixel may fall on the other side.
        assert points[method, 1] == pytest.approx(first, rel=1e-2), method
    assert points["gradient", 1]["reward"] > first["reward"] + 0.1
    assert points["best-of-n", 2]["reward"] > first["reward"]
    assert points["best-of-all", 2]["reward"] >= points["best-of-n", 2]["reward"]


def test_figures_are_those_of_a_users_own_lines(data: Path, figures: tuple[dict[Any, dict[str, Any]], str]) -> None:
    """One population of 40 particles, of which every other is an image."""
    points, _ = figures
    pipeline = load_model("digits-small", "float32", "cpu").pipeline
    classifier = DigitsClassifier.bundled()

    def decode(latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return images.clamp(-1.0, 1.0)

    scheduler = SAMPLERS["sde-dpm++"].build(pipeline.scheduler.config)
    reward = Reward(class_log_probability(classifier, 8), decode=decode)
    scheduler.guide(FeynmanKacSteering([RewardTilt(reward, 1.5)], particles=2 * COUNT, every=2, start=0.2, seeds=[0]))
    generators = [torch.Generator().manual_seed(k) for k in range(2 * COUNT)]
    denoiser = Denoiser.from_pipeline(
        pipeline, class_labels=[1000], guidance_scale=1.0, num_images_per_prompt=2 * COUNT
    )
    x, timesteps = denoiser.prepare(scheduler, STEPS, generator=generators)
    for t in timesteps:
        with torch.no_grad():
            x = scheduler.step(denoiser(x, t), t, x, generator=generators, return_dict=False)[0]
    kept = x[int(np.random.default_rng([0, 2]).integers(2)) :: 2]
    with torch.no_grad(), np.load(data) as archive:
        images = ((decode(kept) + 1) * 127.5).round() / 127.5 - 1
        own = archive["x_train"][archive["y_train"] == 8]
        real = torch.from_numpy(np.pad(own, ((0, 0), (2, 2), (2, 2))))[:, None] / 127.5 - 1
        answers = classifier(images).log_softmax(1)[:, 8].double()
        features = [classifier.features(each).double() for each in (images, real)]
    moments = [part for each in features for part in (each.mean(0), each.T.cov())]
    found = points["smc", 2]["figures"]
    assert found["frechet"] == pytest.approx(frechet_distance(*moments), rel=1e-2)
    assert found["reward"] == pytest.approx(float(answers.mean()), rel=1e-2)
    assert found["distinct"] == len({row.numpy().tobytes() for row in kept})


def test_the_second_classifier_knows_the_classes_and_its_features_are_principal_components() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 10
    images = 0.1 * torch.randn(400, 1, 32, 32, generator=draw)
    images[torch.arange(400), 0, labels, labels] += 20.0 + 2.0 * labels
    model = PixelModel(images, labels)
    features = model.features(images)
    assert (model.classify(features) == labels).all()
    centred = (images - images.mean(0)).flatten(1).numpy()
    _, _, vectors = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(
        features.flip(1)[:, :5].abs().numpy(), np.abs(centred @ vectors[:5].T), rtol=1e-3, atol=1e-2
    )


def test_systematic_draws_are_as_many_as_expected_up_to_one() -> None:
    weights = np.array([0.0, 3.0, 0.5, 1.5, 5.0, 0.0])
    counts = []
    for uniform in np.linspace(0.0, 1.0, 1000, endpoint=False):
        drawn = systematic(weights, 7, uniform)
        assert drawn.shape == (7,)
        counts.append(np.bincount(drawn, minlength=6))
    expected = 7 * weights / 10
    assert (np.abs(np.array(counts) - expected) < 1).all()
    np.testing.assert_allclose(np.mean(counts, 0), expected, atol=2e-3)


SETTINGS = Settings("digits-small", "", "sde-dpm++", 10, 100, 1.0, "cpu")


def cell(method: str, runs: int, frechet: float, reward: float, wave: float) -> list[Point]:
    """Five seeds around a mean: their standard deviation is ``wave``."""
    signs = np.array([1, -1, 1, -1, 0]) * wave
    return [
        Point(
            "8",
            method,
            runs,
            seed,
            1000 * runs,
            dict.fromkeys(MEASURES, 0.0) | {"frechet": frechet + s, "pixels": frechet + s, "reward": reward},
        )
        for seed, s in enumerate(signs)
    ]


def test_intervals_are_students() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    found = mean_of(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.value - found.half_width, found.value + found.half_width) == pytest.approx((low, high))
    assert math.isinf(mean_of([2.0]).half_width)


def test_claims() -> None:
    """The difference of 5 and 7.4 varies by 2: 2.776 * 2 / sqrt(5) = 2.48. A wider one at fewer calls says nothing."""
    points = [
        *cell("best-of-n", 10, 9.0, -1.0, 0.0),
        *cell("fk", 2, 5.1, -2.0, 0.0),
        *cell("fk", 5, 5.0, -2.0, 0.0),
        *cell("fk", 10, 5.0, -2.0, 0.0),
        *cell("svdd", 1, 6.0, -2.0, 0.0),
        *cell("svdd", 10, 6.0, -1.5, 1.0),
        *cell("dts", 1, 7.4, -2.0, 9.0),
        *cell("dts", 2, 7.6, -2.0, 2.0),
        *cell("dts", 5, 7.4, -2.0, 2.0),
        *cell("dts", 10, 4.0, -2.0, 2.0),
        *cell("dts-star", 10, 4.0, -1.1, 0.0),
        *cell("dts-star-narrow", 5, 4.0, -0.9, 0.0),
    ]
    lines = claims(Results(SETTINGS, points))
    assert lines[0] == (
        "8: Frechet: fk at 100 calls 5.00 (no loss shows from 50 on); dts at 50 7.40 (+2.40 +- 2.48): no loss shows at "
        "2 times fewer"
    )
    assert lines[1].startswith("8: pixel Frechet: fk at 100 calls 5.00 (no loss shows from 50 on); dts at 50")
    assert lines[2] == (
        "8: reward: best-of-n at 100 calls -1.000 (no loss shows from 100 on); dts-star at 100 -1.100 (-0.100 +- 0.000)"
        ": not reached"
    )
    assert lines[3].endswith("dts-star-narrow at 50 -0.900 (+0.100 +- 0.000): no loss shows at 2 times fewer")
    assert lines[4] == "8: reward: svdd against best-of-n: -0.500 +- 0.000 at 100 calls"
    assert lines[5] == "8: Frechet: svdd against best-of-n: -3.00 +- 1.24 at 100 calls"
    assert lines[7] == "8: reward: svdd against fk: +0.500 +- 0.000 at 100 calls"
    assert len(lines) == 10
    unfinished = cell("smc", 10, 0.0, 0.0, 0.0)[:3]
    assert claims(Results(SETTINGS, [*points, *unfinished])) == lines
    assert claims(Results(SETTINGS, [point for point in points if point.seed == 0])) == []


def test_a_file_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(self: Bench, target: str, method: str, runs: list[int], seed: int) -> list[Point]:
        measured.append((target, method, tuple(runs), seed))
        return [Point(target, method, budget, seed, 1, dict.fromkeys(MEASURES, 1.0)) for budget in runs]

    monkeypatch.setattr(Bench, "measure", measure)
    words = ("--json", tmp_path / "f.json", "--methods", "dts,fk", "--targets", "even")
    first = bench(data, *words, "--seeds", 1, "--budgets", 2)
    assert first.exit_code == 0, (first.output, first.exception)
    references = [("even", "real", (0,)), ("even", "conditional", (1,))]
    assert measured == [(*job, 0) for job in (*references, ("even", "dts", (2,)), ("even", "fk", (2,)))]
    measured.clear()
    second = bench(data, *words, "--seeds", 2, "--budgets", "4,2")
    added = [("even", "dts", (4,), 0), ("even", "fk", (4,), 0)]
    assert measured == added + [(*job, 1) for job in (*references, ("even", "dts", (2, 4)), ("even", "fk", (2, 4)))]
    before = (tmp_path / "f.json").read_bytes()
    third = bench(data, *words, "--seeds", 2, "--budgets", "2,4")
    assert third.stdout == second.stdout
    assert len(measured) == 6
    assert_refused(bench(data, *words, "--scale", 4), "made with scale=1.0, not 4.0", "another file")
    assert (tmp_path / "f.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methods", "svd"), ("methods 'svd'", "(nearest first) svdd", *METHODS)),
        (("--targets", "8,ten"), ("targets 'ten'", "even, ")),
        (("--budgets", "0,1"), ("--budgets '0,1'", "whole numbers from 1")),
        (("--budgets", "2,2"), ("--budgets '2,2'", "each once")),
        (("--sampler", "sde"), ("sampler 'sde'", "sde-dpm")),
        (("--sampler", "ddim"), ("--sampler ddim draws no noise", "sde-dpm++")),
        (("--model", "digits-restore"), ("--model digits-restore is no DiTPipeline of digits",)),
        (("--count", 40), ("has 30 test images of target 8", "needed are 40")),
        (("--data", "{folder}/missing.npz"), ("neither an .npz file nor a folder",)),
        (("--data", "{folder}/few.npz"), ("few.npz holds no grey images of the classes 0 to 9 in its train split",)),
        (("--json", "{folder}/none/f.json"), ("no folder",)),
        (("--json", "{folder}/other.json"), ("other.json holds no table of this benchmark",)),
        (("--plot", "{folder}/f.txt"), ("plot", "must end in")),
    ],
)
def test_bad_words(data: Path, tmp_path: Path, words: tuple[Any, ...], said: tuple[str, ...]) -> None:
    (tmp_path / "other.json").write_text('{"settings": {}}')
    images = np.zeros((20, 28, 28), np.uint8)
    labels = np.arange(20) % 9
    np.savez(tmp_path / "few.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    filled = [str(word).format(folder=tmp_path) for word in words]
    assert_refused(bench(data, "--targets", "8", *filled), *said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.npz", "other.json"]
