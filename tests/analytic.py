"""Models whose exact runs are known, as networks of any kind, and whole runs of plans and schedulers over them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from fewstep.metrics import GaussianMixture
from fewstep.samplers import NoiseSchedule, Plan
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.grid import Grid
from fewstep.samplers.schedule import Array

EPSILON = sys.float_info.epsilon

Clean = Callable[[torch.Tensor, float, float], torch.Tensor]
"""The clean prediction at a sample, its signal coefficient and its noise coefficient."""

STABLE_DIFFUSION: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR: dict[str, Any] = {
    **STABLE_DIFFUSION,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
EDM: dict[str, Any] = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}

# The one-dimensional mixture of the published golden values.
MIXTURE = GaussianMixture(
    *(torch.tensor(v, dtype=torch.float64) for v in ([[-1.0], [0.8]], [0.25, 0.4], [0.4, 0.6]))  # type: ignore[arg-type]
)


class LinearVPSchedule(NoiseSchedule):
    """The continuous linear schedule of arXiv 2011.13456, beta from 0.1 to 20; levels are sigma / alpha."""

    kind = "vp"
    num_train_timesteps = 1000
    beta_0, beta_1 = 0.1, 20.0

    def __init__(self) -> None:
        self.max_level, self.min_level = float(self.level(1000.0)), float(self.level(1.0))

    def alpha_sigma(self, level: ArrayLike) -> tuple[Array, Array]:
        rho = np.asarray(level, np.float64)
        return 1 / np.sqrt(1 + rho**2), rho / np.sqrt(1 + rho**2)

    def level_of_rho(self, rho: float) -> float:
        return rho

    def time(self, level: ArrayLike) -> Array:
        q = 2 * (self.beta_1 - self.beta_0) * np.log1p(np.asarray(level, np.float64) ** 2)
        return np.asarray(q / (np.sqrt(self.beta_0**2 + q) + self.beta_0) / (self.beta_1 - self.beta_0))

    def timestep(self, level: ArrayLike) -> Array:
        return 1000.0 * self.time(level)

    def level(self, timestep: ArrayLike) -> Array:
        t = np.asarray(timestep, np.float64) / 1000.0
        return np.asarray(np.sqrt(np.expm1(t**2 * (self.beta_1 - self.beta_0) / 2 + t * self.beta_0)))

    def rho_of_time(self, lower: float, upper: float) -> tuple[Array, Array, Array]:
        points, weights = np.polynomial.legendre.leggauss(64)
        t = (lower + upper) / 2 + (upper - lower) / 2 * points
        rho = self.level(1000.0 * t)
        slope = (self.beta_0 + t * (self.beta_1 - self.beta_0)) / 2 * (rho**2 + 1) / rho
        ends = self.level(1000.0 * np.array([lower, upper]))
        return t, (upper - lower) / 2 * weights * slope, np.asarray(ends[1] - ends[0])


def lambda_grid(half_logsnr: ArrayLike, schedule: NoiseSchedule | None = None) -> Grid:
    """A grid through the given half log-SNRs; the first may be minus and the last plus infinity."""
    schedule = schedule or LinearVPSchedule()
    levels = np.array([schedule.level_of_rho(math.exp(-value)) for value in np.asarray(half_logsnr)])
    return Grid.of(schedule, levels, schedule.timestep(levels[:-1]))


def run(plan: Plan, x: torch.Tensor, clean: Clean = MIXTURE.clean, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Executes a plan made for clean-sample models."""
    execution = PlanRun(plan)
    for call in plan:
        x, _ = execution.step(x, clean(x, call.alpha, call.sigma), noise)
    return x


