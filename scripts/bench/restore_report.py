"""What follows from the restored images of ``restore``: claims, the table, the file and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..plots import save_figure
from .estimates import from_json, to_json
from .output import environment, read_entries, table
from .restore import BASELINES, MEASURES, METHODS, Point, Settings


def equal_or_better(point: Point, than: Point, measure: str) -> bool:
    """Whether no loss against another point shows: it is within the 95 % interval of the paired difference."""
    one, other = point.figures[measure], than.figures[measure]
    gain = one - other
    return MEASURES[measure].best * gain.value >= -gain.half_width()


def fewest_calls(points: Sequence[Point], than: Point, measure: str) -> Point | None:
    """Of some points, the one with the fewest calls that is equal to or better than another point."""
    able = [point for point in points if equal_or_better(point, than, measure)]
    return min(able, key=lambda point: point.calls, default=None)


def claims(points: Sequence[Point]) -> list[str]:
    """How many times fewer calls the MR Sampler needs than each baseline at its most calls, a line a measure.

    With the calls at which the baseline itself is as good as at its most.
    """
    ours = [point for point in points if point.method.startswith("mr-")]
    lines = []
    for baseline in BASELINES if ours else ():
        its = [point for point in points if point.method == baseline]
        most = max(its, key=lambda point: point.calls, default=None)
        if most is None:
            continue
        for name, measure in MEASURES.items():
            enough = fewest_calls(its, most, name)
            assert enough is not None
            line = f"{measure.title}: {baseline} at {most.calls} calls {most.figures[name].value:.{measure.digits}f}"
            line += f" ({enough.calls} do as well); "
            found = fewest_calls(ours, most, name)
            if found is None:
                line += "the MR Sampler does not reach it"
            else:
                line += f"{found.method} at {found.calls} {found.figures[name].value:.{measure.digits}f}: "
                line += f"{most.calls / found.calls:.3g} times fewer ({enough.calls / found.calls:.3g})"
            lines.append(line)
    return lines


def restore_table(points: Sequence[Point]) -> str:
    """A line a method and number of calls, with 95 % intervals."""
    rows = []
    for point in _ordered(points):
        figures = []
        for name, measure in MEASURES.items():
            estimate = point.figures[name]
            figures.append(f"{estimate.value:.{measure.digits}f} +- {estimate.half_width():.{measure.digits}f}")
        rows.append([point.method, str(point.calls), *figures])
    return table(["method", "calls", *(f"{measure.title}, 95 %" for measure in MEASURES.values())], rows)


def _ordered(points: Sequence[Point]) -> list[Point]:
    methods = ["degraded", *METHODS]
    return sorted(points, key=lambda point: (methods.index(point.method), point.calls))


def report(settings: Settings, points: Sequence[Point]) -> dict[str, Any]:
    """The content of the JSON file, from which a table goes on."""
    return {
        "environment": environment(),
        "settings": asdict(settings),
        "points": [
            {**vars(point), "figures": {name: to_json(figure) for name, figure in point.figures.items()}}
            for point in _ordered(points)
        ],
        "claims": claims(points),
    }


def read_points(path: Path, settings: Settings) -> list[Point]:
    """The points that a file of an earlier run holds; none where there is no file.

    Raises:
        ValueError: the file is none of this benchmark, or of other settings.
    """
    return read_entries(
        path,
        "table",
        asdict(settings),
        lambda content: [
            Point(one["method"], one["calls"], {name: from_json(one["figures"][name]) for name in MEASURES})
            for one in content["points"]
        ],
    )


def plot_restore(settings: Settings, points: Sequence[Point], path: Path) -> None:
    """Draws every measure over the calls.

    Args:
        settings: for the title.
        points: of the table.
        path: of the picture, ending in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for panel, (name, measure) in zip(panels, MEASURES.items(), strict=True):
        for method in METHODS:
            its = [point for point in _ordered(points) if point.method == method]
            if not its:
                continue
            panel.errorbar(
                [point.calls for point in its],
                [point.figures[name].value for point in its],
                yerr=[point.figures[name].half_width() for point in its],
                label=method,
                marker="o",
                capsize=2,
                linestyle="--" if method in BASELINES else "-",
            )
        numbers = sorted({point.calls for point in points} - {0})
        panel.set(xscale="log", xlabel="network calls", ylabel=measure.title, xticks=numbers, xticklabels=numbers)
        panel.minorticks_off()
        if measure.best < 0:
            panel.set(yscale="log")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{Path(settings.model).name}: {settings.count} test images")
    save_figure(figure, path)
