"""Builds a run's schedulers from the config that the model came with."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import fewstep.samplers
from fewstep.samplers import SAMPLERS, MRSamplerScheduler, PlanScheduler, UniPCScheduler
from fewstep.samplers.foreign import MODEL_KEYS
from fewstep.samplers.options import DEFAULTS, ScheduleConfig
from fewstep.samplers.presets import preset_options

from .choices import unknown
from .model import Model
from .options import parse_options
from .record import Cell, Settings

Scheduler = TypeVar("Scheduler", bound=PlanScheduler)

_NEEDED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_MEAN_REVERTING = ("theta_schedule", "sigma_inf", "final_alpha")
_SCHEDULE_TYPES = get_type_hints(ScheduleConfig, localns={"Sequence": Sequence})


def resolve_sampler(name: str) -> str:
    """A registered name as it is, and the folder of a saved scheduler as an absolute path.

    Raises:
        ValueError: neither.
    """
    if name in SAMPLERS:
        return name
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        raise unknown("sampler", name, SAMPLERS)
    _saved(str(folder))
    return str(folder.resolve())


def build_scheduler(settings: Settings, model: Model, cell: Cell) -> PlanScheduler:
    """The scheduler of one cell, tried at its number of steps.

    Raises:
        ValueError: an option is unknown, or the scheduler refuses the options or the number of steps.
    """
    if cell.sampler in SAMPLERS:
        cls, own = SAMPLERS[cell.sampler].scheduler, SAMPLERS[cell.sampler].options
    else:
        cls, own = _saved(cell.sampler)
        _check_model(cls, own, model, cell.sampler)
    check_options(cls, settings.options, cell.sampler)
    options = {**own, **settings.options}
    if model.kind == "restoration" and cell.sampler in SAMPLERS:
        # The sampler solves for the residual; its own options are one of the scheduler around it.
        shared = {key: value for key, value in options.items() if key in DEFAULTS}
        inner = {key: value for key, value in options.items() if key not in DEFAULTS}
        cls, options = MRSamplerScheduler, {**shared, "solver": cell.sampler, "solver_options": inner}
    if settings.preset is not None:
        options = {"preset": settings.preset, "guidance_scale": settings.guidance_scale, **options}
    try:
        scheduler: PlanScheduler = cls.from_config(model.scheduler_config, **options)
        if settings.preset is not None:
            kind = scheduler.schedule.kind
            decided = preset_options(cls.__name__, kind, cell.steps, settings.guidance_scale)
            if both := sorted(decided.keys() & settings.options):
                raise ValueError(f"preset {settings.preset} decides {', '.join(both)}; leave out one of the two")
            if named := sorted(decided.keys() & own):
                raise ValueError(
                    f"preset {settings.preset} decides {', '.join(named)}, which this name fixes; use a plain one"
                )
        if not scheduler.config.get("use_dynamic_shifting"):  # the shift is known inside the pipeline alone
            scheduler.set_timesteps(cell.steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampler {cell.sampler} at {cell.steps} steps: {error}") from error
    return scheduler


def parsed_options(cls: type[Scheduler], model: Model, pairs: Sequence[str], **own: Any) -> Scheduler:
    """A scheduler of a class for a model, with options from ``key=value`` words beside its own.

    Raises:
        ValueError: an option is unknown, or the scheduler refuses it.
    """
    options = parse_options(pairs)
    check_options(cls, options, cls.__name__)
    scheduler: Scheduler = cls.from_config(model.scheduler_config, **{**own, **options})
    return scheduler


def tuning_remarks(settings: Settings) -> list[str]:
    """A line a sampler of ``fewstep tune`` that was fitted to another model or guidance scale than the run's."""
    remarks = []
    scale = 1.0 if settings.guidance_scale is None else settings.guidance_scale
    for sampler in settings.samplers:
        try:
            tuning = json.loads((Path(sampler) / "tuning.json").read_text(encoding="utf-8"))
            model, fitted = str(tuning["model"]), float(tuning["guidance_scale"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if sampler not in SAMPLERS and (model, fitted) != (settings.model, scale):
            other = f"{settings.model} " if model != settings.model else ""
            remarks.append(
                f"sampler {Path(sampler).name} was fitted to {model} at guidance {fitted:g}, not {other}at {scale:g}"
            )
    return remarks


def _saved(name: str) -> tuple[type[PlanScheduler], dict[str, Any]]:
    """Class and options of a scheduler that ``save_pretrained`` wrote.

    Raises:
        ValueError: the folder holds none of ours.
    """
    try:
        data = json.loads((Path(name) / "scheduler_config.json").read_text(encoding="utf-8"))
        cls = getattr(fewstep.samplers, data["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"sampler {name} is a folder without the scheduler_config.json of a fewstep scheduler"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, PlanScheduler)):
        raise ValueError(f"sampler {name} holds a {data['_class_name']}, which is no scheduler of fewstep")
    return cls, {key: value for key, value in data.items() if not key.startswith("_")}


def _check_model(cls: type[PlanScheduler], own: dict[str, Any], model: Model, name: str) -> None:
    """Refuses a saved scheduler that was made for another process, noise schedule or prediction."""
    if issubclass(cls, MRSamplerScheduler) != (model.kind == "restoration"):
        needed = "an MRSamplerScheduler" if model.kind == "restoration" else "a scheduler of another class"
        raise ValueError(f"sampler {name} holds a {cls.__name__}; model {model.name} needs {needed}")
    # Not of the saved class, which may be made for one model alone: any that reads what the model is.
    reader = MRSamplerScheduler if model.kind == "restoration" else UniPCScheduler
    wanted = reader.from_config(model.scheduler_config).config
    other = [key for key in (*MODEL_KEYS, *_MEAN_REVERTING) if key in own and own[key] != wanted[key]]
    if other:
        raise ValueError(
            f"sampler {name} was made for another model than {model.name}: their {', '.join(other)} differ"
        )


def check_options(cls: type[PlanScheduler], options: dict[str, Any], name: str) -> None:
    """Holds options against a scheduler's names and types.

    Raises:
        ValueError: an option is unknown or of another type.
    """
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        if key not in ("self", "preset", "guidance_scale")  # the last two have options of their own
    }
    for key, value in options.items():
        if key not in known:
            raise unknown(f"option of sampler {name}", key, known)
        _check_type(key, value, known[key])


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
