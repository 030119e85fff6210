"""Measures which spacing, order and ending is the most accurate: makes ``samplers/presets.json``."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fewstep.metrics import GaussianMixture, GuidedPair
from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, PlanScheduler, UniPCScheduler

MODELS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "vp": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear"},
    ),
    "flow": (
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    "edm": ({"sigma_data": 1.0},),
}
GUIDANCE = (1.0, 3.0, 7.5)
STEPS = (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)
SCHEDULERS: tuple[type[PlanScheduler], ...] = (DPMSolverPPScheduler, DEISScheduler, UniPCScheduler)

_SPACINGS: tuple[dict[str, Any], ...] = ({}, {"use_lu_lambdas": True}, {"use_karras_sigmas": True})
_FLOW_START = 1 - 1e-3


def measure_presets(*, noises: int = 16, mixtures: int = 2) -> dict[str, Any]:
    """The best options of every scheduler, kind of model, guidance scale and number of steps.

    The score is the geometric mean over mixtures and schedules of the root mean square error to the exact solution
    at sigma = 0, on Gaussian mixtures in 64 dimensions.

    Args:
        noises: initial noises a problem.
        mixtures: mixtures a schedule.

    Returns:
        ``{kind: {scheduler: {guidance: {steps: {"options", "error", "default"}}}}}``.
    """
    table: dict[str, Any] = {}
    cells = list(itertools.product(MODELS.items(), GUIDANCE))
    for (kind, configs), guidance in tqdm(cells, desc="presets"):
        problems = [_problem(config, kind, seed, guidance, noises) for config in configs for seed in range(mixtures)]
        for scheduler, steps in itertools.product(SCHEDULERS, STEPS):
            scored = [(_score(scheduler, options, steps, problems), options) for options in _candidates(scheduler)]
            error, options = min(scored, key=lambda pair: pair[0])
            row = table.setdefault(kind, {}).setdefault(scheduler.__name__, {}).setdefault(f"{guidance:g}", {})
            default = _score(scheduler, {}, steps, problems)
            row[str(steps)] = {"options": options, "error": float(f"{error:.3g}"), "default": float(f"{default:.3g}")}
    return table


def write_presets(table: Mapping[str, Any], path: Path) -> None:
    """Writes the table as JSON, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(partial, path)


class _Problem:
    """A model, its initial noises and where they go."""

    def __init__(
        self, config: dict[str, Any], model: GaussianMixture | GuidedPair, x: torch.Tensor, end: torch.Tensor
    ) -> None:
        self.config, self.model, self.x, self.end = config, model, x, end

    def error(self, scheduler: PlanScheduler, steps: int) -> float:
        scheduler.set_timesteps(steps)
        x = self.x
        for k, call in enumerate(scheduler.plan):
            p, q = call.clean
            output = (self.model.clean(x, call.alpha, call.sigma) - p * x) / q
            x = scheduler.step(output, scheduler.timesteps[k], x, return_dict=False)[0]
        return float((x - self.end).square().mean().sqrt())


def _problem(config: dict[str, Any], kind: str, seed: int, guidance: float, noises: int) -> _Problem:
    mixture = GaussianMixture.random(seed=seed)
    pair = None if guidance == 1.0 else GuidedPair(mixture.component(seed), mixture, guidance)
    scheduler = UniPCScheduler(**config)
    scheduler.set_timesteps(1)
    first = scheduler.plan.calls[0]
    start = (1 - _FLOW_START, _FLOW_START) if kind == "flow" else (first.alpha, first.sigma)
    x = torch.randn(noises, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * (first.sigma if kind == "edm" else 1.0)
    end = mixture.solve(x, start, (1.0, 0.0), guidance=pair)
    return _Problem(config, pair or mixture, x, end)


def _candidates(scheduler: type[PlanScheduler]) -> Iterator[dict[str, Any]]:
    if scheduler is DEISScheduler:
        forms = [
            {"solver_type": form, "solver_order": order, "lower_order_final": lower}
            for form, order, lower in itertools.product(("logrho", "tab", "rhoab"), (2, 3, 4), (True, False))
        ]
        forms += [{"solver_type": "ipndm", "solver_order": k, "lower_order_final": False} for k in (2, 3, 4)]
    elif scheduler is UniPCScheduler:
        forms = [
            {"solver_type": form, "solver_order": order, "lower_order_final": lower}
            for form, order, lower in itertools.product(("bh1", "bh2"), (2, 3, 4), (True, False))
        ]
    else:
        forms = [
            {"solver_type": form, "solver_order": order, "lower_order_final": lower}
            for (form, order), lower in itertools.product((("midpoint", 2), ("heun", 2), ("heun", 3)), (True, False))
        ]
    for spacing, ending, form_options in itertools.product(_SPACINGS, ("zero", "sigma_min"), forms):
        yield {**spacing, "final_sigmas_type": ending, **form_options}


def _score(scheduler: type[PlanScheduler], options: Mapping[str, Any], steps: int, problems: list[_Problem]) -> float:
    errors = [problem.error(scheduler(**problem.config, **options), steps) for problem in problems]
    if not all(math.isfinite(error) for error in errors):
        return math.inf
    return math.exp(sum(math.log(error) for error in errors) / len(errors))
