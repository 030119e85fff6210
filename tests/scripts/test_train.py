"""``fewstep train``: every recipe runs, goes on exactly where it was stopped, and refuses what it cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep.metrics import DigitsClassifier, ReferenceStatistics
from fewstep.samplers import RestorationPipeline
from fewstep.scripts.commands import train
from fewstep.scripts.training import loop
from fewstep.scripts.training.data import load_images
from model_folders import assert_refused, invoke

RECIPES = ("autoencoder", "digits-small", "digits-large", "digits-classifier", "digits-restore")
STEPS, SAVE_EVERY = 5, 2


def _images(count: int, seed: int, shape: tuple[int, ...] = (28, 28)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise, of MNIST's size."""
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    arrays = {"x_train": _images(12, 0), "x_test": _images(9, 1)}
    np.savez(path, **arrays, y_train=np.arange(12) % 3, y_test=np.arange(9) % 3)
    return path


def command(recipe: str, data: Path, output: Path, autoencoder: Path | None) -> list[object]:
    words: list[object] = [
        "train", recipe, "--data", data, "--output", output, "--steps", STEPS, "--batch-size", 3,
        "--save-every", SAVE_EVERY,
    ]  # fmt: skip
    return [*words, "--autoencoder", autoencoder] if recipe in ("digits-small", "digits-large") else words


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a finished training without interruption."""
    root = tmp_path_factory.mktemp("trained")

    def folder(recipe: str) -> Path:
        output = root / recipe
        if not output.exists():
            autoencoder = folder("autoencoder") if recipe in ("digits-small", "digits-large") else None
            result = invoke(*command(recipe, data, output, autoencoder))
            assert result.exit_code == 0, (result.output, result.exception)
            assert result.stdout.startswith(f"{recipe}: {STEPS} steps, loss ")
        return output

    return folder


def weights(folder: Path) -> dict[str, tuple[dict[str, str], dict[str, bytes]]]:
    """Header and bytes of all tensors; the order of the header's entries in a file is a matter of chance."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name).tobytes() for name in list(file.keys())}
            found[str(path.relative_to(folder))] = (file.metadata() or {}, tensors)
    return found


def stop_after(steps: int) -> Callable[..., Iterator[int]]:
    """In the place of the progress bar: a user who presses Ctrl-C after some steps."""

    def progress(values: range, **_: Any) -> Iterator[int]:
        for value in values:
            if value == steps:
                raise KeyboardInterrupt
            yield value

    return progress


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_training_ends_with_the_same_weights(
    data: Path, trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    whole, out = trained(recipe), tmp_path / "out"
    words = command(recipe, data, out, trained("autoencoder"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "tqdm", stop_after(SAVE_EVERY + 1))
        assert invoke(*words).exit_code == 1
    assert [path.name for path in out.iterdir()] == ["checkpoint"]
    resumed = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "tqdm", lambda values, **_: resumed.extend(values) or values)
        assert invoke(*words).exit_code == 0
    assert resumed == list(range(SAVE_EVERY, STEPS))
    assert weights(whole)
    assert weights(out) == weights(whole)
    reports = [json.loads((folder / "training.json").read_text()) for folder in (out, whole)]
    for report in reports:
        del report["minutes"]
    assert reports[0] == reports[1]
    assert not (out / "checkpoint").exists()


@pytest.mark.parametrize("recipe", ["digits-small", "digits-large"])
def test_digits_are_an_ordinary_pipeline_with_named_classes(trained: Callable[[str], Path], recipe: str) -> None:
    pipeline = DiTPipeline.from_pretrained(trained(recipe))
    assert pipeline.labels == {"0": 0, "1": 1, "2": 2}
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    # Classes without images are zero; the one of the unconditional branch is not.
    table = pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    used = [*range(3), 1000]
    assert table[used].abs().sum(1).min() > 0
    assert table[3:1000].abs().max() == 0


def test_large_costs_eight_times_the_small(trained: Callable[[str], Path]) -> None:
    """Multiplications of the linear layers in a call, which is nearly all of them: the tokens are few."""
    sizes = []
    for recipe in ("digits-small", "digits-large"):
        transformer = DiTPipeline.from_pretrained(trained(recipe)).transformer
        layers = (module for module in transformer.transformer_blocks.modules() if isinstance(module, torch.nn.Linear))
        sizes.append(sum(layer.weight.numel() for layer in layers))
    assert sizes[1] >= 8 * sizes[0]


def test_latents_have_unit_variance(data: Path, trained: Callable[[str], Path]) -> None:
    vae = AutoencoderKL.from_pretrained(trained("autoencoder")).eval()
    with torch.no_grad():
        posterior = vae.encode(load_images(data).float_images()).latent_dist
    variance = (posterior.var + posterior.mean.square()).mean() - posterior.mean.mean() ** 2
    assert float(variance.sqrt()) * vae.config.scaling_factor == pytest.approx(1.0, rel=1e-3)


def test_restorer_is_a_pipeline_of_at_most_four_megabytes(trained: Callable[[str], Path]) -> None:
    folder = trained("digits-restore")
    (weights_file,) = folder.rglob("*.safetensors")
    assert weights_file.stat().st_size <= 4e6
    pipeline = RestorationPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    degraded = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images = pipeline(degraded, 2, torch.Generator().manual_seed(0), "pt").images
    assert images.shape == degraded.shape
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_classifier_comes_with_its_reference_statistics(data: Path, trained: Callable[[str], Path]) -> None:
    folder = trained("digits-classifier")
    classifier = DigitsClassifier.from_pretrained(folder)
    for split, count in (("train", 12), ("test", 9)):
        found = ReferenceStatistics.load(folder / f"noise-{split}.safetensors", extractor=classifier.fingerprint)
        assert found.count == count
        with torch.no_grad():
            features = classifier.features(load_images(data, split=split).float_images()).double()
        torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.covariance, features.T.cov(), rtol=1e-4, atol=1e-6)
    accuracy = json.loads((folder / "training.json").read_text())["test_accuracy"]
    assert round(accuracy * 9) == pytest.approx(accuracy * 9)


