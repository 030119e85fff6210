"""The rewards of a run, from their words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMPipeline

from fewstep.guidance import (
    Reward,
    brightness,
    class_log_probability,
    clip_score,
    compressibility,
    decoder_of,
)
from fewstep.samplers import BranchedDenoiser, Denoiser

from .model import DIGITS, Model
from .steering import RewardWord, Steering, parse_reward

Score = Callable[[torch.Tensor], torch.Tensor]
"""Of images in [0, 1], ``(batch, C, H, W)``, to ``(batch,)``."""


def load_scores(steering: Steering, model: Model) -> list[Score]:
    """A run's rewards, each times its weight.

    Raises:
        ValueError: a reward does not fit the model, or its own model is not there.
    """
    return [_weighted(word.weight, _load(word, model)) for word in map(parse_reward, steering.rewards)]


def _weighted(weight: float, score: Score) -> Score:
    return lambda images: weight * score(images)


def _load(word: RewardWord, model: Model) -> Score:
    if word.name == "brightness":
        return brightness
    if word.name == "compressibility":
        assert word.text is not None
        return compressibility(word.text)
    if word.name == "clip":
        assert word.text is not None
        try:
            score = clip_score(word.text) if word.model is None else clip_score(word.text, word.model)
        except ValueError as error:  # whose last remedy is for Python alone
            raise ValueError(str(error).removesuffix(", or use local_files_only=False")) from error
        return lambda images: score(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
    if model.name not in DIGITS:
        raise ValueError(
            f"reward class:{word.text} needs a classifier of the model's images, and the bundled one knows those of "
            f"{' and '.join(DIGITS)}; for model {model.name!r} take clip:TEXT or another reward"
        )
    from fewstep.metrics import DigitsClassifier  # imports torchmetrics, which takes a while

    assert word.text is not None
    classifier = DigitsClassifier.bundled().to(model.pipeline.device)
    labels = [int(label) for label in word.text.split("+")]
    log_probability: Score = class_log_probability(lambda images: classifier(2.0 * images - 1.0), labels)
    return log_probability


def image_decoder(model: Model, denoiser: Denoiser) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images in [0, 1] from samples; differentiable where the model's autoencoder, or nothing, stands between."""
    vae = getattr(model.pipeline, "vae", None)
    latent = vae is not None and len(denoiser.shape) == 3 and denoiser.shape[0] == vae.config.get("latent_channels")
    if latent or isinstance(model.pipeline, DDPMPipeline):
        return decoder_of(model.pipeline)
    decode = decoder_of(denoiser)
    return lambda samples: decode(whole_batch(denoiser, samples))[: len(samples)]


def whole_batch(denoiser: Denoiser, samples: torch.Tensor) -> torch.Tensor:
    """Samples repeated to the size of the batch that a pipeline needs that is driven as it is."""
    if isinstance(denoiser, BranchedDenoiser):
        return samples
    repeats = -(-denoiser.batch_size // len(samples))
    return torch.cat([samples] * repeats)[: denoiser.batch_size]


class WatchedReward(Reward):
    """The sum of a run's rewards, which notes what it said, and after how many network calls.

    Args:
        scores: of images, at least one.
        model: whose samples are judged.
        denoiser: that counts the calls.
        names: of the scores, for error messages.

    Attributes:
        parts: the rewards that add up.
        history: for each time it was asked, network calls so far and the best and the mean of the values.
    """

    def __init__(self, scores: Sequence[Score], model: Model, denoiser: Denoiser, names: Sequence[str]) -> None:
        decode = image_decoder(model, denoiser)
        self.parts = [Reward(score, decode=decode, name=name) for score, name in zip(scores, names, strict=True)]

        def total(images: torch.Tensor) -> torch.Tensor:
            return torch.stack([score(images).to(images.device) for score in scores]).sum(0)

        super().__init__(total, decode=decode, name=" + ".join(names))
        self._denoiser = denoiser
        self.history: list[dict[str, Any]] = []

    def __call__(self, samples: torch.Tensor, where: str = "the samples") -> torch.Tensor:
        values = super().__call__(samples, where)
        self.note(self._denoiser.evaluations, values)
        return values

    def note(self, network_calls: int, values: torch.Tensor) -> None:
        """Adds to the history."""
        best, mean = float(values.detach().max()), float(values.detach().mean())
        self.history.append({"network_calls": network_calls, "best": best, "mean": mean})

    def value_of(self, sample: torch.Tensor) -> float:
        """Of one sample ``(1, ...)``, unnoted."""
        return float(super().__call__(sample, "the image"))
