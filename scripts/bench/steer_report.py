"""What follows from the images of ``steer``: intervals over seeds, the tables, the papers' claims, file and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..plots import save_figure
from .estimates import Mean, mean_of
from .output import environment, read_entries, table
from .steer import REFERENCES, TARGETS, Point, Settings
from .steer_methods import METHODS
from .steer_reference import MEASURES

BASELINES = ("best-of-n", "importance", "fk", "smc", "svdd", "gradient")
"""What tree sampling is compared with: methods that do not give up variety for reward on purpose."""

_EQUAL_CALLS = (("svdd", "best-of-n"), ("svdd", "fk"), ("svdd", "smc"), ("svdd-greedy", "best-of-n"))


class Cell(NamedTuple):
    """A method with a budget.

    Attributes:
        target: key of ``TARGETS``.
        method: name.
        runs: budget an image, in runs.
    """

    target: str
    method: str
    runs: int


class Results:
    """Points, by cell and seed.

    Args:
        settings: of the measurement.
        points: of it.

    Attributes:
        cells: in the order of the table.
    """

    def __init__(self, settings: Settings, points: Sequence[Point]) -> None:
        self._settings = settings
        self._points: dict[Cell, dict[int, Point]] = {}
        for point in points:
            self._points.setdefault(Cell(point.target, point.method, point.runs), {})[point.seed] = point
        methods = [*REFERENCES, *METHODS]
        self.cells = sorted(self._points, key=lambda c: ([*TARGETS].index(c.target), methods.index(c.method), c.runs))

    def complete(self) -> Results:
        """Of the cells with all seeds alone: a measurement that was stopped leaves some with fewer."""
        seeds = max((len(found) for found in self._points.values()), default=0)
        kept = [point for found in self._points.values() if len(found) == seeds for point in found.values()]
        return Results(self._settings, kept)

    def points(self, cell: Cell) -> list[Point]:
        """Of a cell, by seed."""
        return [self._points[cell][seed] for seed in sorted(self._points[cell])]

    def of(self, target: str, method: str) -> list[Cell]:
        """The cells of a method, by rising budget."""
        return [cell for cell in self.cells if (cell.target, cell.method) == (target, method)]

    def mean(self, cell: Cell, measure: str) -> Mean:
        """Of a figure over the seeds."""
        return mean_of([point.figures[measure] for point in self.points(cell)])

    def calls(self, cell: Cell) -> float:
        """Network evaluations an image."""
        points = self.points(cell)
        return sum(point.calls for point in points) / (self._settings.count * len(points))

    def change(self, cell: Cell, than: Cell, measure: str) -> Mean | None:
        """The mean difference of two cells over the seeds that both have; ``None`` where there is none."""
        one, other = self._points[cell], self._points[than]
        shared = sorted({*one} & {*other})
        return mean_of([one[s].figures[measure] - other[s].figures[measure] for s in shared]) if shared else None

    def equal_or_better(self, cell: Cell, than: Cell, measure: str) -> bool:
        """Whether no loss shows: the 95 % interval of the difference holds 0, or there is a gain."""
        change = self.change(cell, than, measure)
        return change is not None and MEASURES[measure].best * change.value >= -change.half_width

    def fewest(self, cells: Sequence[Cell], than: Cell, measure: str) -> Cell | None:
        """Of a method's cells by rising budget, the first from which on none shows a loss against another cell.

        A single one may show none for its wide interval alone.
        """
        found = None
        for cell in reversed(cells):
            if not self.equal_or_better(cell, than, measure):
                break
            found = cell
        return found


def claims(results: Results) -> list[str]:
    """What the papers say of the trees and of SVDD, as it was found; nothing where there is one seed."""
    lines, results = [], results.complete()
    for target in TARGETS:
        for measure in ("frechet", "pixels"):
            last = [cells[-1] for method in BASELINES if (cells := results.of(target, method))]
            if last:
                best = min(last, key=lambda cell: results.mean(cell, measure).value)
                for own in ("dts", "dts-uniform"):
                    lines += _saving(results, target, own, best.method, measure)
        for own in ("dts-star", "dts-star-narrow"):
            for rival in ("best-of-n", "best-of-all"):
                lines += _saving(results, target, own, rival, "reward")
        for own, rival in _EQUAL_CALLS:
            lines += _gains(results, target, own, rival)
    return lines


def _saving(results: Results, target: str, own: str, rival: str, measure: str) -> list[str]:
    """How many times fewer calls a method needs for what a rival has at its most calls; and the rival itself."""
    ours, theirs = results.of(target, own), results.of(target, rival)
    if not ours or not theirs:
        return []
    most, digits = theirs[-1], MEASURES[measure].digits
    found = results.fewest(ours, most, measure)
    shown = ours[-1] if found is None else found
    change = results.change(shown, most, measure)
    if change is None or math.isinf(change.half_width):
        return []
    enough = results.fewest(theirs, most, measure)
    assert enough is not None
    line = f"{target}: {MEASURES[measure].title}: {rival} at {results.calls(most):g} calls "
    line += f"{results.mean(most, measure).value:.{digits}f} (no loss shows from {results.calls(enough):g} on); "
    line += f"{own} at {results.calls(shown):g} {results.mean(shown, measure).value:.{digits}f} "
    line += f"({change.show(digits, sign=True)}): "
    if found is None:
        return [line + "not reached"]
    return [line + f"no loss shows at {results.calls(most) / results.calls(found):.3g} times fewer"]


def _gains(results: Results, target: str, own: str, rival: str) -> list[str]:
    """Differences at equal budgets above one run."""
    lines = []
    for measure in ("reward", "frechet", "pixels"):
        parts = []
        for cell in results.of(target, own):
            than = Cell(target, rival, cell.runs)
            if cell.runs == 1 or than not in results.cells:
                continue
            change = results.change(cell, than, measure)
            if change is not None and math.isfinite(change.half_width):
                parts.append(f"{change.show(MEASURES[measure].digits, sign=True)} at {results.calls(cell):g}")
        if parts:
            lines.append(f"{target}: {MEASURES[measure].title}: {own} against {rival}: {', '.join(parts)} calls")
    return lines


def steer_table(results: Results, *, markdown: bool = False) -> str:
    """A line a target, method and budget, with 95 % intervals over the seeds."""
    rows = []
    for cell in results.cells:
        figures = [results.mean(cell, name).show(measure.digits) for name, measure in MEASURES.items()]
        seeds = str(len(results.points(cell)))
        rows.append([cell.target, cell.method, f"{results.calls(cell):g}", seeds, *figures])
    titles = [measure.title for measure in MEASURES.values()]
    return table(["target", "method", "calls/image", "seeds", *titles], rows, markdown=markdown)


def report(settings: Settings, points: Sequence[Point]) -> dict[str, Any]:
    """The content of the JSON file, from which a measurement goes on."""
    return {
        "environment": environment(),
        "settings": asdict(settings),
        "points": [asdict(point) for point in points],
        "claims": claims(Results(settings, points)),
    }


def read_points(path: Path, settings: Settings) -> list[Point]:
    """The points that a file of an earlier run holds; none where there is no file.

    Raises:
        ValueError: the file is none of this benchmark, or of other settings.
    """
    return read_entries(path, "table", asdict(settings), _read)


def _read(content: Mapping[str, Any]) -> list[Point]:
    points = [Point(**entry) for entry in content["points"]]
    if not all({*point.figures} == {*MEASURES} and point.target in TARGETS for point in points):
        raise ValueError("points of other measures or targets")
    return points


def plot_steer(settings: Settings, results: Results, path: Path) -> None:
    """Draws both distances and the reward over the calls.

    Args:
        settings: for the title.
        results: of the table.
        path: of the picture, ending in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(cell.target for cell in results.cells))
    figure = Figure(figsize=(15, 4.6 * len(targets)), layout="constrained")
    panels = figure.subplots(len(targets), 3, squeeze=False)
    for row, target in zip(panels, targets, strict=True):
        for panel, measure in zip(row, ("frechet", "pixels", "reward"), strict=True):
            _draw(panel, results, target, measure)
    panels[0][0].legend(fontsize=8)
    figure.suptitle(
        f"{Path(settings.model).name}, {settings.sampler}, {settings.steps} steps: sets of {settings.count} images, "
        f"lambda {settings.scale:g}; 95 % intervals over seeds"
    )
    save_figure(figure, path, dpi=130)


def _draw(panel: Any, results: Results, target: str, measure: str) -> None:
    # A mean log-probability nears 0 from below: its distance to 0 shows on a logarithmic axis.
    sign = -1.0 if measure == "reward" else 1.0
    for number, method in enumerate(METHODS):
        cells = results.of(target, method)
        if not cells:
            continue
        means = [results.mean(cell, measure) for cell in cells]
        panel.errorbar(
            [results.calls(cell) for cell in cells],
            [sign * mean.value for mean in means],
            yerr=[mean.half_width if math.isfinite(mean.half_width) else 0.0 for mean in means],
            label=method,
            color=f"C{number}",
            marker="o",
            capsize=2,
            linestyle="-" if method.startswith("dts") else "--",
        )
    for reference, style in zip(REFERENCES, (":", "-."), strict=True):
        for cell in results.of(target, reference):
            value = sign * results.mean(cell, measure).value
            if value > 0.0:
                panel.axhline(value, color="grey", linestyle=style, linewidth=1, label=reference)
    title = "minus mean reward" if measure == "reward" else f"{MEASURES[measure].title} distance"
    panel.set(xscale="log", yscale="log", xlabel="network calls an image", ylabel=f"{title}, target {target}")
    panel.grid(alpha=0.3)
