"""Measures which spacing, order and ending is the most accurate: makes ``samplers/presets.json``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fewstep.metrics import GaussianMixture, GuidedPair
from fewstep.samplers import Call, DEISScheduler, Denoiser, DPMSolverPPScheduler, PlanScheduler, UniPCScheduler
from fewstep.samplers.options import ScheduleConfig

from ..files import write_text
from ..generation.model import load_model

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
_WORSE, _WORTHWHILE = 1.05, 0.95

SCHEDULERS: tuple[type[PlanScheduler], ...] = (DPMSolverPPScheduler, DEISScheduler, UniPCScheduler)

_SPACINGS: tuple[dict[str, Any], ...] = ({}, {"use_lu_lambdas": True}, {"use_karras_sigmas": True})
_FLOW_START = 1 - 1e-3


def measure_presets(*, noises: int = 8, mixtures: int = 4) -> dict[str, Any]:
    """The best options of every scheduler, kind of model, guidance scale and number of steps.

    On Gaussian mixtures in 64 dimensions, and on the bundled digits for variance preserving models, the score is the
    root mean square error to the exact solution at sigma = 0, averaged geometrically over the problems. Few problems
    tempt to fit them: options that make any of them worse than the defaults do, by more than a twentieth, are out.

    Args:
        noises: initial noises a problem.
        mixtures: mixtures a schedule.

    Returns:
        ``{kind: {scheduler: {guidance: {steps: {"options", "error", "default"}}}}}``.
    """
    table: dict[str, Any] = {}
    cells = list(itertools.product(MODELS.items(), GUIDANCE))
    for (kind, configs), guidance in tqdm(cells, desc="presets"):
        problems = [
            [mixture_problem(config, kind, seed, guidance, noises) for seed in range(mixtures)] for config in configs
        ]
        problems += [[digits_problem(0, guidance, noises)]] if kind == "vp" else []
        for scheduler in SCHEDULERS:
            row = table.setdefault(kind, {}).setdefault(scheduler.__name__, {}).setdefault(f"{guidance:g}", {})
            default, defaults = _errors(scheduler, {}, problems), _defaults(scheduler, configs[0])
            errors = [(options, _errors(scheduler, options, problems)) for options in _candidates(scheduler)]
            for n, count in enumerate(STEPS):
                safe = [(o, e[n]) for o, e in errors if (e[n] <= _WORSE * default[n]).all()]
                options, best = min(safe, key=lambda pair: _mean(pair[1]), default=(defaults, default[n]))
                if _mean(best) > _WORTHWHILE * _mean(default[n]):
                    options, best = defaults, default[n]
                row[str(count)] = {
                    "options": options,
                    "error": float(f"{_mean(best):.3g}"),
                    "default": float(f"{_mean(default[n]):.3g}"),
                }
    return table


def write_presets(table: Mapping[str, Any], path: Path) -> None:
    """Writes the table as JSON, a line a cell, atomically."""
    write_text(path, _lines(table, 4) + "\n")


def _lines(tree: Mapping[str, Any], depth: int, indent: int = 0) -> str:
    if depth == 0:
        return json.dumps(tree)
    entries = [f"{' ' * (indent + 1)}{json.dumps(k)}: {_lines(v, depth - 1, indent + 1)}" for k, v in tree.items()]
    return "{\n" + ",\n".join(entries) + f"\n{' ' * indent}}}"


def _mean(errors: np.ndarray) -> float:
    return float(np.exp(np.log(errors).mean()))


@dataclass(frozen=True)
class Problem:
    """A model, its initial noises and where they go.

    Attributes:
        config: of the model's scheduler.
        output: ``output(x, call)`` of the network at a call of a plan.
        x: the noises.
        end: of the exact flow.
    """

    config: Mapping[str, Any]
    output: Callable[[torch.Tensor, Call], torch.Tensor]
    x: torch.Tensor
    end: torch.Tensor

    def error(self, scheduler: PlanScheduler, steps: int) -> float:
        """Root mean square error of a run."""
        return float((_run(scheduler, self.output, self.x, steps) - self.end).square().mean().sqrt())


def _run(
    scheduler: PlanScheduler, output: Callable[[torch.Tensor, Call], torch.Tensor], x: torch.Tensor, steps: int
) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    for k, call in enumerate(scheduler.plan):
        x = scheduler.step(output(x, call), scheduler.timesteps[k], x, return_dict=False)[0]
    return x


def mixture_problem(config: Mapping[str, Any], kind: str, seed: int, guidance: float, noises: int) -> Problem:
    """A Gaussian mixture, against its exact flow; with guidance between one component and the whole."""
    mixture = GaussianMixture.random(seed=seed)
    pair = None if guidance == 1.0 else GuidedPair(mixture.component(seed % len(mixture.means)), mixture, guidance)
    model = pair or mixture

    def output(x: torch.Tensor, call: Call) -> torch.Tensor:
        p, q = call.clean
        return (model.clean(x, call.alpha, call.sigma) - p * x) / q

    scheduler = UniPCScheduler(**config)
    scheduler.set_timesteps(1)
    first = scheduler.plan.calls[0]
    start = (1 - _FLOW_START, _FLOW_START) if kind == "flow" else (first.alpha, first.sigma)
    x = torch.randn(noises, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * (first.sigma if kind == "edm" else 1.0)
    return Problem(config, output, x, mixture.solve(x, start, (1.0, 0.0), guidance=pair))


def digits_problem(seed: int, guidance: float, noises: int) -> Problem:
    """The bundled model, against 300 steps."""
    loaded = load_model("digits-small", "float32", "cpu")
    labels = [k % len(loaded.classes) for k in range(noises)]
    network = Denoiser.from_pipeline(loaded.pipeline, class_labels=labels, guidance_scale=guidance)

    @torch.no_grad()
    def output(x: torch.Tensor, call: Call) -> torch.Tensor:
        return network(x, call.timestep)

    config = {key: value for key, value in loaded.scheduler_config.items() if key in ScheduleConfig.__annotations__}
    config |= {"timestep_spacing": "linspace", "sample_max_value": None}
    x = torch.randn(noises, *network.shape, generator=torch.Generator().manual_seed(seed))
    return Problem(config, output, x, _run(DPMSolverPPScheduler(**config), output, x, 300))


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


def _defaults(scheduler: type[PlanScheduler], config: Mapping[str, Any]) -> dict[str, Any]:
    chosen = scheduler(**config).config
    return {key: chosen[key] for key in ("final_sigmas_type", "solver_type", "solver_order", "lower_order_final")}


def _errors(scheduler: type[PlanScheduler], options: Mapping[str, Any], problems: list[list[Problem]]) -> np.ndarray:
    """``(len(STEPS), problems)``; infinite where a run overflows."""
    columns = []
    for same_config in problems:
        ours = scheduler(**same_config[0].config, **options)
        columns.append([[problem.error(ours, steps) for problem in same_config] for steps in STEPS])
    return np.nan_to_num(np.concatenate(columns, axis=1), nan=np.inf)
