"""``fewstep bench digits`` measures what a user's own lines of diffusers would measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.metrics import DigitsClassifier, digits_statistics, frechet_distance, inception_score
from fewstep.samplers import SAMPLERS
from fewstep.scripts.bench.digits import generate, sampling_bias
from fewstep.scripts.generation.model import load_model
from model_folders import assert_refused, invoke, save_class_model, save_unconditional_model

COUNT, STEPS, SEED = 100, 3, 4


def test_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = invoke(
        "bench", "digits", "--model", "digits-small", "--sampler", "unipc", "--steps", STEPS, "--count", COUNT,
        "--guidance-scale", "1,2", "--batch-size", 40, "--seed", SEED, "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads(file.read_text())
    assert [figures["guidance_scale"] for figures in report["results"]] == [1.0, 2.0]
    pipeline = load_model("digits-small", "float32", "cpu").pipeline
    pipeline.scheduler = SAMPLERS["unipc"].build(pipeline.scheduler.config)
    classifier = DigitsClassifier.bundled()
    train = digits_statistics("train", classifier)
    for figures in report["results"]:
        images = pipeline(
            class_labels=[k % 10 for k in range(COUNT)],
            guidance_scale=figures["guidance_scale"],
            generator=[torch.Generator().manual_seed(SEED + k) for k in range(COUNT)],
            num_inference_steps=STEPS,
        ).images
        pixels = np.stack([np.asarray(image) for image in images])
        batch = torch.from_numpy(pixels).float()[:, None] / 127.5 - 1.0
        with torch.no_grad():
            features, logits = classifier.features(batch).double(), classifier(batch)
        score = inception_score(logits.double().softmax(1))
        distance = frechet_distance(features.mean(0), features.T.cov(), train.mean, train.covariance)
        agreement = float((logits.argmax(1) == torch.arange(COUNT) % 10).float().mean())
        assert figures["class_agreement"] == pytest.approx(agreement)
        # A rounded pixel may differ in another batch.
        assert figures["frechet_distance"] == pytest.approx(distance, rel=1e-3)
        assert figures["inception_score"] == pytest.approx(score.mean, rel=1e-3)
    assert report["results"][1]["class_agreement"] > 0.9


@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++"])
def test_images_do_not_depend_on_the_batch(sampler: str) -> None:
    loaded = load_model("digits-small", "float32", "cpu")
    loaded.pipeline.scheduler = SAMPLERS[sampler].build(loaded.scheduler_config)
    whole, part = (generate(loaded.pipeline, r, steps=2, scale=2.0, seed=7) for r in (range(6), range(4, 6)))
    torch.testing.assert_close(whole[4:], part, rtol=0, atol=1e-4)


def test_sampling_bias_is_that_of_a_gaussian() -> None:
    """Few samples lie far from their own distribution, and the distance falls about as 1 / count."""
    train = digits_statistics("train", DigitsClassifier.bundled())
    few, many = sampling_bias(train, 500), sampling_bias(train, 4000)
    assert few / many == pytest.approx(8.0, rel=0.15)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "digits-small", "--sampler", "unipcc"), ("sampler 'unipcc'", "(nearest first) unipc,")),
        (("--model", "digits-small", "--guidance-scale", "0.5"), ("--guidance-scale '0.5'",)),
        (("--model", "digits-small", "--guidance-scale", "1,two"), ("--guidance-scale '1,two'",)),
        (("--model", "digits-small", "--count", "10"), ("--count", "10")),
        (("--model", "digits-small", "--json", "/nowhere/at/all.json"), ("no folder /nowhere/at",)),
        (("--model", "{models}/class"), ("no DiTPipeline of grey images",)),
        (("--model", "{models}/plain"), ("no DiTPipeline of grey images",)),
        (("--model", "nowhere"), ("'nowhere' is neither",)),
    ],
)
def test_bad_words(tmp_path: Path, words: tuple[str, ...], said: tuple[str, ...]) -> None:
    save_class_model(tmp_path / "class")
    save_unconditional_model(tmp_path / "plain")
    assert_refused(invoke("bench", "digits", *(word.replace("{models}", str(tmp_path)) for word in words)), *said)
