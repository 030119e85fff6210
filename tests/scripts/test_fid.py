"""``fewstep fid``: its figures are those of an independent computation, and it says what it was asked."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import eigvals

from fewstep.metrics import DigitsClassifier, Estimate, ReferenceStatistics, digits_statistics, feature_extractor
from fewstep.samplers import SAMPLERS
from fewstep.scripts.fid import chunks, references
from fewstep.scripts.fid.folder import EvaluationFolder
from fewstep.scripts.fid.report import figure_text, figures_of
from fewstep.scripts.generation.model import load_model
from model_folders import assert_refused, invoke, pictures, save_text_model, save_unconditional_model

NUMBER, CHUNK = 100, 64
COMMON = ("--samplers", "dpm++", "--steps", "2", "--guidance-scale", "1.5")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell of 100 images, which are kept."""
    folder = tmp_path_factory.mktemp("output") / "fid"
    evaluate(*COMMON, "--number", NUMBER, "--save-images", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, for images of any size."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        projection_dim=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 RGB images of 8 x 8."""
    return save_noise(tmp_path_factory.mktemp("real"), (8, 8, 3))


@pytest.fixture(scope="module")
def unconditional_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unconditional_model(tmp_path_factory.mktemp("unconditional"))


def save_noise(folder: Path, shape: tuple[int, ...], count: int = 60, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{k:03d}.png")
    return folder


def evaluate(*arguments: object) -> str:
    result = invoke("fid", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def assert_ends(result: Result, *said: str) -> None:
    """Refused when the work has begun: the line stands below the progress."""
    assert result.exit_code == 2, (result.output, result.exception)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    for part in said:
        assert part in line


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "fid.json").read_text())
    return content


def frechet_by_eigenvalues(
    features: np.ndarray[Any, Any], mean: np.ndarray[Any, Any], cov: np.ndarray[Any, Any]
) -> float:
    """The formula of arXiv 1706.08500, by the eigenvalues of the product of the covariances."""
    ours = features.astype(np.float64)
    covariance = np.cov(ours, rowvar=False)
    roots = np.sqrt(eigvals(covariance @ cov).real.clip(min=0.0))
    return float(np.square(ours.mean(0) - mean).sum() + np.trace(covariance + cov) - 2.0 * roots.sum())


def drawn_digits() -> np.ndarray[Any, Any]:
    """The images of ``output``, by a user's own lines of diffusers."""
    pipe = load_model("digits-small", "float32", "cpu").pipeline
    pipe.scheduler = SAMPLERS["dpm++"].build(pipe.scheduler.config)
    parts = []
    for begin in range(0, NUMBER, CHUNK):
        indices = range(begin, min(begin + CHUNK, NUMBER))
        parts.append(
            pipe(
                class_labels=[i % 10 for i in indices],
                generator=[torch.Generator().manual_seed(i) for i in indices],
                guidance_scale=1.5,
                num_inference_steps=2,
                output_type="np",
            ).images
        )
    return (np.concatenate(parts) * 255).round().astype(np.uint8)


def test_figures_are_those_of_an_independent_computation(output: Path) -> None:
    images = torch.from_numpy(drawn_digits()).permute(0, 3, 1, 2)
    classifier = DigitsClassifier.bundled()
    with torch.no_grad():
        features = classifier.features(images / 127.5 - 1.0)
        p = classifier.classify(features).double().softmax(1).numpy()
    reference = digits_statistics("train", classifier)
    expected = frechet_by_eigenvalues(features.numpy(), reference.mean.numpy(), reference.covariance.numpy())
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p, 10)]
    (row,) = results(output)["cells"]
    assert row["figures"]["fid"]["value"] == pytest.approx(expected, rel=1e-5)
    assert row["figures"]["is"]["value"] == pytest.approx(np.mean(scores), rel=1e-5)
    for figure in row["figures"].values():
        assert figure["low"] < figure["value"] < figure["high"]