def rounding(plan: Plan, grid: Grid, size: float = 4.0) -> list[float]:
    """How far float64 rounding may take each call's sample, and the result, from a straight line.

    A running error analysis: what a conversion or a row rounds, it hands on. A noise prediction divides the
    sample's error by sigma, so stages near ``sigma_min`` hand on a multiple of what the noisy end rounded.

    Args:
        plan: the run, without its noise.
        grid: its times.
        size: bound of clean sample and noise.
    """
    bounds = [EPSILON * size * (plan.calls[0].alpha + plan.calls[0].sigma)]
    errors, sizes = {"noise": 0.0}, {"noise": 0.0}
    for call in plan:
        (p, q), (p_clean, q_clean) = call.prediction, call.clean
        x = size * (call.alpha + call.sigma)
        network = (size + 2 * abs(p_clean) * x) / abs(q_clean)
        handed_on = 0.0
        if call.measure == "noise":
            handed_on = bounds[-1] / call.sigma
        if call.level not in grid.levels:
            # Stages stand at a given sigma / alpha; on flow schedules alpha = 1 - sigma has lost digits there.
            bounds[-1] += 2 * EPSILON * size * call.sigma / call.alpha
        errors.update(sample=bounds[-1], prediction=handed_on + 4 * EPSILON * (abs(p) * x + abs(q) * network + size))
        sizes.update(sample=x, prediction=size)
        following = None
        for row in call.rows:
            total = sum(abs(c) * sizes[slot] for slot, c in row.terms)
            error = sum(abs(c) * errors[slot] for slot, c in row.terms) + 2 * len(row.terms) * EPSILON * total
            if row.out == "sample":
                following = error
            else:
                errors[row.out], sizes[row.out] = error, total
        for kept, source in ((call.keep_sample, "sample"), (call.keep_prediction, "prediction")):
            if kept:
                errors[kept], sizes[kept] = errors[source], sizes[source]
        assert following is not None
        bounds.append(following)
    # The weights are rounded too.
    return [4 * bound for bound in bounds]


# ------------------------------------------------------------------------------------------------ any scheduler


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
) -> torch.Tensor:
    """The loop of a pipeline over an ideal network.

    Args:
        scheduler: with its timesteps set.
        x: noisy sample where the run starts.
        clean: the denoiser.
        begin: start at this entry of ``timesteps``, as image to image does.
        seed: of the generator of stochastic schedulers.
        stop: number of calls, all by default.
    """
    kind, prediction_type = kind_of(scheduler), scheduler.config.prediction_type
    extra = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
    if begin is not None:
        scheduler.set_begin_index(begin)
    for i, t in list(enumerate(scheduler.timesteps))[begin or 0 : stop]:
        level = float(scheduler.sigmas[i])
        alpha, sigma = alpha_sigma(kind, level)
        if kind == "edm":
            sigma_data = scheduler.config.sigma_data
            seen = scheduler.scale_model_input(x, t) * (level**2 + sigma_data**2) ** 0.5
            sign = -1.0 if prediction_type == "v_prediction" else 1.0
            u = edm_output(clean(seen, alpha, sigma), seen, sigma, sigma_data, sign)
        else:
            u = output(clean(x, alpha, sigma), x, alpha, sigma, prediction_type)
        x = scheduler.step(u, t, x, return_dict=False, **extra)[0]
    return x


def network_of(scheduler: Any, clean: Clean = MIXTURE.clean) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """An ideal network, which knows times by their labels alone."""
    schedule, prediction_type = scheduler.schedule, scheduler.config.prediction_type

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        level = float(schedule.level(float(timestep)))
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(level))
        if schedule.kind == "edm":
            x = x * math.hypot(sigma, 0.5)
            return edm_output(clean(x, alpha, sigma), x, sigma, 0.5, 1.0)
        return output(clean(x, alpha, sigma), x, alpha, sigma, prediction_type).to(x.dtype)

    return network


def run_labelled(scheduler: Any, x: torch.Tensor, clean: Clean = MIXTURE.clean, *, begin: int = 0) -> torch.Tensor:
    """The loop of a pipeline over such a network."""
    network = network_of(scheduler, clean)
    scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
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

    def error(self, scheduler: Any, *, at: float | None = None) -> float:
        """Root mean square distance of a scheduler's result from the truth where it ends, or at another level."""
        kind = kind_of(scheduler)
        first, last = float(scheduler.sigmas[0]), float(scheduler.sigmas[-1] if at is None else at)
        result = sample(scheduler, self.start(kind, first), self.mixture.clean)
        return float((result - self.end(kind, first, last)).square().mean().sqrt())


def labels(scheduler: Any) -> np.ndarray:
    """``timesteps`` as float64 numbers."""
    values: np.ndarray = scheduler.timesteps.double().numpy()
    return values
