"""The recipe of the classifier that the digit metrics take their features from."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from fewstep.metrics import DigitsClassifier, FeatureStatistics, ReferenceStatistics

from .data import LabelledImages
from .loop import train


def train_classifier(
    data: LabelledImages, work: Path, *, steps: int, batch_size: int = 128, seed: int = 0, save_every: int = 500
) -> tuple[DigitsClassifier, dict[str, float]]:
    """Trains the classifier on lightly deformed images with cross entropy.

    Args:
        data: 32 x 32 images.
        work: folder of the checkpoint.
        steps: optimiser steps.
        batch_size: images a step.
        seed: of the initial weights and of every draw.
        save_every: steps between checkpoints.

    Returns:
        The classifier, whose weights are the moving average, and the loop's record.
    """
    torch.manual_seed(seed)
    classifier = DigitsClassifier(channels=data.images.shape[1], classes=len(data.names))

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(data), (batch_size,), generator=generator)
        images = deform(data.float_images(index), generator)
        return F.cross_entropy(classifier(images), data.labels[index])

    record = train(
        classifier,
        loss_of,
        steps=steps,
        learning_rate=2e-3,
        weight_decay=0.05,
        average=0.998,
        checkpoint=work / "classifier.safetensors",
        save_every=save_every,
        seed=seed,
    )
    return classifier, {**record, "images": steps * batch_size}


def deform(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotates by up to 14 degrees, scales by up to 12 %, shears a little and shifts by up to 2 pixels.

    Args:
        images: ``(B, C, H, W)`` in [-1, 1]; what comes in from outside the frame is black (-1).
        generator: of the deformations, one an image.
    """
    draw = torch.rand(len(images), 5, generator=generator) * 2.0 - 1.0
    angle, scale = draw[:, 0] * math.radians(14.0), torch.exp(draw[:, 1] * 0.12)
    shear, shift = draw[:, 2] * 0.15, draw[:, 3:] * (4.0 / images.shape[-1])
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, shear - sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1.0, grid, align_corners=False) - 1.0


@torch.no_grad()
def accuracy(classifier: DigitsClassifier, data: LabelledImages) -> float:
    """Share of images whose largest logit is their label."""
    correct = sum(
        int((classifier(data.float_images(slice(k, k + 500))).argmax(1) == data.labels[k : k + 500]).sum())
        for k in range(0, len(data), 500)
    )
    return correct / len(data)


@torch.no_grad()
def reference_statistics(classifier: DigitsClassifier, data: LabelledImages) -> ReferenceStatistics:
    """Mean and covariance of the features of all images."""
    statistics = FeatureStatistics(classifier.config["feature_size"])
    for k in range(0, len(data), 500):
        statistics.update(classifier.features(data.float_images(slice(k, k + 500))))
    mean, covariance = statistics.compute()
    return ReferenceStatistics(
        mean,
        covariance,
        statistics.count,
        extractor=classifier.fingerprint,
        data=data.fingerprint,
        preprocessing="uint8 32 x 32, smaller images padded with black; x / 127.5 - 1",
    )
