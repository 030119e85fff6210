"""The recipe of the bundled classifier: it goes on where it was stopped, and what is bundled does what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.guidance import MinorityClassifier, MinorityGuidance
from fewstep.guidance.minority_classifier import BUNDLED_MINORITY
from fewstep.metrics import DigitsClassifier
from fewstep.samplers import DPMSolverPPScheduler
from fewstep.scripts.generation.model import load_model
from fewstep.scripts.training import loop
from fewstep.scripts.training.data import LabelledImages
from fewstep.scripts.training.minority import score_images
from model_folders import assert_refused, invoke

STEPS, SAVE_EVERY = 5, 2


def command(data: Path, output: Path) -> list[object]:
    return ["train", "digits-minority", "--data", data, "--output", output, "--steps", STEPS, "--batch-size", 4,
            "--save-every", SAVE_EVERY]  # fmt: skip


def archive(path: Path, shape: tuple[int, ...] = (28, 28)) -> Path:
    """Two classes of noise, just enough for ten rarities of each."""
    draw = np.random.default_rng(0)
    images = {
        f"x_{split}": draw.integers(0, 256, (count, *shape), np.uint8) for split, count in (("train", 20), ("test", 6))
    }
    np.savez(path, **images, y_train=np.arange(20) % 2, y_test=np.arange(6) % 2)
    return path


def test_stopped_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive(tmp_path / "noise.npz")
    whole, out = tmp_path / "whole", tmp_path / "out"
    result = invoke(*command(data, whole))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "accuracy at 0.5" in result.stdout

    def stop(values: range, **_: Any) -> Iterator[int]:
        for value in values:
            if value == SAVE_EVERY + 1:
                raise KeyboardInterrupt
            yield value

    with monkeypatch.context() as patch:
        patch.setattr(loop, "tqdm", stop)
        assert invoke(*command(data, out)).exit_code == 1
    assert invoke(*command(data, out)).exit_code == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (out / "checkpoint").exists()
    model = MinorityClassifier.from_pretrained(out)
    assert model(torch.zeros(1, 4, 8, 8), 0.8, 0.6).shape == (1, 10)


def test_other_images_are_refused(tmp_path: Path) -> None:
    data = archive(tmp_path / "colours.npz", (28, 28, 3))
    assert_refused(invoke(*command(data, tmp_path / "out")), "digits-minority takes grey images of at most 10 classes")


def test_the_bundled_classifier_leads_to_what_its_model_reconstructs_badly() -> None:
    """From the same noises: common digits, unguided ones, rare ones; most stay the digit asked for."""
    assert (BUNDLED_MINORITY / "model.safetensors").stat().st_size <= 2e6
    model = MinorityClassifier.bundled()
    assert model.config["classes"] == 10
    pipeline = load_model("digits-small", "float32", "cpu").pipeline
    pipeline.scheduler = DPMSolverPPScheduler.from_config(pipeline.scheduler.config)
    extractor, labels = DigitsClassifier.bundled(), torch.arange(40) % 10
    scores, kept = [], []
    for target, scale in ((0, 1.0), (9, 0.0), (9, 1.0)):
        pipeline.scheduler.guide(MinorityGuidance(model, target, scale))
        images = pipeline(
            class_labels=labels.tolist(),
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(k) for k in range(40)],
            num_inference_steps=10,
            output_type="pt",
        ).images
        with torch.no_grad():
            images = images * 2.0 - 1.0
            kept.append(extractor(images).argmax(1) == labels)
            latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
        made = LabelledImages(images, labels, tuple("0123456789"))
        scores.append(score_images(pipeline, extractor, made, latents).log())
    # Where all three are what was asked for: another digit would be rare by mistake.
    digits = torch.stack(kept).all(0)
    assert float(digits.float().mean()) >= 0.7
    means = [float(score[digits].mean()) for score in scores]
    assert means[0] + 0.1 < means[1] < means[2] - 0.1
