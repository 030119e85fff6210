"""The recipe of the classifier that tells rare digits from common ones, in the noise of the bundled models."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fewstep.guidance import MinorityClasses, MinorityClassifier, feature_distance, minority_scores
from fewstep.metrics import DigitsClassifier
from fewstep.samplers import DPMSolverPPScheduler
from fewstep.samplers.files import replaced

from .autoencoder import encode
from .data import LabelledImages
from .loop import train

CLASSES = 10
TIMESTEP = 600
"""Noise level of the scores, as in arXiv 2301.12334: of the levels tried, with it they agree best with the distance to
the nearest neighbours."""
DRAWS = 3
NOISE_LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""``sigma / alpha`` at which the accuracy is reported."""


def score_images(
    pipeline: DiTPipeline, extractor: DigitsClassifier, data: LabelledImages, latents: torch.Tensor, *, seed: int = 0
) -> torch.Tensor:
    """Minority scores of images, each as one of its class.

    Args:
        pipeline: class-conditional model of the images' latents.
        extractor: whose features are compared.
        data: images with the pipeline's labels.
        latents: of the images, ``(count, 4, h, w)``.
        seed: of the noises.

    Returns:
        ``(count,)``, float64.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    scheduler = DPMSolverPPScheduler.from_config(pipeline.scheduler.config)
    distance = feature_distance(extractor.features)
    scores = []
    for begin in tqdm(range(0, len(data), 500), desc="minority scores", mininterval=5):
        part = slice(begin, begin + 500)
        labels = data.labels[part]

        def network(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
            output: torch.Tensor = transformer(x, t.expand(len(x)), labels).sample
            return output[:, : x.shape[1]]

        scores.append(
            minority_scores(
                network,
                scheduler,
                latents[part],
                timestep=TIMESTEP,
                draws=DRAWS,
                distance=distance,
                decode=lambda z: vae.decode(z / vae.config.scaling_factor).sample,
                seed=seed + begin,
            )
        )
    return torch.cat(scores)


def train_minority(
    data: LabelledImages,
    test: LabelledImages,
    pipeline: DiTPipeline,
    extractor: DigitsClassifier,
    work: Path,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
    save_every: int = 500,
) -> tuple[MinorityClassifier, dict[str, float], dict[str, float]]:
    """Scores images by how badly a model reconstructs them, cuts each digit's scores into ten classes, learns them.

    As every digit has as many images in each class, guidance by the classifier favours none.

    Args:
        data: images of the model's classes.
        test: to measure the classifier with.
        pipeline: the model, with its autoencoder.
        extractor: of features of its images.
        work: folder of the checkpoint and of the scores.
        steps: optimiser steps.
        batch_size: images a step.
        learning_rate: peak of AdamW.
        seed: of noises, weights and draws.
        save_every: steps between checkpoints.

    Returns:
        The classifier; the loop's record; its accuracy on the test images by noise level, where chance is 0.1.
    """
    vae, alphas_cumprod = pipeline.vae, pipeline.scheduler.alphas_cumprod
    encoded, classes = [], []
    cuts: MinorityClasses | None = None
    for name, part in (("train", data), ("test", test)):
        means, stds = encode(vae, part)
        kept = work / f"scores-{name}.safetensors"
        if kept.exists():
            scores = load_file(kept)["scores"]
        else:
            scores = score_images(pipeline, extractor, part, means, seed=seed)
            with replaced(kept) as partial:
                save_file({"scores": scores}, partial)
        cuts = cuts or MinorityClasses.of(scores, CLASSES, part.labels)
        encoded.append((means, stds))
        classes.append(cuts.labels(scores, part.labels))
    (means, stds), targets = encoded[0], classes[0]
    torch.manual_seed(seed)
    classifier = MinorityClassifier(means.shape[1], means.shape[2], CLASSES)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(data), (batch_size,), generator=generator)
        latents = means[index] + stds[index] * torch.randn(means[index].shape, generator=generator)
        # One stratum a sample: timesteps cover the range evenly in every batch.
        uniform = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        signal = alphas_cumprod[(uniform * len(alphas_cumprod)).long()]
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        noise = torch.randn(latents.shape, generator=generator)
        seen = alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
        return F.cross_entropy(classifier(seen, alpha, sigma), targets[index])

    record = train(
        classifier,
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.05,
        average=0.998,
        checkpoint=work / "minority.safetensors",
        save_every=save_every,
        seed=seed,
    )
    found = {f"accuracy_at_{rho:g}": noisy_accuracy(classifier, encoded[1][0], classes[1], rho) for rho in NOISE_LEVELS}
    return classifier, {**record, "images": steps * batch_size}, found


@torch.no_grad()
def noisy_accuracy(classifier: MinorityClassifier, latents: torch.Tensor, classes: torch.Tensor, rho: float) -> float:
    """Share of latents with noise of ``sigma / alpha = rho`` whose largest logit is their class."""
    alpha = (1.0 + rho * rho) ** -0.5
    sigma = rho * alpha
    generator = torch.Generator().manual_seed(0)
    correct = 0
    for part, truth in zip(latents.split(500), classes.split(500), strict=True):
        noise = torch.randn(part.shape, generator=generator)
        correct += int((classifier(alpha * part + sigma * noise, alpha, sigma).argmax(1) == truth).sum())
    return correct / len(latents)
