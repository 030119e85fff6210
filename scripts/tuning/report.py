"""What a tuning leaves behind: its settings, its report, and a picture of how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import changed_settings, write_json
from ..plots import save_figure

SETTINGS, REPORT = "settings.json", "tuning.json"


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder, or sees to it that what was begun in it is the same tuning.

    Raises:
        ValueError: the folder holds something else.
    """
    if (folder / REPORT).exists():
        raise ValueError(f"--output {folder} holds a finished tuning already; name another folder or remove it")
    different = changed_settings(folder / SETTINGS, settings)
    if different:
        raise ValueError(
            f"--output {folder} holds an unfinished tuning with other settings ({', '.join(different)}); give the "
            "same ones to go on with it, or remove it to begin anew"
        )
    if different is not None:
        return
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ValueError(f"--output {folder} exists already; name a new folder")
    write_json(folder / SETTINGS, settings)


def describe(errors: Mapping[str, Mapping[str, Any]]) -> str:
    """The errors before and after as text, a line a set of noises."""
    lines = []
    for name, figures in errors.items():
        parts = []
        for statistic in ("mean", "median"):
            one = figures[statistic]
            low, high = one["change_interval"]
            parts.append(
                f"{statistic} {one['before']:.4f} -> {one['after']:.4f} "
                f"({one['change']:+.1%}; 95 %: {low:+.1%} to {high:+.1%})"
            )
        lines.append(f"{name.replace('_', ' '):>8}, {figures['samples']} noises: error {', '.join(parts)}")
    return "\n".join(lines)


def plot(path: Path, curves: Mapping[str, Sequence[float]], xlabel: str) -> None:
    """Draws what was minimised over the iterations.

    Args:
        path: ending in .png, .svg or .pdf.
        curves: by name.
        xlabel: what an iteration is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    panel = figure.subplots()
    for name, values in curves.items():
        panel.plot(range(len(values)), values, label=name)
    panel.set(xlabel=xlabel, ylabel="error", yscale="log")
    panel.grid(which="both", alpha=0.3)
    panel.legend()
    save_figure(figure, path)
