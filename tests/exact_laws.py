"""Distributions that are known exactly, and runs of schedulers and searches over their ideal networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from analytic import network_of
from fewstep.guidance import NoiseSearch
from fewstep.metrics import GaussianMixture
from fewstep.samplers import Denoiser, DPMSolverPPScheduler, PlanScheduler
from fewstep.samplers.denoisers.denoiser import Start


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


FIRST = GaussianMixture(tensor([[-2.0], [0.5], [3.0]]), tensor([0.5, 0.3, 0.8]), tensor([0.3, 0.2, 0.5]))
SECOND = GaussianMixture(tensor([[-1.0], [2.0]]), tensor([0.7, 0.6]), tensor([0.5, 0.5]))
CUTS = (-0.8, 1.4)
"""Between the modes of the first."""


def run(
    scheduler: PlanScheduler,
    mixture: Any,
    batch: int,
    seed: int = 0,
    network: Any = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The loop of a pipeline over an ideal network."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, mixture.means.shape[1], generator=generator, dtype=dtype)
    x = x * float(scheduler.init_noise_sigma)
    network = network or network_of(scheduler, mixture.clean)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, t), t, x, generator=generator, return_dict=False)[0]
    return x


def log_density(mixture: GaussianMixture, x: np.ndarray, variance: float = 0.0) -> np.ndarray:
    """Of a one-dimensional mixture with noise of a variance added."""
    total = mixture.stds.numpy() ** 2 + variance
    away = x[:, None] - mixture.means.numpy()[:, 0]
    terms = np.log(mixture.weights.numpy()) - 0.5 * away**2 / total - 0.5 * np.log(2 * math.pi * total)
    return np.logaddexp.reduce(terms, axis=1)


class GridLaw:
    """A one-dimensional law by its unnormalised log-density on a fine grid."""

    def __init__(self, log_p: Callable[[np.ndarray], np.ndarray], reach: float = 10.0) -> None:
        self.x = np.linspace(-reach, reach, 80001)
        values = log_p(self.x)
        top = values.max()
        weights = np.exp(values - top)
        self.log_z = float(top + np.log(weights.sum() * (self.x[1] - self.x[0])))
        self.p = weights / weights.sum()
        self.mean = float(self.p @ self.x)
        self.variance = float(self.p @ self.x**2) - self.mean**2

    def shares(self, cuts: tuple[float, ...] = CUTS) -> np.ndarray:
        return np.bincount(np.searchsorted(cuts, self.x), self.p, len(cuts) + 1)

    def divergence(self, samples: torch.Tensor, bins: int = 40) -> float:
        """KL of the samples' histogram from the law, over bins within six standard deviations."""
        reach = 6.0 * self.variance**0.5
        edges = np.linspace(self.mean - reach, self.mean + reach, bins + 1)
        truth = np.bincount(np.searchsorted(edges, self.x), self.p, bins + 2)
        found = np.bincount(np.searchsorted(edges, samples.flatten().numpy()), minlength=bins + 2) / len(samples)
        filled = found > 0
        return float((found[filled] * np.log(found[filled] / np.maximum(truth[filled], 1e-12))).sum())


def shares(groups: torch.Tensor, cuts: tuple[float, ...] = CUTS) -> torch.Tensor:
    """Share of the samples between the cuts, ``(groups, modes)``, of samples ``(groups, particles)``."""
    modes = torch.bucketize(groups, tensor(cuts))
    return torch.stack([(modes == k).double().mean(1) for k in range(len(cuts) + 1)], dim=1)


def deviation(values: torch.Tensor, truth: Any) -> float:
    """Of the mean over independent rows, in standard errors; the largest over the columns."""
    error = values.std(0) / math.sqrt(len(values))
    return float(((values.mean(0) - torch.as_tensor(truth, dtype=torch.float64)).abs() / error).max())


STANDARD = GaussianMixture(tensor([[0.0] * 8]), tensor([1.0]), tensor([1.0]))


class ExactDenoiser(Denoiser):
    """The ideal network of a mixture, as a denoiser of any batch."""

    def __init__(self, batch_size: int, mixture: GaussianMixture = STANDARD, **options: Any) -> None:
        self._batch_size, self.mixture = batch_size, mixture
        self.scheduler_config = DPMSolverPPScheduler(timestep_spacing="trailing", **options).config
        self._network = network_of(DPMSolverPPScheduler.from_config(self.scheduler_config), mixture.clean)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.mixture.means.shape[1],)

    def __call__(self, x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        self._count(x)
        return self._network(x, torch.as_tensor(t)).to(x.dtype)

    def prepare(self, scheduler: Any, num_inference_steps: int, *, generator: Any = None, latents: Any = None) -> Start:
        scheduler.set_timesteps(num_inference_steps)
        return Start(latents * scheduler.init_noise_sigma, scheduler.timesteps)

    def noise(self, generator: Any = None) -> torch.Tensor:
        return torch.randn(self.batch_size, *self.shape, generator=generator)

    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        return latents


def first(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def searching(
    search: type[NoiseSearch], denoiser: Denoiser, reward: Any = first, steps: int = 6, **options: Any
) -> Any:
    scheduler = DPMSolverPPScheduler.from_config(denoiser.scheduler_config)
    return search(denoiser, scheduler, steps, reward, **{"candidates": 4, **options})
