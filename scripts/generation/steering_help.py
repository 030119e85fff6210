"""Methods, options and rewards of steering, for ``fewstep generate --help``."""

from __future__ import annotations

import textwrap
from typing import Any

from .steering import METHODS, REWARDS


def help_text() -> str:
    """Methods with their options and defaults, and rewards, for the help."""
    lines = ["\b", "Methods of --steer and their options (--steer-option):"]
    for name, method in METHODS.items():
        lines += _wrapped(f"  {name:<16}{method.summary}", 18)
        lines += _wrapped(18 * " " + " ".join(f"{key}={_shown(value)}" for key, value in method.options.items()), 18)
    lines += [
        "  pick=best takes the particle of the highest reward, draw any; combine=ranks",
        "  judges by the mean rank of several rewards in the place of their sum.",
    ]
    lines += ["", "\b", "Rewards of --reward, with a weight if need be, as in -0.5*brightness:"]
    for name, usage in REWARDS.items():
        lines += _wrapped(f"  {name:<16}{usage}", 18)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def _wrapped(line: str, indent: int, width: int = 78) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent=indent * " ", drop_whitespace=True, break_long_words=False)
