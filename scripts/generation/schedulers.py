"""Builds a run's schedulers from the config that the model came with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from fewstep.samplers import SAMPLERS, PlanScheduler
from fewstep.samplers.options import ScheduleConfig
from fewstep.samplers.presets import preset_options

from .choices import unknown
from .model import Model
from .record import Cell, Settings

_NEEDED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_SCHEDULE_TYPES = get_type_hints(ScheduleConfig, localns={"Sequence": Sequence})


def build_scheduler(settings: Settings, model: Model, cell: Cell) -> PlanScheduler:
    """The scheduler of one cell, tried at its number of steps.

    Raises:
        ValueError: an option is unknown, or the scheduler refuses the options or the number of steps.
    """
    entry = SAMPLERS[cell.sampler]
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(entry.scheduler.__init__).parameters.items()
        if name not in ("self", "preset", "guidance_scale")  # the last two have options of their own
    }
    for name, value in settings.options.items():
        if name not in known:
            raise unknown(f"option of sampler {cell.sampler}", name, known)
        _check_type(name, value, known[name])
    options = dict(settings.options)
    if settings.preset is not None:
        options = {"preset": settings.preset, "guidance_scale": settings.guidance_scale, **options}
    try:
        scheduler = entry.build(model.scheduler_config, **options)
        if settings.preset is not None:
            kind = scheduler.schedule.kind
            decided = preset_options(entry.scheduler.__name__, kind, cell.steps, settings.guidance_scale)
            if both := sorted(decided.keys() & settings.options):
                raise ValueError(f"preset {settings.preset} decides {', '.join(both)}; leave out one of the two")
            if named := sorted(decided.keys() & entry.options):
                raise ValueError(
                    f"preset {settings.preset} decides {', '.join(named)}, which this name fixes; use a plain one"
                )
        if not scheduler.config.get("use_dynamic_shifting"):  # the shift is known inside the pipeline alone
            scheduler.set_timesteps(cell.steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampler {cell.sampler} at {cell.steps} steps: {error}") from error
    return scheduler


def _check_type(name: str, value: Any, default: Any) -> None:
    """Holds a value against the type of the default; of most options without one the scheduler must judge."""
    kind = type(default)
    if default is None and value is not None and float in get_args(_SCHEDULE_TYPES.get(name)):
        kind = float
    if kind not in _NEEDED:
        return
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"option {name}={value!r} must be {_NEEDED[kind]}")


def plain_config(scheduler: PlanScheduler) -> dict[str, Any]:
    """A scheduler's config for a record: without private entries; infinities as text, which JSON lacks."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in scheduler.config.items()
        if not name.startswith("_")
    }
