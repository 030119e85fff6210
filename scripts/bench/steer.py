"""Steering of an unconditional digit model towards some of the digits: methods at equal numbers of network calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiTPipeline

from fewstep.guidance import decoder_of
from fewstep.metrics import DigitsClassifier
from fewstep.samplers import SAMPLERS, Denoiser, sample

from ..generation.model import load_model
from .steer_methods import METHODS, NOISES, Sampling, class_reward
from .steer_reference import Reference

TARGETS: Mapping[str, tuple[int, ...]] = {
    **{str(digit): (digit,) for digit in range(10)},
    "even": (0, 2, 4, 6, 8),
    "odd": (1, 3, 5, 7, 9),
}
"""Classes of each target."""

REFERENCES = ("real", "conditional")
"""Real images, and the model told the classes: what steering can come to."""

_CHUNK = 50


@dataclass(frozen=True)
class Settings:
    """What all points have in common.

    Attributes:
        model: a bundled name or a folder.
        data: SHA-256 of the training images.
        sampler: name of a stochastic sampler.
        steps: of a run.
        count: images of a point.
        scale: inverse temperature of the methods that have one.
        device: cpu, cuda or mps.
    """

    model: str
    data: str
    sampler: str
    steps: int
    count: int
    scale: float
    device: str


@dataclass(frozen=True)
class Point:
    """The images of one method, budget and seed.

    Attributes:
        target: key of ``TARGETS``.
        method: key of ``METHODS``, or one of ``REFERENCES``.
        runs: budget an image, in whole runs of the sampler; 0 of real images.
        seed: of everything random.
        calls: network evaluations for all images together, a sample of a batch each, as the denoisers counted them.
        figures: by the keys of ``MEASURES``.
    """

    target: str
    method: str
    runs: int
    seed: int
    calls: int
    figures: Mapping[str, float]


class Bench:
    """A digit model, and real digits.

    Args:
        settings: of the measurement.
        reference: real digits.
        batch_size: samples at a time, where a method leaves the choice.

    Raises:
        ValueError: the model is no pipeline of digits, or the sampler draws no noise.
    """

    def __init__(self, settings: Settings, reference: Reference, batch_size: int) -> None:
        self.settings, self._reference, self._batch_size = settings, reference, batch_size
        model = load_model(settings.model, "float32", settings.device)
        grey = isinstance(model.pipeline, DiTPipeline) and model.pipeline.vae.config.out_channels == 1
        if not grey or model.classes[:10] != tuple(range(10)):
            raise ValueError(f"--model {model.name} is no DiTPipeline of digits; give one of classes 0 to 9")
        scheduler = SAMPLERS[settings.sampler].build(model.scheduler_config)
        scheduler.set_timesteps(settings.steps)
        if not scheduler.plan.is_stochastic:
            raise ValueError(f"--sampler {settings.sampler} draws no noise, so that copies never part; use sde-dpm++")
        self._pipeline = model.pipeline
        self._pipeline.vae.requires_grad_(False)
        self._decode = decoder_of(self._pipeline)
        self._classifier = DigitsClassifier.bundled().requires_grad_(False).to(settings.device)

    def measure(self, target: str, method: str, runs: Sequence[int], seed: int) -> Iterator[Point]:
        """The points of one method, target and seed, by rising budgets.

        Args:
            target: key of ``TARGETS``.
            method: key of ``METHODS``, or one of ``REFERENCES``.
            runs: budgets.
            seed: of everything random.
        """
        if method == "real":
            images = self._reference.real(target, self.settings.count, seed)
            yield Point(
                target, method, 0, seed, 0, {**self._reference.figures(target, images), "distinct": len(images)}
            )
        elif method == "conditional":
            latents, calls = self._told(TARGETS[target], seed)
            yield Point(target, method, 1, seed, calls, self._figures(target, latents))
        else:
            sampling = self.sampling(target, seed)
            for budget, latents in METHODS[method](sampling, sorted(runs)):
                yield Point(target, method, budget, seed, sampling.calls, self._figures(target, latents))

    def sampling(self, target: str, seed: int) -> Sampling:
        """The unconditional model with the log-probability of the target as reward."""
        settings = self.settings
        return Sampling(
            self._pipeline,
            class_reward(self._pipeline, self._classifier, TARGETS[target], f"class {target}"),
            sampler=settings.sampler,
            steps=settings.steps,
            count=settings.count,
            scale=settings.scale,
            seed=seed,
            batch_size=self._batch_size,
        )

    def _told(self, classes: Sequence[int], seed: int) -> tuple[torch.Tensor, int]:
        """Latents of the class-conditional model, the classes in turn, and the network evaluations."""
        settings = self.settings
        labels = [classes[k % len(classes)] for k in range(settings.count)]
        denoiser = Denoiser.from_pipeline(self._pipeline, class_labels=labels, guidance_scale=1.0)
        scheduler = SAMPLERS[settings.sampler].build(self._pipeline.scheduler.config)
        generators = [torch.Generator().manual_seed(seed * NOISES + k) for k in range(settings.count)]
        return sample(denoiser, scheduler, settings.steps, generator=generators), denoiser.evaluations

    @torch.no_grad()
    def _figures(self, target: str, latents: torch.Tensor) -> dict[str, float]:
        images = torch.cat([self._decode(part) for part in latents.split(_CHUNK)]).cpu()
        rounded = images.mul(255.0).round().div(127.5).sub(1.0)
        return {**self._reference.figures(target, rounded), "distinct": len(latents.unique(dim=0))}
