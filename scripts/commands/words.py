"""Lists of names and numbers from the words of the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from ..generation.choices import unknown

Number = TypeVar("Number", int, float)


def parse_names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Names from ``"a,b"``.

    Raises:
        ValueError: one is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise unknown(option, name, known)
    return names


def parse_numbers(option: str, text: str, low: float, high: float = math.inf, *, empty: bool = False) -> list[float]:
    """Numbers from ``"0.5,1"``.

    Args:
        option: its name, without dashes.
        text: of the option.
        low: least number.
        high: largest one.
        empty: whether an empty text stands for no number.

    Raises:
        ValueError: no numbers in the range, or one twice.
    """
    return [] if empty and not text else _parsed(option, text, low, high, float, "numbers")


def parse_whole_numbers(option: str, text: str, low: int, high: float = math.inf) -> list[int]:
    """Whole numbers from ``"1,2"``; see `parse_numbers`."""
    return _parsed(option, text, low, high, int, "whole numbers")


def _parsed(option: str, text: str, low: float, high: float, kind: Callable[[str], Number], name: str) -> list[Number]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(low <= number <= high for number in numbers) or len(set(numbers)) < len(numbers):
        span = f"from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
        raise ValueError(f"--{option} {text!r}: give {name} {span}, each once, separated by commas")
    return numbers
