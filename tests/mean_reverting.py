"""Runs of the MR Sampler with networks that know alpha and sigma, and a Gaussian whose flow is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fewstep.samplers.mr_sampler import MRSamplerScheduler

SIGMA_INF = 50 / 255
RELEASED: dict[str, Any] = {"mr_sampler_tables": True, "final_sigmas_type": "sigma_min"}
FORMS = {
    "ode-d": "dpmsolver++",
    "ode-n": "dpmsolver",
    "sde-d": "sde-dpmsolver++",
    "sde-n": "sde-dpmsolver",
}

Network = Callable[[torch.Tensor, float, float], torch.Tensor]
"""The network's output for a sample, alpha and sigma (with sigma_inf in it)."""


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def mr_sampler(form: str = "ode-d", order: int = 2, **options: Any) -> MRSamplerScheduler:
    own = {"algorithm_type": FORMS[form], "solver_order": order, "lower_order_final": False}
    return MRSamplerScheduler(**{**options, "solver_options": {**own, **options.get("solver_options", {})}})


def nodes(scheduler: MRSamplerScheduler) -> list[tuple[float, float]]:
    """alpha and sigma, with sigma_inf in it, at every call and at the end."""
    plan = scheduler.plan
    ends = [(call.alpha, call.sigma) for call in plan] + [(plan.final_alpha, plan.final_sigma)]
    return [(alpha, scheduler.config.sigma_inf * sigma) for alpha, sigma in ends]


def run(
    scheduler: MRSamplerScheduler,
    network: Network,
    mu: torch.Tensor,
    x: torch.Tensor,
    noises: list[torch.Tensor] | None = None,
    calls: int | None = None,
) -> torch.Tensor:
    scheduler.set_condition(mu)
    for i, (t, (alpha, sigma)) in enumerate(zip(scheduler.timesteps[:calls], nodes(scheduler), strict=False)):
        noise = None if noises is None else noises[i]
        x = scheduler.step(network(x, alpha, sigma), t, x, variance_noise=noise, return_dict=False)[0]
    return x


def gaussian_noise(mu: float, mean: float = 0.7, deviation: float = 0.02) -> Network:
    """The exact noise prediction for clean images from a Gaussian."""

    def network(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        return sigma * (x - alpha * mean - (1 - alpha) * mu) / (alpha**2 * deviation**2 + sigma**2)

    return network


def gaussian_end(start: torch.Tensor, first: tuple[float, float], last: tuple[float, float], mu: float) -> torch.Tensor:
    """The exact probability flow for it."""
    means = [alpha * 0.7 + (1 - alpha) * mu for alpha, _ in (first, last)]
    deviations = [math.hypot(alpha * 0.02, sigma) for alpha, sigma in (first, last)]
    return means[1] + deviations[1] / deviations[0] * (start - means[0])
