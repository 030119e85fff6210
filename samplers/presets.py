"""``preset="accurate"``: spacing, order and ending by measurement.

``presets.json`` is made by ``fewstep bench presets``.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from .options import RESPACINGS

PRESETS = ("accurate",)

# What was measured, where a table entry does not say otherwise.
_MEASURED: Mapping[str, Any] = {
    **dict.fromkeys(RESPACINGS, False),
    "timestep_spacing": "linspace",
}
_MEASURED_OF: Mapping[str, Mapping[str, Any]] = {
    "DPMSolverPPScheduler": {"denoise_to_zero": False, "euler_at_final": False},
}


def check_preset(preset: str | None, scheduler: str, kind: str) -> None:
    """Refuses presets that do not exist and schedulers that were not measured.

    Raises:
        ValueError: an unknown preset, or no measurements.
    """
    if preset is None:
        return
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; use one of {', '.join(PRESETS)}")
    if scheduler not in _table()[kind]:
        raise ValueError(f"preset {preset!r} was not measured for {scheduler}; use one of {', '.join(_table()[kind])}")


def preset_options(scheduler: str, kind: str, steps: int, guidance_scale: float | None) -> dict[str, Any]:
    """The options that were the most accurate on analytic mixtures.

    Args:
        scheduler: class name.
        kind: of the schedule: ``vp``, ``flow`` or ``edm``.
        steps: number of steps; the nearest measured number decides, on a logarithmic scale.
        guidance_scale: the nearest measured scale decides; ``None`` means strong guidance, whose choices are
            stable without guidance too.
    """
    by_guidance = _table()[kind][scheduler]
    scales = sorted(by_guidance, key=float)
    scale = scales[-1]
    if guidance_scale is not None:
        scale = min(scales, key=lambda s: abs(math.log(float(s)) - math.log(max(guidance_scale, 1.0))))
    by_steps = by_guidance[scale]
    nearest = min(by_steps, key=lambda n: abs(math.log(int(n)) - math.log(steps)))
    return {**_MEASURED, **_MEASURED_OF.get(scheduler, {}), **by_steps[nearest]["options"]}


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(resources.files(__package__).joinpath("presets.json").read_text())
    return table
