"""Known solvers as schedules of the unified sampling framework, and the files that its authors released."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..dpm_solver import singlestep_orders
from ..grid import Grid
from ..json_fields import integer, numbers
from ..multistep import final_order
from ..schedule import NoiseSchedule
from ..weights import Measure
from .decisions import Correction, Derivative, SolverSchedule, SolverStep, newest


@dataclass(frozen=True)
class _Solver:
    """A family and its parameters; ``relaxation`` is that of the second order."""

    family: str
    order: int
    measure: Measure = "data"
    relaxation: str = "none"


_SOLVERS: Mapping[str, _Solver] = {
    "ddim": _Solver("multistep", 1),
    "dpm++": _Solver("multistep", 2, relaxation="dpmsolver-2"),
    "dpm++-heun": _Solver("multistep", 2),
    "dpm++3m": _Solver("multistep", 3, relaxation="dpmsolver-2"),
    "dpm++2s": _Solver("singlestep", 2, relaxation="dpmsolver-2"),
    "dpm++3s": _Solver("singlestep", 3),
    "dpm": _Solver("multistep", 2, "noise", "dpmsolver-2"),
    "dpm3m": _Solver("multistep", 3, "noise", "dpmsolver-2"),
    "deis": _Solver("multistep", 2, "noise"),
    "deis3": _Solver("multistep", 3, "noise"),
    "unipc": _Solver("unipc", 2, relaxation="unipc-bh2"),
    "unipc-bh1": _Solver("unipc", 2, relaxation="unipc-bh1"),
    "unipc3": _Solver("unipc", 3, relaxation="unipc-bh2"),
    "unipc4": _Solver("unipc", 4, relaxation="unipc-bh2"),
}

KNOWN_SOLVERS = tuple(_SOLVERS)
"""What ``known_schedule`` knows: names of the registered samplers that it equals."""


def known_schedule(solver: str, grid: Grid, *, lower_order_final: bool = True) -> SolverSchedule:
    """The schedule that is a known solver on a grid.

    Args:
        solver: one of ``KNOWN_SOLVERS``, each with the options of the registered sampler of that name.
        grid: the run's times, which the schedule keeps.
        lower_order_final: lower orders on the last steps, as the samplers have it.

    Raises:
        ValueError: an unknown solver.
    """
    chosen = _SOLVERS.get(solver)
    if chosen is None:
        raise ValueError(f"solver {solver!r} is unknown; use one of {', '.join(KNOWN_SOLVERS)}")
    if chosen.family == "singlestep":
        steps = _singlestep(chosen, grid, lower_order_final)
    else:
        steps = _multistep(chosen, grid, lower_order_final)
    levels, labels = (tuple(v.tolist()) for v in (grid.levels, grid.timesteps))
    return SolverSchedule(grid.schedule.kind, levels, tuple(steps), labels)


def _multistep(solver: _Solver, grid: Grid, lower_order_final: bool) -> list[SolverStep]:
    steps = []
    for i in range(grid.steps):
        # UniPC lowers the last orders at any number of steps, the others below 15.
        order = solver.order
        if solver.family == "unipc":
            order = min(order, grid.steps - i) if lower_order_final else order
        else:
            order = final_order(order, i, grid.steps, lower_order_final=lower_order_final, end_first=False)
        if grid.nodes[i + 1].sigma == 0.0:
            order = 1
        order = min(order, i + 1)
        step = SolverStep(solver.measure, -1, newest(order, solver.relaxation if order == 2 else "none"))
        if solver.family == "unipc" and i < grid.steps - 1:
            correction = step.own_correction()
            if order == 1:
                # UniC-1 has the shortcut of B(h) where the others solve.
                correction = replace(correction, derivatives=(Derivative((-1,), solver.relaxation),))
            step = replace(step, correction=correction)
        steps.append(step)
    return steps


def _singlestep(solver: _Solver, grid: Grid, lower_order_final: bool) -> list[SolverStep]:
    ends_clean = grid.nodes[-1].sigma == 0.0
    orders = singlestep_orders(solver.order, grid.steps, lower_order_final or ends_clean)
    if ends_clean:
        orders[-1] = 1
    steps: list[SolverStep] = []
    group = 0
    for i in range(grid.steps):
        order = min(orders[i], group + 1)
        # Nothing restarts from alpha = 0 but the step that leaves it.
        if order == 1 or grid.nodes[i - group].alpha == 0.0:
            group, order = 0, 1
        points = tuple(range(-1, -order, -1))
        relaxation = solver.relaxation if order == 2 else "none"
        derivatives = tuple(Derivative(points, relaxation if j == 0 else "none") for j in range(order - 1))
        steps.append(SolverStep(solver.measure, -order, derivatives))
        group = order
    return steps


# ------------------------------------------------------------------------------------------------ released files

_MEASURES: Mapping[str, Measure] = {"data_prediction": "data", "noise_prediction": "noise"}
_CORRECTORS = ("no_corrector", "pseudo", "implicit")


def released_schedule(data: Mapping[str, Any], schedule: NoiseSchedule) -> SolverSchedule:
    """Reads the fields of the authors' released schedules (lists in the place of tensors).

    ``timesteps`` are levels of EDM models, and of VP models the continuous time in (0, 1] that is label
    ``num_train_timesteps * t - 1``.

    Args:
        data: ``timesteps``, ``orders``, ``prediction_types``, ``start_points``, ``derivative_types``,
            ``corrector_types``, and perhaps ``afs`` and ``skip_coefficients``.
        schedule: of the model.

    Raises:
        ValueError: missing or wrong fields, or decisions outside of the space: predictions of DPM-Solver-v3, which need
            statistics of the model, and coefficients of the network's skip connections.
    """
    names = ("timesteps", "orders", "prediction_types", "start_points", "derivative_types", "corrector_types")
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"{missing[0]} is missing; give {', '.join(names)}")
    skips = data.get("skip_coefficients")
    if skips is not None and any(value != 1.0 for value in numbers(list(skips), "skip_coefficients")):
        raise ValueError("skip_coefficients change the network, not the solver; use a schedule in which all are 1")
    levels, labels = _released_times(numbers(list(data["timesteps"]), "timesteps"), schedule)
    count = len(levels) - 1
    for name in names[1:]:
        if len(data[name]) != count:
            raise ValueError(f"{name} has {len(data[name])} entries; {count + 1} timesteps make {count} steps")
    steps = []
    for i, rows in enumerate(zip(*(data[name] for name in names[1:]), strict=True)):
        order, kind, start, derivatives, corrector = rows
        if kind not in _MEASURES:
            raise ValueError(f"prediction_types of step {i} is {kind!r}; use one of {', '.join(_MEASURES)}")
        start = integer(start, f"start_points of step {i}")
        order = integer(order, f"orders of step {i}")
        estimates = _released_derivatives(derivatives, order, start, f"step {i}", corrects=False)
        if corrector["type"] not in _CORRECTORS:
            raise ValueError(
                f"corrector_types of step {i} is {corrector['type']!r}; use one of {', '.join(_CORRECTORS)}"
            )
        correction = None
        if corrector["type"] != "no_corrector":
            start_again = integer(corrector["start_point"], f"start_point of the corrector of step {i}")
            again = integer(corrector["taylor_order"], f"taylor_order of the corrector of step {i}")
            parts = corrector["derivative_type"]
            corrected = _released_derivatives(parts, again, start_again, f"the corrector of step {i}", corrects=True)
            correction = Correction(start_again, corrected, corrector["type"] == "implicit")
        steps.append(SolverStep(_MEASURES[kind], start, estimates, correction))
    afs = data.get("afs", "no_afs")
    return SolverSchedule(schedule.kind, levels, tuple(steps), labels, "none" if afs == "no_afs" else afs)


def _released_times(
    times: Sequence[float], schedule: NoiseSchedule
) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    if schedule.kind == "edm":
        return tuple(times), None
    if schedule.kind != "vp":
        raise ValueError(f"the released schedules are for VP and EDM models, not for {schedule.kind}; use decisions")
    labels = np.array(times) * schedule.num_train_timesteps - 1.0
    # Below the first label the level goes to 0 in a straight line, one label long.
    levels = schedule.level(np.maximum(labels, 0.0)) * np.minimum(labels + 1.0, 1.0)
    return tuple(levels.tolist()), tuple(np.maximum(labels[:-1], 0.0).tolist())


def _released_derivatives(
    data: Sequence[Mapping[str, Any]], order: int, start: int, name: str, *, corrects: bool
) -> tuple[Derivative, ...]:
    # Steps of order 1 may carry an empty estimate.
    entries = list(data or ())[: order - 1]
    if len(entries) < order - 1:
        raise ValueError(f"derivative_types of {name} has {len(entries)} entries; order {order} needs {order - 1}")
    derivatives = []
    for j, entry in enumerate(entries, 1):
        kind, _, count = str(entry["estimate"]).partition("_")
        if kind != "Difference" or not count.isdecimal():
            raise ValueError(
                f"estimate of derivative {j} of {name} is {entry['estimate']!r}; use Difference_1 and so on"
            )
        points = entry.get("active_points")
        points = _default_points(int(count), start, corrects) if points is None else points
        if len(points) != int(count):
            raise ValueError(
                f"active_points of derivative {j} of {name} are {points}; {entry['estimate']} needs {count}"
            )
        relaxation = entry.get("relaxation")
        relaxation = "none" if relaxation in (None, "no_relaxation") or j > 1 else relaxation
        coefficient = entry.get("relaxation_coefficient") or 0.0
        chosen = tuple(integer(p, f"an active point of {name}") for p in points)
        derivatives.append(Derivative(chosen, relaxation, coefficient if relaxation == "linear" else 0.0))
    return tuple(derivatives)


def _default_points(count: int, start: int, corrects: bool) -> list[int]:
    """The authors' choice where a file leaves it open: nodes after the start, then those before it."""
    newer = [-1] if corrects else []
    newer += [p for p in range(start + 1, 0) if p not in newer]
    return [*newer, *range(start - 1, start - 1 - count, -1)][:count]
