"""Restoration by mean-reverting diffusion: quality against network calls, the MR Sampler beside older samplers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from fewstep.metrics import DigitsClassifier, Estimate, FeatureStatistics, frechet_distance, jackknife
from fewstep.samplers import MRSamplerScheduler, RestorationPipeline

from ..generation.model import load_model
from ..training.data import load_images
from ..training.degradation import degrade
from . import reverse_sde

Restore = Callable[[RestorationPipeline, torch.Tensor, int, Sequence[torch.Generator]], torch.Tensor]

# Generators read 32 bits of a seed; images and runs of one seed must not share their noise.
_RUNS = 2**31


@dataclass(frozen=True)
class Measure:
    """A figure of merit.

    Attributes:
        title: with its unit.
        best: 1 where more is better, -1 where less is.
        digits: behind the decimal point.
    """

    title: str
    best: int
    digits: int


MEASURES = {
    "psnr": Measure("PSNR (dB)", 1, 2),
    "ssim": Measure("SSIM", 1, 4),
    "feature": Measure("feature distance", -1, 3),
    "frechet": Measure("Frechet distance", -1, 3),
}


def _solver(solver: str, **options: Any) -> Restore:
    def restore(
        pipeline: RestorationPipeline, image: torch.Tensor, steps: int, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        pipeline.scheduler = MRSamplerScheduler.from_config(
            pipeline.scheduler.config, solver=solver, solver_options=options, final_sigmas_type="zero"
        )
        images: torch.Tensor = pipeline(image, steps, list(generators), output_type="pt", return_dict=False)[0]
        return images

    return restore


def _reverse_sde(step: reverse_sde.Step) -> Restore:
    return lambda pipeline, image, steps, generators: reverse_sde.restore(pipeline, step, image, steps, generators)


_ODE, _SDE = "dpmsolver++", "sde-dpmsolver++"
METHODS: Mapping[str, Restore] = {
    "euler": _reverse_sde(reverse_sde.euler_step),
    "posterior": _reverse_sde(reverse_sde.posterior_step),
    **{f"mr-sde-{n}": _solver("dpm++-heun", algorithm_type=_SDE, solver_order=n) for n in (1, 2, 3)},
    **{f"mr-ode-{n}": _solver("dpm++-heun", algorithm_type=_ODE, solver_order=n) for n in (1, 2, 3)},
    "unipc": _solver("unipc"),
}
"""The samplers that IR-SDE came with, the MR Sampler by equation and order, and UniPC on the residual."""

BASELINES = ("euler", "posterior")


@dataclass(frozen=True)
class Settings:
    """What the points of one table have in common.

    Attributes:
        model: a bundled name or a folder.
        data: SHA-256 of the test images.
        count: how many of them, evenly spaced.
        seed: image ``k`` is degraded by ``seed + k``.
        device: cpu, cuda or mps.
    """

    model: str
    data: str
    count: int
    seed: int
    device: str


@dataclass(frozen=True)
class Point:
    """The images of one method at one number of calls.

    Attributes:
        method: key of ``METHODS``, or ``degraded`` for what the methods start from.
        calls: of the network, an image.
        figures: by the keys of ``MEASURES``.
    """

    method: str
    calls: int
    figures: Mapping[str, Estimate]


class Bench:
    """Degraded test images, and what restorations of them are held against.

    Args:
        settings: of the measurement.
        data: path of the images.
        batch_size: images at a time.

    Raises:
        ValueError: no restoration model of grey images, or too few images.
    """

    def __init__(self, settings: Settings, data: Path, batch_size: int) -> None:
        self.settings, self.batch_size = settings, batch_size
        model = load_model(settings.model, "float32", settings.device)
        if model.kind != "restoration" or model.pipeline.unet.config.out_channels != 1:
            raise ValueError(f"--model {model.name} restores no grey images; use digits-restore or the like")
        self._pipeline = model.pipeline
        images = load_images(data, split="test").images
        if images.shape[1] != 1 or len(images) < settings.count:
            raise ValueError(
                f"--data {data} has {len(images)} test images of {images.shape[1]} channels; "
                f"needed are {settings.count} grey ones"
            )
        self._clean = images[torch.arange(settings.count) * len(images) // settings.count].float() / 255.0
        self._seeds = [settings.seed + k for k in range(settings.count)]
        # As they would be read from files.
        self._degraded = _eight_bits(degrade(self._clean, self._seeds))
        self._classifier = DigitsClassifier.bundled()
        self._clean_features = self._features(self._clean)

    def degraded(self) -> Point:
        """The images that all methods start from."""
        return Point("degraded", 0, self._figures(self._degraded))

    def measure(self, method: str, calls: int) -> Point:
        """Restores all images and measures them."""
        restored = []
        for begin in tqdm(range(0, len(self._clean), self.batch_size), desc=f"{method}, {calls}", leave=False):
            part = slice(begin, begin + self.batch_size)
            generators = [torch.Generator().manual_seed(_RUNS + seed) for seed in self._seeds[part]]
            restored.append(METHODS[method](self._pipeline, self._degraded[part], calls, generators).cpu())
        return Point(method, calls, self._figures(_eight_bits(torch.cat(restored))))

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._classifier.features(part * 2.0 - 1.0) for part in images.split(500)]).double()

    def _figures(self, images: torch.Tensor) -> dict[str, Estimate]:
        errors = (images - self._clean).square().mean((1, 2, 3)).double()
        similarity = structural_similarity_index_measure(images, self._clean, data_range=1.0, reduction="none")
        assert isinstance(similarity, torch.Tensor)
        features = self._features(images)
        # An image that is restored without error has no finite ratio; a millionth is far below 8 bits.
        values = {
            "psnr": -10.0 * torch.log10(errors.clamp(min=1e-6)),
            "ssim": similarity.double(),
            "feature": (features - self._clean_features).norm(dim=1),
        }
        statistics = {name: functools.partial(_mean, of) for name, of in values.items()}
        distance = functools.partial(_distance, features, self._clean_features)
        return {
            name: jackknife(statistic, len(images)) for name, statistic in {**statistics, "frechet": distance}.items()
        }


def _eight_bits(images: torch.Tensor) -> torch.Tensor:
    return images.mul(255.0).round().div(255.0)


def _mean(values: torch.Tensor, kept: torch.Tensor) -> float:
    return float(values[kept].mean())


def _distance(features: torch.Tensor, clean: torch.Tensor, kept: torch.Tensor) -> float:
    statistics: list[torch.Tensor] = []
    for chosen in (features[kept], clean[kept]):
        gathered = FeatureStatistics(chosen.shape[1])
        gathered.update(chosen)
        statistics.extend(gathered.compute())
    return frechet_distance(*statistics)
