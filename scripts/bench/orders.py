"""Orders of convergence, measured where the exact trajectory is known."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch

from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, PlanScheduler

from .output import table

STEPS = (24, 48, 96, 192, 384)
"""Multiples of 6, so that singlestep solvers of order 2 and 3 have whole groups."""

# Rectified flow with 8 timesteps: sigma_min is 1/8, so a run that ends there ends at half log-SNR log 7.
_FLOW: Mapping[str, Any] = {
    "num_train_timesteps": 8,
    "use_flow_sigmas": True,
    "prediction_type": "sample",
    "final_sigmas_type": "sigma_min",
}
_START, _END = -2.5, math.log(7.0)
_FLOOR_FLOAT64, _FLOOR_MIXED, _FLOOR_FLOAT32 = 1e-11, 1e-9, 4e-6


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


def measured_orders(
    name: str, *, steps: Sequence[int] = STEPS, exact_start: bool = True, **options: Any
) -> Convergence:
    """The convergence of one of our samplers.

    Deterministic samplers solve the probability flow of a Gaussian mixture, stochastic ones their drift, with
    the noise switched off. Both ends are finite, and no final steps of lower order are taken.

    Args:
        name: of the sampler.
        steps: numbers of steps, each twice the one before.
        exact_start: give multistep samplers of order 3 and more the exact solution in the place of their first
            results. Without it their first step, which is Euler's, limits them to order 2, or with a corrector to 3.
        options: of the scheduler beside the sampler's own.
    """
    sampler = SAMPLERS[name]
    scheduler = sampler.build(_FLOW, **options)
    ramp = sampler.order - 1 if exact_start and sampler.order > 2 and _is_multistep(scheduler) else 0
    own = {"lower_order_final": False, "disable_corrector": list(range(ramp))}
    chosen = {key: value for key, value in own.items() if key in scheduler.config}
    scheduler = sampler.build(_FLOW, **{**chosen, **options})

    def solve(problem: Problem, count: int) -> torch.Tensor:
        scheduler.set_timesteps(sigmas=grid(count))
        calls = [(call.alpha, call.sigma) for call in scheduler.plan]
        return _run(scheduler, calls, problem, count, ramp, sampler.stochastic)

    return Convergence(name, "fewstep", sampler.order, _errors(solve, steps, sampler.stochastic), _FLOOR_FLOAT64)


_MULTI, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_DEIS, _UNIPC = "DEISMultistepScheduler", "UniPCMultistepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++"}

DIFFUSERS: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    **{f"DPMSolverMultistep {k}": (_MULTI, k, {"solver_order": k}) for k in (1, 2, 3)},
    **{f"DPMSolverMultistep {k} SDE": (_MULTI, k, {"solver_order": k, **_SDE}) for k in (1, 2, 3)},
    **{f"DPMSolverSinglestep {k}": (_SINGLE, k, {"solver_order": k, "solver_type": "heun"}) for k in (2, 3)},
    **{f"DEISMultistep {k}": (_DEIS, k, {"solver_order": k}) for k in (1, 2, 3)},
    **{f"UniPCMultistep {k}": (_UNIPC, k + 1, {"solver_order": k}) for k in (1, 2, 3)},
}
"""diffusers' solvers: class, stated order, configuration."""


def diffusers_orders(name: str, *, steps: Sequence[int] = STEPS) -> Convergence:
    """The convergence of one of diffusers' classes, on the same grids.

    ``DPMSolverMultistepScheduler`` rounds every sample to float32, others some coefficients: their floors are higher.

    Args:
        name: key of ``DIFFUSERS``.
        steps: numbers of steps, each twice the one before.
    """
    theirs, stated, options = DIFFUSERS[name]
    ramp = stated - 1 if stated > 2 and theirs in (_MULTI, _DEIS) else 0
    stochastic = "sde" in str(options.get("algorithm_type"))
    floor = _FLOOR_FLOAT32 if theirs == _MULTI else _FLOOR_MIXED

    def solve(problem: Problem, count: int) -> torch.Tensor:
        config = {**_FLOW, "num_train_timesteps": 1000, "lower_order_final": False, **options}
        known = inspect.signature(getattr(diffusers, theirs)).parameters
        scheduler = getattr(diffusers, theirs)(**{key: value for key, value in config.items() if key in known})
        scheduler.set_timesteps(count)
        levels = grid(count)
        scheduler.sigmas = torch.from_numpy(levels)
        scheduler.timesteps = torch.arange(count, 0, -1)
        scheduler.set_begin_index(0)
        calls = [(1.0 - s, s) for s in levels[:-1].tolist()]
        return _run(scheduler, calls, problem, count, ramp, stochastic)

    return Convergence(name, "diffusers", stated, _errors(solve, steps, stochastic), floor)


def all_orders() -> Iterator[Convergence]:
    """Every sampler of ours, diffusers' classes, and the solvers of other libraries that are installed."""
    from .foreign import foreign_orders

    for name in SAMPLERS:
        yield measured_orders(name)
    for name in DIFFUSERS:
        yield diffusers_orders(name)
    yield from foreign_orders()


def convergence(
    name: str, library: str, stated: int, solve: Callable[[Problem, int], torch.Tensor], floor: float = _FLOOR_MIXED
) -> Convergence:
    """Measures any deterministic solver.

    Args:
        name: of the solver.
        library: whose it is.
        stated: its order.
        solve: ``solve(problem, steps)`` gives the result at the end of ``grid(steps)``.
        floor: its rounding errors.
    """
    return Convergence(name, library, stated, _errors(solve, STEPS, False), floor)


@functools.cache
def _problem(stochastic: bool) -> Problem:
    return SineDrift() if stochastic else MixtureFlow()


def _errors(
    solve: Callable[[Problem, int], torch.Tensor], steps: Sequence[int], stochastic: bool
) -> tuple[tuple[int, float], ...]:
    problem = _problem(stochastic)
    return tuple((n, float((solve(problem, n) - problem.exact(n, n)).abs().max())) for n in steps)


def _run(
    scheduler: Any, calls: Sequence[tuple[float, float]], problem: Problem, steps: int, ramp: int, stochastic: bool
) -> torch.Tensor:
    """A run; the results of the first ``ramp`` steps are exchanged for the exact ones."""
    sample = problem.start
    options = {"variance_noise": torch.zeros_like(sample)} if stochastic else {}
    for k, (alpha, sigma) in enumerate(calls):
        output = problem.clean(sample, alpha, sigma)
        sample = scheduler.step(output, scheduler.timesteps[k], sample, return_dict=False, **options)[0]
        if k < ramp:
            sample = problem.exact(steps, k + 1)
    return sample.double()


def _is_multistep(scheduler: PlanScheduler) -> bool:
    return scheduler.config.get("method") != "singlestep" and scheduler.config.get("solver_type") != "rhork"


def orders_table(results: Sequence[Convergence], *, markdown: bool = False) -> str:
    """The results as text, a line a solver."""
    steps = [n for n, _ in results[0].errors]
    header = ["solver", "library", "stated", "measured", *(f"N = {n}" for n in steps)]
    rows = [
        [c.name, c.library, str(c.stated), f"{c.order:.2f}", *(f"{error:.1e}" for _, error in c.errors)]
        for c in results
    ]
    return table(header, rows, markdown=markdown)