def test_saved_images_are_those_of_generate_and_have_the_same_distance(output: Path, tmp_path: Path) -> None:
    generated = invoke("generate", *("--steps", 2, "--guidance-scale", 1.5, "--number", 3, "--output", tmp_path))
    assert generated.exit_code == 0, generated.output
    saved = output / "dpm++-2-g1.5"
    assert len(pictures(saved)) == NUMBER
    for k in range(3):
        ours, theirs = (np.asarray(Image.open(folder / f"{k:05d}.png")).astype(int) for folder in (saved, tmp_path))
        assert abs(ours - theirs).max() <= 1  # there each image has a call of its own
    told = evaluate("--images", saved, "--output", tmp_path / "compared", "--batch-size", CHUNK)
    compared = results(tmp_path / "compared")
    # A folder does not tell which classes took turns: its interval is the wider one.
    found, own = compared["figures"]["fid"], results(output)["cells"][0]["figures"]["fid"]
    assert found["value"] == own["value"]
    assert found["half"] > own["half"]
    assert compared["number"] == NUMBER
    assert f"{compared['figures']['fid']['value']:.3f} +- " in told


def test_two_folders_are_compared(tmp_path: Path, features: Path, real: Path) -> None:
    made = save_noise(tmp_path / "made", (8, 8, 3), 50, seed=1)
    extractor = feature_extractor("clip", features)
    ours, theirs = (
        extractor(
            torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())])).permute(
                0, 3, 1, 2
            )
        ).numpy()
        for folder in (made, real)
    )
    evaluate(
        *("--reference", real, "--images", made, "--features", "clip", "--weights", features),
        *("--metrics", "fid,precision", "--output", tmp_path / "out"),
    )
    found = results(tmp_path / "out")
    expected = frechet_by_eigenvalues(
        ours, theirs.astype(np.float64).mean(0), np.cov(theirs.astype(np.float64), rowvar=False)
    )
    assert found["figures"]["fid"]["value"] == pytest.approx(expected, rel=1e-5)
    assert found["reference"]["count"] == 60
    assert set(found["figures"]) == {"fid", "precision"}


def test_the_batch_size_changes_nothing_on_the_cpu(output: Path, tmp_path: Path) -> None:
    evaluate(
        *(*COMMON, "--number", NUMBER, "--save-images", "--batch-size", 7, "--output", tmp_path / "fid"),
    )
    for path in (path for path in output.rglob("*") if path.is_file()):
        assert (tmp_path / "fid" / path.relative_to(output)).read_bytes() == path.read_bytes()


def test_record_table_and_csv_say_the_same(output: Path) -> None:
    found = results(output)
    (row,) = found["cells"]
    assert row["seeds"] == [0, NUMBER - 1]
    assert (row["sampler"], row["steps"], row["calls"], row["guidance_scale"]) == ("dpm++", 2, 2, 1.5)
    reference = digits_statistics("train", DigitsClassifier.bundled())
    assert found["reference"]["fingerprint"] == reference.fingerprint
    assert found["reference"]["count"] == 60000
    assert found["reference"]["confidence"] == 0.95
    with (output / "fid.csv").open() as file:
        (line,) = csv.DictReader(file)
    for name, figure in row["figures"].items():
        assert [float(line[key]) for key in (name, f"{name}_low", f"{name}_high")] == list(figure.values())[:3]
    told = evaluate(*COMMON, "--number", NUMBER, "--save-images", "--output", output)
    assert f"{row['figures']['fid']['value']:.3f} +- " in told


