"""Pictures of benchmarks and runs: what they need, and files that appear whole or not at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .files import replace_file

_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Refuses what ``save_figure`` could not write, before anything is measured.

    Raises:
        ValueError: an unknown suffix, or no matplotlib.
    """
    if path.suffix not in _FORMATS:
        raise ValueError(f"plot {path} must end in one of {', '.join(_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('plot needs matplotlib; install it with pip install "fewstep[plot]"')


def save_figure(figure: Any, path: Path, *, dpi: int = 150) -> None:
    """Writes a matplotlib figure in the format of the path's suffix."""
    with replace_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=dpi)
