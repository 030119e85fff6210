"""Builds a run's schedulers from the config that the model came with."""

from __future__ import annotations

import inspect
import math
from typing import Any

from fewstep.samplers import SAMPLERS, PlanScheduler

from .choices import unknown
from .model import Model
from .record import Cell, Settings


def build_scheduler(settings: Settings, model: Model, cell: Cell) -> PlanScheduler:
    """The scheduler of one cell, tried at its number of steps.

    Raises:
        ValueError: an option is unknown, or the scheduler refuses the options or the number of steps.
    """
    entry = SAMPLERS[cell.sampler]
    known = [name for name in inspect.signature(entry.scheduler.__init__).parameters if name != "self"]
    for name in settings.options:
        if name not in known:
            raise unknown(f"option of sampler {cell.sampler}", name, known)
    options = dict(settings.options)
    if settings.preset is not None:
        options = {"preset": settings.preset, "guidance_scale": settings.guidance_scale, **options}
    try:
        scheduler = entry.build(model.scheduler_config, **options)
        if not scheduler.config.get("use_dynamic_shifting"):  # the shift is known inside the pipeline alone
            scheduler.set_timesteps(cell.steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampler {cell.sampler} at {cell.steps} steps: {error}") from error
    return scheduler


def plain_config(scheduler: PlanScheduler) -> dict[str, Any]:
    """A scheduler's config for a record: without private entries; infinities as text, which JSON lacks."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in scheduler.config.items()
        if not name.startswith("_")
    }