def test_training_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)
    target = torch.tensor([1.0, -2.0, 3.0, 0.5])

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(64, 4, generator=generator)
        return (layer(x)[:, 0] - x @ target).square().mean()

    record = loop.train(
        layer, loss_of, steps=400, learning_rate=0.1, checkpoint=tmp_path / "c.safetensors", warmup=10, average=0.9
    )
    assert record["steps"] == 400
    torch.testing.assert_close(layer.weight[0], target, rtol=1e-3, atol=1e-3)
    assert sorted(load_file(tmp_path / "c.safetensors"))[0] == "average.0"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--seed", 1), "seed"),
        (("--steps", 9), "steps"),
        (("--batch-size", 4), "batch_size"),
        (("--data", "other"), "data"),
    ],
)
def test_checkpoint_of_other_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, Any], said: str
) -> None:
    words = command("autoencoder", data, tmp_path / "out", None)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "tqdm", stop_after(SAVE_EVERY + 1))
        assert invoke(*words).exit_code == 1
    if changes[1] == "other":
        with np.load(data) as archive:
            np.savez(tmp_path / "other.npz", **{**archive, "x_train": archive["x_train"][::-1]})
        changes = ("--data", tmp_path / "other.npz")
    before = weights(tmp_path)
    assert_refused(invoke(*words, *changes), "other settings", f"({said})", "checkpoint")
    assert weights(tmp_path) == before


def test_checkpoint_of_another_autoencoder(
    data: Path, trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = AutoencoderKL.from_pretrained(trained("autoencoder"))
    with torch.no_grad():
        vae.quant_conv.bias += 0.1
    vae.save_pretrained(tmp_path / "vae")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "tqdm", stop_after(SAVE_EVERY + 1))
        assert invoke(*command("digits-small", data, tmp_path / "out", trained("autoencoder"))).exit_code == 1
    result = invoke(*command("digits-small", data, tmp_path / "out", tmp_path / "vae"))
    assert_refused(result, "other settings", "(autoencoder)")


def test_folder_of_a_finished_training(data: Path, trained: Callable[[str], Path]) -> None:
    result = invoke(*command("autoencoder", data, trained("autoencoder"), None))
    assert_refused(result, "finished training", "another folder")