def test_network_calls_are_counted(
    unconditional_model: Path, features: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, counted = diffusers.UNet2DModel.forward, []

    def counting(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DModel, "forward", counting)
    evaluate(
        *("--model", unconditional_model, "--samplers", "deis-heun,unipc", "--steps", 3, "--number", 40),
        *("--features", "clip", "--weights", features, "--reference", real, "--output", tmp_path / "fid"),
    )
    rows = results(tmp_path / "fid")["cells"]
    assert [row["calls"] for row in rows] == [6, 3]
    assert [row["guidance_scale"] for row in rows] == [None, None]
    assert counted == [1] * 6 + [40] * 9


def test_prompts_come_in_turn(features: Path, real: Path, tmp_path: Path) -> None:
    model = save_text_model(tmp_path / "model")
    prompts = ("a fox", "two dogs", "rain")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    evaluate(
        *("--model", model, "--prompts", tmp_path / "prompts.txt", "--steps", 1, "--number", 40, "--seed", 5),
        *("--guidance-scale", 3, "--features", "clip", "--weights", features, "--reference", real, "--save-images"),
        *("--output", tmp_path / "fid"),
    )
    assert results(tmp_path / "fid")["cells"][0]["seeds"] == [5, 44]
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = SAMPLERS["dpm++"].build(pipe.scheduler.config)
    for k in (0, 4):
        image = pipe(
            prompts[k % 3],
            guidance_scale=3.0,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(5 + k),
        ).images[0]
        ours = np.asarray(Image.open(tmp_path / "fid" / "dpm++-1-g3" / f"{k:05d}.png")).astype(int)
        assert abs(ours - np.asarray(image).astype(int)).max() <= 1


@pytest.fixture
def common(unconditional_model: Path, features: Path, real: Path) -> Callable[..., tuple[object, ...]]:
    """A small evaluation with a reference that is computed."""

    def arguments(**changed: object) -> tuple[object, ...]:
        given = {"model": unconditional_model, "samplers": "dpm++", "steps": 2, "number": 40, "features": "clip"}
        given |= {"weights": features, "reference": real, **changed}
        return tuple(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value))

    return arguments


