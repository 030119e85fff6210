"""Errors for a name that is none of the known ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_SHOWN = 80


def unknown(argument: str, value: str, known: Iterable[str]) -> ValueError:
    """The error for ``value`` of ``argument``, with the known names, nearest first."""

    def spelled(name: str) -> str:
        return name.lower().replace("+", "p").replace("_", "-")

    def likeness(name: str) -> float:
        return SequenceMatcher(None, spelled(value), spelled(name)).ratio()

    names = sorted(known, key=likeness, reverse=True)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ValueError(f"{argument} {value!r} is not known; known are (nearest first) {', '.join(names[:_SHOWN])}{rest}")
