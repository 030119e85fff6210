"""Options of a scheduler from the words of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Scheduler options from ``key=value`` words; values are JSON where they parse as such, else text.

    Raises:
        ValueError: a word has no ``=``, a key comes twice, or a number is not finite.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"option {pair!r} is not of the form key=value")
        if key in options:
            raise ValueError(f"option {key!r} is given twice")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
        try:
            json.dumps(options[key], allow_nan=False)
        except ValueError:
            raise ValueError(f"option {pair!r} is not finite; give finite numbers") from None
    return options
