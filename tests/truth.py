"""Shared by the tests: a continuous schedule, grids from half log-SNR, and runs of plans on exact models."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from fewstep.metrics import GaussianMixture
from fewstep.samplers import NoiseSchedule, Plan
from fewstep.samplers.builder import PlanBuilder
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.grid import Grid

Clean = Callable[[torch.Tensor, float, float], torch.Tensor]

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

    def alpha_sigma(self, level):
        rho = np.asarray(level, np.float64)
        return 1 / np.sqrt(1 + rho**2), rho / np.sqrt(1 + rho**2)

    def level_of_rho(self, rho: float) -> float:
        return rho

    def time(self, level):
        q = 2 * (self.beta_1 - self.beta_0) * np.log1p(np.asarray(level, np.float64) ** 2)
        return q / (np.sqrt(self.beta_0**2 + q) + self.beta_0) / (self.beta_1 - self.beta_0)

    def timestep(self, level):
        return 1000.0 * self.time(level)

    def level(self, timestep):
        t = np.asarray(timestep, np.float64) / 1000.0
        return np.sqrt(np.expm1(t**2 * (self.beta_1 - self.beta_0) / 2 + t * self.beta_0))

    def rho_of_time(self, lower: float, upper: float):
        points, weights = np.polynomial.legendre.leggauss(64)
        t = (lower + upper) / 2 + (upper - lower) / 2 * points
        rho = self.level(1000.0 * t)
        slope = (self.beta_0 + t * (self.beta_1 - self.beta_0)) / 2 * (rho**2 + 1) / rho
        ends = self.level(1000.0 * np.array([lower, upper]))
        return t, (upper - lower) / 2 * weights * slope, np.asarray(ends[1] - ends[0])


def lambda_grid(half_logsnr, schedule: NoiseSchedule | None = None) -> Grid:
    """A grid through the given half log-SNRs; the last may be infinite (sigma = 0)."""
    schedule = schedule or LinearVPSchedule()
    levels = np.array([schedule.level_of_rho(math.exp(-value)) for value in half_logsnr])
    return Grid.of(schedule, levels, schedule.timestep(levels[:-1]))


def builder(grid: Grid, prediction_type: str = "sample", start: int = 0) -> PlanBuilder:
    return PlanBuilder(grid, prediction_type, start=start)


def run(
    plan: Plan, sample: torch.Tensor, clean: Clean = MIXTURE.clean, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Executes a plan of a clean-sample model."""
    execution = PlanRun(plan)
    for call in plan:
        sample, _ = execution.step(sample, clean(sample, call.alpha, call.sigma), noise)
    return sample
