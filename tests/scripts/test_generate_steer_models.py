"""``fewstep generate --steer`` on tiny pipelines of other kinds, and with a reward that has a model of its own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fewstep.samplers import DrivenDenoiser
from fewstep.scripts.generation.model import describe
from fewstep.scripts.generation.record import read_settings
from fewstep.scripts.generation.schedulers import build_scheduler
from fewstep.scripts.generation.steered import Steerer, corrected_scheduler
from fewstep.scripts.generation.steering import METHODS
from model_folders import (
    assert_refused,
    invoke,
    pictures,
    save_class_model,
    save_text_model,
    save_unconditional_model,
)

ANYWHERE = [method for method in METHODS if method != "minority"]
"""``minority`` needs a classifier of the model's own."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_text_model(folder / "text")
    save_class_model(folder / "class")
    save_unconditional_model(folder / "unconditional")
    return folder


def steered(model: Path, out: Path, *arguments: object) -> dict[str, Any]:
    result = invoke("generate", "--model", model, "--steps", 3, "--output", out, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    record: dict[str, Any] = json.loads((out / "record.json").read_text())
    return record


@pytest.mark.parametrize("method", ANYWHERE)
@pytest.mark.parametrize("kind", ["text", "class", "unconditional"])
def test_other_models(models: Path, tmp_path: Path, kind: str, method: str) -> None:
    condition = {
        "text": ("--prompt", "red", "--prompt", "blue", "--guidance-scale", 3, "--height", 16, "--width", 16),
        "class": ("--classes", "1,3"),
        "unconditional": ("--number", 2),
    }[kind]
    particles = ("--particles", 2) if METHODS[method].particles else ()
    common = (*condition, "--steer", method, *particles, "--reward", "brightness")
    record = steered(models / kind, tmp_path / "out", *common)
    for i, image in enumerate(record["images"]):
        with Image.open(tmp_path / "out" / f"{i:05d}.png") as found:
            pixels = np.asarray(found).astype(float) / 255
        assert image["reward"] == pytest.approx(pixels.mean(), abs=0.003)
        assert image["network_calls"] >= 3
    made = pictures(tmp_path / "out")
    assert made["00000.png"] != made["00001.png"]


def test_best_of_n_finds_the_brightest(models: Path, tmp_path: Path) -> None:
    common = ("--number", 3, "--steer", "best-of-n", "--reward", "brightness")
    one, many = (
        steered(models / "unconditional", tmp_path / str(n), *common, "--particles", n)["images"] for n in (1, 6)
    )
    # The first candidate of six is the only one of one.
    assert all(b["reward"] >= a["reward"] - 1e-6 for a, b in zip(one, many, strict=True))
    assert any(b["reward"] > a["reward"] + 1e-3 for a, b in zip(one, many, strict=True))


def test_compressibility(models: Path, tmp_path: Path) -> None:
    for name in ("png", "jpeg"):
        record = steered(
            models / "unconditional", tmp_path / name, "--number", 1, "--steer", "svdd", "--particles", 2,
            "--reward", f"compressibility:{name}",
        )  # fmt: skip
        assert -1.0 < record["images"][0]["reward"] < 0.0  # a file of 8 by 8 pixels has less than a kilobyte


def test_clip_of_a_folder(models: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={c: k for k, c in enumerate(vocabulary)}, merges=[], model_max_length=20
    )
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "max_position_embeddings": 20}
    config = transformers.CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(vocabulary)},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    size = {"height": 16, "width": 16}
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size)
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(tmp_path / "clip")
    for name in ("unconditional", "digits-small"):  # three channels, and one
        record = steered(
            models / name if name == "unconditional" else Path(name), tmp_path / name, "--number", 1, "--steer",
            "best-of-n", "--particles", 2, "--reward", f"clip@{tmp_path / 'clip'}:a cat",
        )  # fmt: skip
        with Image.open(tmp_path / name / "00000.png") as image:
            pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model(**tokenizer(["a cat"], return_tensors="pt"), pixel_values=pixels)
        expected = 100 * float((output.image_embeds @ output.text_embeds.T)[0, 0])
        assert record["images"][0]["reward"] == pytest.approx(expected, abs=2.0)


def test_clip_that_is_not_there(models: Path, tmp_path: Path) -> None:
    call = ("generate", "--model", models / "unconditional", "--steer", "svdd", "--output", tmp_path / "out")
    result = invoke(*call, "--reward", f"clip@{tmp_path / 'none'}:cat")
    assert_refused(result, "none", "is not on this machine")
    assert result.stderr.endswith(f"(hf download {tmp_path / 'none'})\n")
    (tmp_path / "empty").mkdir()
    result = invoke(*call, "--reward", f"clip@{tmp_path / 'empty'}:cat")
    assert_refused(result, f"folder {tmp_path / 'empty'} holds no CLIP model")
    assert not (tmp_path / "out").exists()


class OwnPipeline(StableDiffusionPipeline):  # type: ignore[misc]
    """One that is not taken apart: for all one knows, its call does something else."""

    @functools.wraps(StableDiffusionPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("method", ANYWHERE)
def test_pipeline_that_is_driven_as_it_is(models: Path, tmp_path: Path, method: str) -> None:
    particles = ("--particles", 2) if METHODS[method].particles else ()
    steered(
        models / "text", tmp_path / "out", "--prompt", "red", "--guidance-scale", 3, "--height", 16, "--width", 16,
        "--steer", method, *particles, "--reward", "brightness",
    )  # fmt: skip
    settings = read_settings(tmp_path / "out" / "record.json")
    known = StableDiffusionPipeline.from_pretrained(models / "text")
    pipeline = OwnPipeline(**known.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    model = describe(str(models / "text"), pipeline)
    (cell,) = settings.cells
    if METHODS[method].noise == "own":
        scheduler = corrected_scheduler(settings, model, cell.steps)
    else:
        scheduler = build_scheduler(settings, model, cell)
    steerer = Steerer(settings, model, scheduler, cell.steps)
    assert isinstance(steerer._work(0).denoiser, DrivenDenoiser)
    image, account = steerer.make(0)
    with Image.open(tmp_path / "out" / "00000.png") as expected:
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 2
    assert account["network_calls"] >= 3
