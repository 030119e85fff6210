"""Shared by the sampler tests: known denoisers as networks of any kind, and whole runs of any scheduler over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fewstep.metrics import GaussianMixture

Clean = Callable[[torch.Tensor, float, float], torch.Tensor]

STABLE_DIFFUSION: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR: dict[str, Any] = {
    **STABLE_DIFFUSION,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
EDM: dict[str, Any] = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


def kind_of(scheduler: Any) -> str:
    """``vp``, ``flow`` or ``edm``, of diffusers' schedulers and ours."""
    if scheduler.config.get("sigma_data") is not None:
        return "edm"
    return "flow" if scheduler.config.get("use_flow_sigmas") else "vp"


def alpha_sigma(kind: str, level: float) -> tuple[float, float]:
    """Of a level in the units of ``scheduler.sigmas``."""
    if kind == "flow":
        return 1.0 - level, level
    if kind == "edm":
        return 1.0, level
    alpha = float((1.0 + level**2) ** -0.5)
    return alpha, level * alpha


def output(clean: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float, prediction_type: str) -> torch.Tensor:
    """What a network of a prediction type returns where it means ``clean``."""
    if prediction_type == "sample":
        return clean
    noise = (x - alpha * clean) / sigma
    if prediction_type == "epsilon":
        return noise
    return alpha * noise - sigma * clean if prediction_type == "v_prediction" else noise - clean


def edm_output(clean: torch.Tensor, x: torch.Tensor, sigma: float, sigma_data: float, sign: float) -> torch.Tensor:
    """``F`` of arXiv 2206.00364, equation 7; ``sign`` is -1 for diffusers' v prediction."""
    total = sigma**2 + sigma_data**2
    return (clean - sigma_data**2 / total * x) * total**0.5 / (sign * sigma * sigma_data)


def tanh_denoiser(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """A bounded, curved denoiser for comparisons of two implementations."""
    return 1.6 * torch.tanh(1.3 * alpha / (alpha**2 + sigma**2) * x + 0.1)


def sample(
    scheduler: Any,
    x: torch.Tensor,
    clean: Clean = tanh_denoiser,
    *,
    begin: int | None = None,
    seed: int | None = None,
    stop: int | None = None,
    levels: list[float] | None = None,
) -> torch.Tensor:
    """The loop of a pipeline over an ideal network.

    Args:
        scheduler: with its timesteps set.
        x: noisy sample where the run starts.
        clean: the denoiser.
        begin: start at this entry of ``timesteps``, as image to image does.
        seed: of the generator of stochastic schedulers.
        stop: number of calls, all by default.
        levels: receives the noise level of each call.
    """
    kind, prediction_type = kind_of(scheduler), scheduler.config.prediction_type
    extra = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
    if begin is not None:
        scheduler.set_begin_index(begin)
    for i, t in list(enumerate(scheduler.timesteps))[begin or 0 : stop]:
        level = float(scheduler.sigmas[i])
        alpha, sigma = alpha_sigma(kind, level)
        if levels is not None:
            levels.append(level)
        if kind == "edm":
            sigma_data = scheduler.config.sigma_data
            seen = scheduler.scale_model_input(x, t) * (level**2 + sigma_data**2) ** 0.5
            sign = -1.0 if prediction_type == "v_prediction" else 1.0
            u = edm_output(clean(seen, alpha, sigma), seen, sigma, sigma_data, sign)
        else:
            u = output(clean(x, alpha, sigma), x, alpha, sigma, prediction_type)
        x = scheduler.step(u, t, x, return_dict=False, **extra)[0]
    return x


class Truth:
    """Exact end points of probability flow trajectories of a mixture, each solved once.

    Args:
        mixture: the data.
        batch: number of trajectories.
    """

    def __init__(self, mixture: GaussianMixture, batch: int = 8) -> None:
        self.mixture = mixture
        generator = torch.Generator().manual_seed(11)
        self.noise = torch.randn(batch, mixture.means.shape[1], generator=generator, dtype=torch.float64)
        self._solved: dict[tuple[str, float, float], torch.Tensor] = {}

    def start(self, kind: str, level: float) -> torch.Tensor:
        """A sample of the prior at a level, as pipelines make it: pure noise of the right scale."""
        alpha, sigma = alpha_sigma(kind, level)
        return self.noise * float((alpha**2 + sigma**2) ** 0.5 if kind != "flow" else sigma)

    def end(self, kind: str, first: float, last: float) -> torch.Tensor:
        """Where the trajectory from ``start(kind, first)`` stands at level ``last``."""
        key = (kind, round(first, 9), round(last, 9))
        if key not in self._solved:
            alpha, sigma = alpha_sigma(kind, first)
            ends = alpha_sigma(kind, last)
            start = self.start(kind, first)
            self._solved[key] = self.mixture.solve(start, (max(alpha, 1e-9), sigma), ends)
        return self._solved[key]

    def error(self, scheduler: Any, **options: Any) -> float:
        """Root mean square distance of a scheduler's result from the truth at the level where it ends."""
        kind = kind_of(scheduler)
        first, last = float(scheduler.sigmas[0]), float(scheduler.sigmas[-1])
        result = sample(scheduler, self.start(kind, first), self.mixture.clean, **options)
        return float((result - self.end(kind, first, last)).square().mean().sqrt())


def labels(scheduler: Any) -> np.ndarray:
    """``timesteps`` as float64 numbers."""
    values: np.ndarray = scheduler.timesteps.double().numpy()
    return values
