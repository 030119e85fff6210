"""Problems whose exact solution is known, and how fast a solver comes near it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fewstep.metrics import GaussianMixture

STEPS = (24, 48, 96, 192, 384)
"""Multiples of 6, so that singlestep solvers of order 2 and 3 have whole groups."""

FLOOR_FLOAT64, FLOOR_MIXED, FLOOR_FLOAT32 = 1e-11, 1e-9, 4e-6
"""Rounding errors of solvers in float64, with some coefficients in float32, and in float32."""

_START, _END = -2.5, math.log(7.0)


@dataclass(frozen=True)
class Convergence:
    """The error of one solver over the number of steps.

    Attributes:
        name: of the solver.
        library: whose it is.
        stated: order of convergence that its authors state.
        errors: ``(steps, error)``, the largest error over the start points.
        floor: errors below it are rounding and do not count.
    """

    name: str
    library: str
    stated: int
    errors: tuple[tuple[int, float], ...]
    floor: float

    @property
    def order(self) -> float:
        """Slope over the last doublings, two at most, whose errors lie above the floor."""
        above = [(n, e) for n, e in self.errors if e > self.floor][-3:]
        if len(above) < 2:
            return math.nan
        (first, large), (last, small) = above[0], above[-1]
        return math.log(large / small) / math.log(last / first)


class Problem:
    """A model whose trajectory from half log-SNR -2.5 to log 7 is known on a smooth grid of uneven steps."""

    start: torch.Tensor

    def clean(self, sample: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """The model's clean prediction."""
        raise NotImplementedError

    def exact(self, steps: int, k: int) -> torch.Tensor:
        """The solution at node ``k`` of the grid with that many steps, ``(batch, 1)``."""
        raise NotImplementedError


class MixtureFlow(Problem):
    """The probability flow of a mixture of two Gaussians in one dimension, from nine points."""

    def __init__(self) -> None:
        self.mixture = GaussianMixture(
            means=torch.tensor([[-1.0], [0.8]]), stds=torch.tensor([0.25, 0.4]), weights=torch.tensor([0.4, 0.6])
        )
        self.start = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64).unsqueeze(1)
        self._known: dict[float, torch.Tensor] = {}

    def clean(self, sample: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        return self.mixture.clean(sample, alpha, sigma)

    def exact(self, steps: int, k: int) -> torch.Tensor:
        levels = grid(steps)
        level = float(levels[k])
        if level not in self._known:
            ends = ((1.0 - s, s) for s in (float(levels[0]), level))
            self._known[level] = self.mixture.solve(self.start, *ends)
        return self._known[level]


class SineDrift(Problem):
    """The reverse SDE without its noise, for clean predictions ``sin(lambda + phase)``: solved in closed form.

    Several phases, since the errors of one may cancel.
    """

    def __init__(self) -> None:
        self.phases = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
        self.start = torch.ones_like(self.phases)

    def clean(self, sample: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        return torch.sin(math.log(alpha / sigma) + self.phases)

    def exact(self, steps: int, k: int) -> torch.Tensor:
        levels = grid(steps)
        first, last = float(levels[0]), float(levels[k])
        begin, end = (math.log((1.0 - s) / s) for s in (first, last))
        decay = math.exp(begin - end)
        # int 2 exp(2 l) sin(l) dl = 2 / 5 exp(2 l) (2 sin(l) - cos(l))
        upper, lower = (2 * torch.sin(l + self.phases) - torch.cos(l + self.phases) for l in (end, begin))
        return last / first * decay * self.start + (1.0 - last) * (2 / 5) * (upper - decay**2 * lower)


@functools.cache
def grid(steps: int) -> np.ndarray:
    """``steps + 1`` flow levels whose half log-SNR is a smooth, uneven function of their index."""
    u = np.linspace(0.0, 1.0, steps + 1)
    half_logsnr = _START + (_END - _START) * (u + 0.25 * np.sin(2 * math.pi * u) / (2 * math.pi))
    levels = 1.0 / (1.0 + np.exp(half_logsnr))
    # What schedulers keep in their tables is float32: both mean the same numbers.
    return np.asarray(levels.astype(np.float32), np.float64)


def convergence(
    name: str, library: str, stated: int, solve: Callable[[Problem, int], torch.Tensor], floor: float = FLOOR_MIXED
) -> Convergence:
    """Measures any deterministic solver.

    Args:
        name: of the solver.
        library: whose it is.
        stated: its order.
        solve: ``solve(problem, steps)`` gives the result at the end of ``grid(steps)``.
        floor: its rounding errors.
    """
    return Convergence(name, library, stated, errors_of(solve, STEPS, False), floor)


@functools.cache
def problem_of(stochastic: bool) -> Problem:
    """What deterministic and what stochastic solvers are measured on."""
    return SineDrift() if stochastic else MixtureFlow()


def errors_of(
    solve: Callable[[Problem, int], torch.Tensor], steps: Sequence[int], stochastic: bool
) -> tuple[tuple[int, float], ...]:
    """``(steps, largest error)`` of ``solve(problem, steps)``."""
    problem = problem_of(stochastic)
    return tuple((n, float((solve(problem, n) - problem.exact(n, n)).abs().max())) for n in steps)
