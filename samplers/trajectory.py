"""Fine runs along the probability flow: what searches compare coarse runs with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .builder import PlanBuilder
from .dpm_solver import predictor
from .execute import PlanRun
from .grid import Grid
from .multistep import multistep
from .plan import Call, Plan
from .rows import Thresholding
from .schedule import DiscreteVPSchedule
from .scheduler import PlanScheduler
from .weights import polynomial_weights

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``network(sample, timestep)``: the model's output for ``(batch, ...)`` and a time label, guidance included.

Samples of EDM models come scaled, as ``scale_model_input`` does it.
"""


@dataclass(frozen=True)
class Trajectory:
    """Samples along the probability flow.

    Attributes:
        grid: its N + 1 times.
        samples: one ``(batch, ...)`` tensor a time.
    """

    grid: Grid
    samples: tuple[torch.Tensor, ...]

    def at(self, level: float) -> torch.Tensor:
        """The samples at a noise level, ``(batch, ...)``.

        Between the nodes ``x / hypot(alpha, sigma)`` is a cubic polynomial in ``atan(sigma / alpha)`` through the four
        nearest: both are smooth up to pure noise and up to clean data.

        Raises:
            ValueError: the trajectory does not reach the level.
        """
        levels = self.grid.levels
        slack = 1e-6 * levels[0]
        if not levels[-1] - slack <= level <= levels[0] + slack:
            raise ValueError(
                f"level {level:g} lies outside the trajectory, which goes from {levels[0]:g} to {levels[-1]:g}"
            )
        angles = np.array([math.atan2(node.sigma, node.alpha) for node in self.grid.nodes])
        alpha, sigma = (float(v) for v in self.grid.schedule.alpha_sigma(level))
        angle = math.atan2(sigma, alpha)
        exact = np.flatnonzero(levels == level)
        if len(exact):
            return self.samples[exact[0]]
        after = int(np.clip(np.searchsorted(-angles, -angle), 1, len(angles) - 1))
        first = int(np.clip(after - 2, 0, max(0, len(angles) - 4)))
        near = range(first, min(first + 4, len(angles)))
        weights = polynomial_weights([float(angles[k]) for k in near], (np.array([angle]), np.ones(1)))
        size = math.hypot(alpha, sigma)
        nodes = self.grid.nodes
        sizes = [math.hypot(nodes[k].alpha, nodes[k].sigma) for k in near]
        parts = [float(w) * size / own for w, own in zip(weights, sizes, strict=True)]
        return combined(parts, [self.samples[k] for k in near])


@torch.no_grad()
def fine_trajectory(
    scheduler: PlanScheduler, network: Network, noise: torch.Tensor, *, steps: int = 200, solver_order: int = 2
) -> Trajectory:
    """A fine run between the first and the last time of a scheduler's run, through all of its times.

    VP models get whole timesteps unless the scheduler's ``fractional_timesteps`` is set.

    Args:
        scheduler: with its timesteps set.
        network: the model.
        noise: ``(batch, ...)`` standard normal.
        steps: number of fine steps, about; a model of 1000 timesteps has at most so many.
        solver_order: of DPM-Solver++; 1 is DDIM, with which the paper makes its trajectories.

    Raises:
        ValueError: no timesteps were set, fewer fine than coarse steps, or no such order.
    """
    coarse = grid_of(scheduler)
    if steps < coarse.steps:
        raise ValueError(f"steps {steps} must be at least the {coarse.steps} of the scheduler; 200 is usual")
    if solver_order not in (1, 2, 3):
        raise ValueError(f"solver_order {solver_order} must be 1, 2 or 3")
    whole = isinstance(coarse.schedule, DiscreteVPSchedule) and not scheduler.config.fractional_timesteps
    grid = _refined(coarse, math.ceil(steps / coarse.steps), whole)
    rule = predictor(
        grid,
        order=solver_order,
        measure="data",
        stochastic=False,
        form="midpoint",
        lower_order_final=False,
        euler_at_final=False,
        diffusers_third_order=False,
    )
    plan = multistep(PlanBuilder(grid, scheduler.config.prediction_type, name="fine trajectory"), rule)
    run = run_of(scheduler, plan)
    x = noise * scheduler.init_noise_sigma
    samples = [x]
    for call in plan:
        x, _ = run.step(x, network_output(scheduler, network, x, call), clean=False)
        samples.append(x)
    return Trajectory(grid, tuple(samples))


def combined(weights: Sequence[float | torch.Tensor], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors with weights."""
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + tensor * weight
    return total


def grid_of(scheduler: PlanScheduler) -> Grid:
    """The times that ``set_timesteps`` chose.

    Raises:
        ValueError: it was not called.
    """
    if scheduler._grid is None:
        raise ValueError("the scheduler has no timesteps; call its set_timesteps first")
    return scheduler._grid


def run_of(scheduler: PlanScheduler, plan: Plan) -> PlanRun:
    """A run of a plan with the scheduler's thresholding, beside the scheduler's own."""
    return PlanRun(plan, limits_of(scheduler))


def limits_of(scheduler: PlanScheduler) -> Thresholding | None:
    """The scheduler's thresholding."""
    config = scheduler.config
    return Thresholding(config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None


def network_output(scheduler: PlanScheduler, network: Network, x: torch.Tensor, call: Call) -> torch.Tensor:
    """What the network says at a call, without the variances that some predict too."""
    return asked(scheduler, network, x, torch.tensor(call.timestep, dtype=scheduler.timesteps.dtype), call.in_scale)


def asked(
    scheduler: PlanScheduler, network: Network, x: torch.Tensor, timestep: torch.Tensor, in_scale: float
) -> torch.Tensor:
    """What the network says to a sample and a label, without the variances that some predict too."""
    output = network(x if in_scale == 1.0 else x * in_scale, timestep.to(x.device))
    return output if output.shape == x.shape else scheduler._mean_of(output, x)


def _refined(coarse: Grid, pieces: int, whole: bool) -> Grid:
    """Every interval in pieces: at whole timesteps, or at equal distances in ``atan(sigma / alpha)``."""
    schedule = coarse.schedule
    levels, labels = [float(coarse.levels[0])], [float(coarse.timesteps[0])]
    angles = [math.atan2(node.sigma, node.alpha) for node in coarse.nodes]
    times = schedule.time(coarse.levels)
    for i in range(coarse.steps):
        if whole:
            ends = np.linspace(times[i], times[i + 1], pieces + 1)
            inner = np.asarray(np.unique(np.round(ends))[::-1], np.float64)
            inner_levels = schedule.level(np.maximum(inner, 0.0))
        else:
            cuts = np.linspace(angles[i], angles[i + 1], pieces + 1)[1:-1]
            inner_levels = np.array([schedule.level_of_rho(math.tan(angle)) for angle in cuts])
            inner = schedule.timestep(inner_levels) if len(cuts) else inner_levels
        for level, label in zip(inner_levels, inner, strict=True):
            if coarse.levels[i + 1] < level < levels[-1]:
                levels.append(float(level))
                labels.append(float(label))
        levels.append(float(coarse.levels[i + 1]))
        if i + 1 < coarse.steps:
            labels.append(float(coarse.timesteps[i + 1]))
    return Grid.of(schedule, levels, labels)
