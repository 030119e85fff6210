"""Checked reading of JSON data, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def fields_of(data: Any, name: str, wanted: Sequence[str], known: Sequence[str] = ()) -> dict[str, Any]:
    """The wanted entries of a mapping, all of which must be there, and no others but the known ones.

    Args:
        data: read from JSON.
        name: of the mapping, for errors.
        wanted: keys.
        known: further keys that may be there.

    Raises:
        ValueError: naming what is missing or unknown.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{name} is {data!r:.80}; give a mapping with {', '.join(wanted)}")
    missing = [key for key in wanted if key not in data]
    unknown = [key for key in data if key not in wanted and key not in known]
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]!r} is unknown"
        raise ValueError(f"{name} is damaged: {problem}; take what to_dict returned")
    return {key: data[key] for key in wanted}


def integer(value: Any, name: str) -> int:
    """``value`` as a whole number.

    Raises:
        ValueError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer():
        raise ValueError(f"{name} is {value!r}; give a whole number")
    return int(value)


def numbers(values: Any, name: str) -> tuple[float, ...]:
    """``values`` as numbers.

    Raises:
        ValueError: naming them.
    """
    good = isinstance(values, (list, tuple)) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    )
    if not good:
        raise ValueError(f"{name} is {values!r:.80}; give numbers")
    return tuple(float(v) for v in values)
