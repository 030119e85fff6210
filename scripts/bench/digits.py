"""How good the images of a digit model are: distance, inception score, and whether they are the digits asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from tqdm import tqdm

from fewstep.metrics import (
    DigitsClassifier,
    FeatureStatistics,
    ReferenceStatistics,
    class_agreement,
    frechet_distance,
    inception_score,
)

from ..training.data import LabelledImages, load_images


def measure(
    pipeline: DiTPipeline,
    classifier: DigitsClassifier,
    reference: ReferenceStatistics,
    *,
    steps: int,
    count: int,
    scale: float,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Generates images, the ten classes in turn, and measures them.

    Args:
        pipeline: with the scheduler to be measured.
        classifier: gives features and classes.
        reference: statistics of the same classifier's features.
        steps: sampling steps.
        count: number of images.
        scale: guidance scale; 1 is none.
        batch_size: images at a time; the images depend on it by rounding only.
        seed: of image 0; image ``k`` has ``seed + k``.

    Returns:
        The figures, ready for JSON.
    """
    statistics = FeatureStatistics(classifier.config["feature_size"])
    logits = []
    seconds = 0.0
    for begin in tqdm(range(0, count, batch_size), desc=f"guidance {scale:g}", unit="batch"):
        indices = range(begin, min(begin + batch_size, count))
        clock = time.perf_counter()
        images = generate(pipeline, indices, steps=steps, scale=scale, seed=seed).cpu()
        seconds += time.perf_counter() - clock
        with torch.no_grad():
            features = features_of(classifier, images)
            logits.append(classifier.classify(features))
        statistics.update(features)
    mean, covariance = statistics.compute()
    answers = torch.cat(logits)
    score = inception_score(answers.double().softmax(1))
    agreement = class_agreement(answers, torch.arange(count) % 10)
    return {
        "guidance_scale": scale,
        "frechet_distance": frechet_distance(mean, covariance, reference.mean, reference.covariance),
        "inception_score": score.mean,
        "inception_score_spread": score.spread,
        "class_agreement": agreement.rate,
        "class_agreement_interval": [agreement.low, agreement.high],
        "images_per_second": count / seconds,
    }


def features_of(classifier: DigitsClassifier, images: torch.Tensor) -> torch.Tensor:
    """Features of images in [0, 1], rounded to the 8 bits that the reference was made from."""
    return classifier.features(images.mul(255.0).round().div(127.5).sub(1.0))


def generate(pipeline: DiTPipeline, indices: range, *, steps: int, scale: float, seed: int) -> torch.Tensor:
    """Images ``(B, 1, 32, 32)`` in [0, 1]; number ``k`` is of class ``k % 10`` and depends on ``seed + k`` alone."""
    seeds = [seed + k for k in indices]
    pipeline.scheduler.manual_seed(seeds)  # of stochastic samplers: the pipeline hands them no generator
    images: torch.Tensor = pipeline(
        class_labels=[k % 10 for k in indices],
        guidance_scale=scale,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        num_inference_steps=steps,
        output_type="pt",
    ).images
    return images


def real_digits(path: Path, split: str) -> LabelledImages:
    """Real digits.

    Raises:
        ValueError: no grey images of ten classes.
    """
    found = load_images(path, split=split)
    if found.images.shape[1] != 1 or set(found.labels.tolist()) != set(range(10)):
        raise ValueError(f"--data {path} holds no grey images of the classes 0 to 9 in its {split} split; give MNIST")
    return found


def sampling_bias(reference: ReferenceStatistics, count: int) -> float:
    """How far ``count`` images are from the reference for being few: the mean over 8 draws from its own Gaussian.

    MNIST's features are no Gaussian, but subsets of the test set of 500 to 5000 images lie within 8 % of
    the distances that this predicts.
    """
    generator = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = vectors * values.clamp(min=0.0).sqrt()
    distances = []
    for _ in range(8):
        statistics = FeatureStatistics(len(values))
        normal = torch.randn(count, len(values), generator=generator, dtype=torch.float64)
        statistics.update(normal @ root.T + reference.mean)
        distances.append(frechet_distance(*statistics.compute(), reference.mean, reference.covariance))
    return sum(distances) / len(distances)