def test_folder_of_other_things(data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    result = invoke(*command("autoencoder", data, tmp_path, None))
    assert_refused(result, f"--output {tmp_path} is not empty and holds no training of autoencoder; name a new folder")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_help_tells_every_recipe() -> None:
    lines = [line.split(maxsplit=1) for line in invoke("train", "--help").stdout.splitlines()]
    assert {line[0] for line in lines if len(line) == 2} >= set(train.RECIPES)


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("digits-small", (), ("--autoencoder", "fewstep train autoencoder")),
        ("autoencoder", ("--autoencoder", "{data}"), ("--autoencoder", "does not take it")),
        ("autoencoder", ("--precision", "bfloat16"), ("--precision",)),
        ("digits-restore", ("--autoencoder", "{data}"), ("--autoencoder", "digits-restore does not take it")),
        ("digits-restore", ("--precision", "bfloat16"), ("--precision",)),
        ("autoencoder", ("--precision", "float8"), ("--precision", "float8")),
        ("digits-small", ("--autoencoder", "{data}"), ("holds no autoencoder",)),
        ("digits-small", ("--autoencoder", "{broken}"), ("holds no autoencoder",)),
        ("digits-small", ("--autoencoder", "{colour}"), ("3 colour", "needed are 1")),
        ("digits-huge", (), ("digits-huge", "digits-large")),
        ("autoencoder", ("--steps", 0), ("--steps", "0")),
        ("autoencoder", ("--batch-size", "some"), ("--batch-size", "some")),
        ("autoencoder", ("--output", "{data}"), ("is a file",)),
        ("autoencoder", ("--output", "{data}/out"), ("cannot be written",)),
        ("autoencoder", ("--data", "{missing}"), ("neither an .npz file nor a folder",)),
    ],
)
def test_bad_words(
    data: Path, trained: Callable[[str], Path], tmp_path: Path, recipe: str, words: tuple[Any, ...], said: tuple[str]
) -> None:
    config = AutoencoderKL.load_config(trained("autoencoder"))
    for name, channels in (("broken", 1), ("colour", 3)):
        vae = AutoencoderKL.from_config(config, in_channels=channels, out_channels=channels)
        vae.save_pretrained(tmp_path / name)
    (tmp_path / "broken" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    places = {
        "data": data,
        "missing": tmp_path / "missing",
        "broken": tmp_path / "broken",
        "colour": tmp_path / "colour",
    }
    filled = [str(word).format(**places) for word in words]
    assert_refused(invoke("train", recipe, "--data", data, "--output", tmp_path / "out", *filled), *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x_train": _images(3, 0)}, "y_train"),
        ({"x_train": _images(3, 0).astype(np.float32), "y_train": np.arange(3)}, "float32"),
        ({"x_train": _images(3, 0, (28, 28, 4)), "y_train": np.arange(3)}, "(3, 28, 28, 4)"),
        ({"x_train": _images(3, 0), "y_train": np.arange(4)}, "each of 3 images"),
        ({"x_train": _images(3, 0), "y_train": -np.arange(3)}, "each of 3 images"),
        ({"x_train": _images(3, 0), "y_train": np.arange(3) / 2}, "each of 3 images"),
        ({"x_train": _images(0, 0), "y_train": np.arange(0)}, "each of 0 images"),
        ({"x_train": _images(1001, 0, (1, 1)), "y_train": np.arange(1001)}, "1001 classes"),
        ({"x_train": np.array([None]), "y_train": np.arange(1)}, "not a readable .npz"),
    ],
)
def test_bad_archives(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    words = ("train", "autoencoder", "--data", tmp_path / "bad.npz", "--output", tmp_path / "out")
    assert_refused(invoke(*words), "bad.npz", said)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- data


def _folder(root: Path, mode: str = "L") -> Path:
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(("cat", "ant")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                size = (30, 32, 3) if mode == "RGB" else (30, 32)
                image = Image.fromarray(np.full(size, 100 * label + k, np.uint8))
                image.save(root / split / name / f"{k}.png")
    return root


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_folder_of_images(tmp_path: Path, mode: str, channels: int) -> None:
    found = load_images(_folder(tmp_path, mode))
    assert found.names == ("ant", "cat")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert tuple(found.images.shape) == (4, channels, 32, 32)
    # Two rows are missing: one of black above, one below.
    assert found.images[:, :, 1:31].float().mean((1, 2, 3)).tolist() == [100, 101, 0, 1]
    assert found.images[:, :, [0, 31]].max() == 0
    assert load_images(tmp_path, split="test").labels.tolist() == [0, 1]
    assert load_images(tmp_path / "train").names == ("ant", "cat")


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    np.savez(tmp_path / "large.npz", x_train=np.full((1, 64, 48, 3), 77, np.uint8), y_train=np.arange(1))
    found = load_images(tmp_path / "large.npz")
    assert tuple(found.images.shape) == (1, 3, 32, 32)
    assert found.images.unique().tolist() == [77]


def test_archive_is_padded_and_scaled(data: Path) -> None:
    found = load_images(data)
    with np.load(data) as archive:
        np.testing.assert_array_equal(found.images[:, 0, 2:30, 2:30].numpy(), archive["x_train"])
    assert found.images.sum() == found.images[:, :, 2:30, 2:30].sum()
    values = found.float_images(torch.tensor([3]))
    assert values.min() == -1.0
    torch.testing.assert_close((values + 1.0) * 127.5, found.images[3:4].float())


@pytest.mark.parametrize(
    ("name", "said"), [("train/ant/x.png", "not a readable image"), ("empty/x.txt", "one sub-folder a class")]
)
def test_bad_folders(tmp_path: Path, name: str, said: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text("no image")
    root = tmp_path / name.split("/")[0] if name.startswith("empty") else tmp_path
    with pytest.raises(ValueError, match=said):
        load_images(root)


def test_classifier_needs_test_images(tmp_path: Path) -> None:
    data = _folder(tmp_path / "data")
    words = ("train", "digits-classifier", "--data", data / "train", "--output", tmp_path / "out")
    assert_refused(invoke(*words), "no folder test/")
    assert not (tmp_path / "out").exists()