def test_a_reference_is_computed_once(
    common: Callable[..., tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    evaluate(*common(), "--output", first)

    def compute_reference(*_: Any, **__: Any) -> ReferenceStatistics:
        raise AssertionError

    monkeypatch.setattr(references, "compute_reference", compute_reference)
    evaluate(*common(samplers="unipc,dpm++", steps="3,2"), "--output", first)
    rows = results(first)["cells"]
    assert [(row["sampler"], row["steps"]) for row in rows] == [
        ("unipc", 3), ("unipc", 2), ("dpm++", 3), ("dpm++", 2),
    ]  # fmt: skip
    evaluate(*common(reference=first / "reference.safetensors"), "--output", tmp_path / "second")
    assert results(tmp_path / "second")["cells"] == rows[3:]
    assert results(tmp_path / "second")["reference"]["data"] == results(first)["reference"]["data"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "different seed"),
        ({"number": 41}, "different number"),
        ({"option": "solver_order=1"}, "different options"),
        ({"batch_size": 5, "dtype": "bfloat16"}, "different dtype"),
        ({"reference_size": 8}, "different reference"),
    ],
)
def test_another_evaluation_is_refused(
    common: Callable[..., tuple[object, ...]], tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    evaluate(*common(), "--output", tmp_path / "fid")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert_refused(invoke("fid", *common(**changed), "--output", tmp_path / "fid"), said, "choose another folder")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_changed_weights_and_images_are_noticed(common: Callable[..., tuple[object, ...]], tmp_path: Path) -> None:
    model, real = save_unconditional_model(tmp_path / "model"), save_noise(tmp_path / "real", (8, 8, 3))
    arguments = (*common(model=model, reference=real), "--output", tmp_path / "fid")
    evaluate(*arguments)
    os.utime(real / "000.png", (0, 2_000_000_000))
    assert_refused(invoke("fid", *arguments), "different reference")
    weights = next(model.rglob("*.safetensors"))
    save_file({name: 1.001 * tensor for name, tensor in load_file(weights).items()}, weights)
    assert_refused(invoke("fid", *arguments), "different model_weights, reference")


def test_more_figures_are_added(common: Callable[..., tuple[object, ...]], tmp_path: Path) -> None:
    evaluate(*common(metrics="fid"), "--output", tmp_path)
    (first,) = results(tmp_path)["cells"]
    evaluate(*common(metrics="kid,coverage"), "--output", tmp_path)
    (row,) = results(tmp_path)["cells"]
    assert list(row["figures"]) == ["fid", "kid", "coverage"]
    assert row["figures"]["fid"] == first["figures"]["fid"]
    evaluate(*common(metrics="coverage"), "--output", tmp_path)
    assert results(tmp_path)["cells"] == [row]


def test_remarks_are_kept_when_figures_are_added(common: Callable[..., tuple[object, ...]], tmp_path: Path) -> None:
    few = save_noise(tmp_path / "few", (8, 8, 3), 4)
    said = []
    for metrics in ("kid", "fid", "precision", "fid,recall"):
        evaluate(*common(reference=few, metrics=metrics), "--output", tmp_path / "fid")
        said.append(results(tmp_path / "fid")["cells"][0]["remarks"])
    assert said[0] == []
    assert "4 reference images are too few" in said[1][0]
    assert said[1] == said[2] == said[3]


def test_features_of_other_cells_outlive_a_command(
    common: Callable[..., tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "fid"
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationFolder, "add", interrupted)
        assert invoke("fid", *common(samplers="unipc"), "--output", output).exit_code != 0
    (chunk,) = output.glob("features/unipc-2-*/*.safetensors")
    before = chunk.stat().st_mtime_ns
    evaluate(*common(samplers="dpm++"), "--output", output)
    assert chunk.stat().st_mtime_ns == before
    evaluate(*common(samplers="unipc"), "--output", output)
    assert not (output / "features").exists()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_sampler_that_has_changed_is_measured_again(
    common: Callable[..., tuple[object, ...]], unconditional_model: Path, tmp_path: Path
) -> None:
    base = diffusers.DiffusionPipeline.from_pretrained(unconditional_model).scheduler.config
    figures = []
    for order in (1, 2, 2):
        SAMPLERS["dpm++"].build(base, solver_order=order).save_pretrained(tmp_path / "mine")
        evaluate(*common(samplers=tmp_path / "mine", steps=3), "--output", tmp_path / "fid")
        (row,) = results(tmp_path / "fid")["cells"]
        assert row["scheduler"]["solver_order"] == order
        figures.append(row["figures"])
    assert figures[0] != figures[1] == figures[2]


def test_as_many_images_as_the_least_are_enough(tmp_path: Path) -> None:
    evaluate(*COMMON, "--number", 273, "--metrics", "fid_infinity", "--output", tmp_path)
    assert set(results(tmp_path)["cells"][0]["figures"]) == {"fid_infinity"}


def test_unreadable_features_are_named(
    common: Callable[..., tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(*common(), "--output", tmp_path)
    (tmp_path / "fid.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "save", lambda *_, **__: b"truncated")
        assert_ends(invoke("fid", *common(), "--output", tmp_path), "delete it")
    (chunk,) = tmp_path.glob("features/*/00000000.safetensors")
    assert_ends(invoke("fid", *common(), "--output", tmp_path), str(chunk), "delete it")


def test_a_plot_is_drawn_and_the_time_is_told(output: Path, tmp_path: Path) -> None:
    told = evaluate(
        *("--samplers", "dpm++,unipc", "--steps", "2,3", "--guidance-scale", "1,2", "--number", 40, "--profile"),
        *("--output", tmp_path / "fid", "--plot", tmp_path / "fid.png"),
    )
    with Image.open(tmp_path / "fid.png") as picture:
        assert picture.size[0] > 1000
    shares = told.splitlines()[-1].removeprefix("time of the first process: ").split(", ")
    parts = {share.rsplit(" ", 1)[0]: float(share.rsplit(" ", 1)[1].rstrip("%")) for share in shares}
    assert list(parts) == ["denoiser", "decoder", "features", "the rest"]
    assert sum(parts.values()) == pytest.approx(100.0, abs=0.3)
    assert min(parts.values()) > 0.0


def test_a_plot_leaves_out_cells_without_the_figure(tmp_path: Path) -> None:
    for sampler, metrics in (("unipc", "is"), ("dpm++", "fid")):
        words = ("--samplers", sampler, "--steps", 2, "--guidance-scale", 1, "--number", 40, "--metrics", metrics)
        evaluate(*words, "--output", tmp_path / "fid", "--plot", tmp_path / "fid.svg")
    drawn = (tmp_path / "fid.svg").read_text()
    assert "<!-- dpm++ -->" in drawn
    assert "<!-- unipc -->" not in drawn


def test_too_few_images_for_the_features_are_reported(output: Path, tmp_path: Path) -> None:
    result = invoke("fid", *COMMON, "--number", 40, "--output", tmp_path / "fid")
    assert result.exit_code == 0
    (remark,) = results(tmp_path / "fid")["cells"][0]["remarks"]
    assert "40 generated images are too few for 64 features" in remark
    assert remark in result.stderr
    assert results(output)["cells"][0]["remarks"] == []


def test_intervals_are_those_of_the_estimates() -> None:
    from fewstep.metrics import jackknife

    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure = figures_of({"mean": jackknife(lambda kept: float(values[kept].mean()), 200)})["mean"]
    error = float(values.std()) / 200**0.5
    assert figure["high"] - figure["value"] == pytest.approx(2.0 * error, rel=0.35)
    assert figure["value"] == pytest.approx(float(values.mean()))


def test_half_an_interval_is_told_uncut() -> None:
    half = Estimate(0.1, (0.0, 0.2, 0.1), lowest=0.0).half_width()
    figure = figures_of({"fid": Estimate(0.1, (0.0, 0.2, 0.1), lowest=0.0)})["fid"]
    assert figure["low"] == 0.0
    assert figure["half"] == half > 0.1
    assert figure_text("fid", figure) == f"0.100 +- {half:.3f}"
    del figure["half"]  # as of earlier versions
    assert figure_text("fid", figure) == f"0.100 +- {(0.1 + half) / 2.0:.3f}"


REFUSED = {
    "no such sampler": (("--samplers", "dpm+"), "sampler 'dpm+' is not known"),
    "sampler twice": (("--samplers", "dpm++,dpm++"), "each sampler once"),
    "no steps": (("--steps", "0"), "steps 0 is less than 1"),
    "steps in words": (("--steps", "ten"), "steps 'ten'"),
    "scale in words": (("--guidance-scale", "high"), "guidance-scale 'high'"),
    "scale twice": (("--guidance-scale", "1,1.0"), "each once"),
    "negative scale": (("--guidance-scale", "-1"), "guidance-scale -1"),
    "few images": (("--number", "39"), "number 39", "40 or more"),
    "few to extrapolate": (("--number", "272", "--metrics", "fid_infinity"), "number 272", "give 273 or more"),
    "no such metric": (("--metrics", "fdi"), "metrics 'fdi' is not known"),
    "pairs without features": (("--metrics", "recall"), "reference holds no features", "recall"),
    "no such features": (("--features", "digit"), "reference is missing"),
    "unknown features": (("--features", "digit", "--reference", "mnist-train"), "features 'digit' is not known"),
    "features without weights": (("--features", "inception", "--reference", "."), "weights of inception are missing"),
    "no such reference": (("--reference", "nowhere"), "reference 'nowhere' does not exist"),
    "statistics resized": (("--reference-size", "32"), "mnist-train holds statistics"),
    "statistics resized to nothing": (("--reference-size", "0"), "mnist-train holds statistics"),
    "statistics without channels": (("--reference-channels", "0"), "mnist-train holds statistics"),
    "prompts for classes": (("--prompts", __file__), "prompt does not apply"),
    "class out of range": (("--classes", "10"), "class 10 is out of range"),
    "restoration": (("--model", "digits-restore"), "bench restore"),
    "no such model": (("--model", "digits"), "model 'digits'"),
    "no such device": (("--device", "tpu"), "device 'tpu' is not known"),
    "batch size": (("--batch-size", "0"), "batch-size 0"),
    "plot suffix": (("--plot", "fid.gif"), "must end in"),
    "a negative seed": (("--seed", "-1"), "seed -1"),
    "images and a model": (("--images", ".", "--steps", "3"), "leave out --steps"),
    "no images": (("--images", "nowhere.npz"), "nowhere.npz does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, *said = REFUSED[case]
    assert_refused(invoke("fid", *arguments), *said)
    assert list(tmp_path.iterdir()) == []


def test_images_and_reference_must_be_alike(common: Callable[..., tuple[object, ...]], tmp_path: Path) -> None:
    grey = save_noise(tmp_path / "grey", (8, 8))
    large = save_noise(tmp_path / "large", (9, 9, 3))
    empty = tmp_path / "empty"
    empty.mkdir()
    output = tmp_path / "fid"
    for reference, *said in (
        (grey, "images are RGB and those of reference", "grey", "--reference-channels 3"),
        (large, "images are 8 x 8", "9 x 9", "--reference-size 8"),
        (empty, "has no images"),
    ):
        assert_refused(invoke("fid", *common(reference=reference), "--output", output), *said)
        assert not output.exists()
    evaluate(*common(reference=grey, reference_channels=3), "--output", output)
    evaluate(*common(reference=large, reference_size=8), "--output", tmp_path / "resized")


@pytest.mark.parametrize(
    ("count", "metrics", "said"),
    [
        (1, "fid", ("number 1 ", "for fid;", "give 2 or more")),
        (3, "fid,precision", ("number 3 ", "for precision;", "give 4 or more")),
        (5, "recall,coverage", ("number 5 ", "for coverage;", "give 6 or more")),
    ],
)
def test_too_few_images_of_a_reference_are_refused(
    common: Callable[..., tuple[object, ...]],
    features: Path,
    real: Path,
    tmp_path: Path,
    count: int,
    metrics: str,
    said: tuple[str, ...],
) -> None:
    few, output = save_noise(tmp_path / "few", (8, 8, 3), count), tmp_path / "fid"
    words = ("--images", real, "--features", "clip", "--weights", features, "--reference", few, "--metrics", metrics)
    for arguments in (common(reference=few, metrics=metrics), words):
        assert_refused(invoke("fid", *arguments, "--output", output), f"--reference {few}: ", *said)
        assert not output.exists()


def test_a_stored_reference_of_too_few_images_is_refused(
    common: Callable[..., tuple[object, ...]], tmp_path: Path
) -> None:
    few, output = save_noise(tmp_path / "few", (8, 8, 3), 3), tmp_path / "fid"
    evaluate(*common(reference=few), "--output", output)
    more = invoke("fid", *common(reference=few, metrics="recall"), "--output", output)
    assert_refused(more, f"--reference {few}: number 3 ", "give 4 or more")
    stored = common(reference=output / "reference.safetensors", metrics="density")
    assert_refused(invoke("fid", *stored, "--output", tmp_path / "new"), "number 3 ", "give 6 or more")


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    made = save_noise(tmp_path / "made", (32, 32), 39)
    assert_refused(invoke("fid", "--images", made), f"--images {made}: number 39 ", "give 40 or more")
    np.savez(tmp_path / "made.npz", images=np.zeros((272, 32, 32), np.uint8))
    told = invoke("fid", "--images", tmp_path / "made.npz", "--metrics", "fid_infinity")
    assert_ends(told, "made.npz: number 272 ", "give 273 or more")


def test_images_are_measured_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(invoke("fid", "--images", tmp_path), "by one process")


def test_output_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(invoke("fid", "--number", 40, "--output", tmp_path), "is not empty", "choose another folder")
    assert_refused(invoke("fid", "--number", 40, "--output", tmp_path / "notes.txt"), "is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_figures_of_images_do_not_replace_those_of_a_model(output: Path, tmp_path: Path) -> None:
    made, before = save_noise(tmp_path / "made", (32, 32)), (output / "fid.json").read_bytes()
    assert_refused(invoke("fid", "--images", made, "--output", output), "evaluation of a model", "another folder")
    assert (output / "fid.json").read_bytes() == before
    for _ in range(2):
        evaluate("--images", made, "--output", tmp_path / "own")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in ("settings.json", "fid.json") for content in (b"{", b"[]", b"\xff")),
        ("fid.json", b"{}"),
        ("fid.json", b'{"cells": [{}], "reference": {}}'),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = EvaluationFolder(tmp_path, {"seed": 0})
    folder.begin()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))} .*; choose another folder"):
        EvaluationFolder(tmp_path, {"seed": 0})


def test_images_of_mixed_sizes_and_broken_ones_are_named(tmp_path: Path) -> None:
    made = save_noise(tmp_path / "made", (32, 32), 41)
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(made / "100.png")
    assert_ends(invoke("fid", "--images", made), "images differ", "30 x 30")
    (made / "100.png").write_bytes((made / "000.png").read_bytes()[:200])
    assert_ends(invoke("fid", "--images", made), "100.png is not a readable image")
