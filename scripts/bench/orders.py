"""Orders of convergence of our solvers, diffusers' and others'."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import diffusers
import torch

from fewstep.samplers import SAMPLERS, PlanScheduler

from .convergence import (
    FLOOR_FLOAT32,
    FLOOR_FLOAT64,
    FLOOR_MIXED,
    STEPS,
    Convergence,
    Problem,
    errors_of,
    grid,
)
from .foreign import foreign_orders
from .output import table

# Rectified flow with 8 timesteps: sigma_min is 1/8, so a run that ends there ends at half log-SNR log 7.
_FLOW: Mapping[str, Any] = {
    "num_train_timesteps": 8,
    "use_flow_sigmas": True,
    "prediction_type": "sample",
    "final_sigmas_type": "sigma_min",
}


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

    return Convergence(name, "fewstep", sampler.order, errors_of(solve, steps, sampler.stochastic), FLOOR_FLOAT64)


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
    floor = FLOOR_FLOAT32 if theirs == _MULTI else FLOOR_MIXED

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

    return Convergence(name, "diffusers", stated, errors_of(solve, steps, stochastic), floor)


def all_orders() -> Iterator[Convergence]:
    """Every sampler of ours, diffusers' classes, and the solvers of other libraries that are installed."""
    for name in SAMPLERS:
        yield measured_orders(name)
    for name in DIFFUSERS:
        yield diffusers_orders(name)
    yield from foreign_orders()


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
