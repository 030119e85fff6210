"""A plan as a vector: times, labels, scales and coefficients around those of a known sampler, always consistent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .builder import PlanBuilder
from .grid import Grid
from .learned import LearnedTable
from .scheduler import PlanScheduler
from .trajectory import grid_of

FREE = ("times", "end", "labels", "scales", "weights")
"""What can be fitted."""

_LABEL_UNIT = 0.03
"""Of the range of labels: a change that matters about as much as 1 does for the logarithm of an interval."""
_DIFFERENCE = {"times": 0.005, "end": 0.002, "labels": 0.02, "scales": 0.002, "weights": 0.004}


class PlanNumbers:
    """What is fitted, as a vector that is 0 at the start, and the tables that such vectors stand for.

    Args:
        scheduler: the start, with its timesteps set.
        free: what is fitted.
        reach: how high the labels go, as a share of their range. The sample of the first call is noise whatever the
            model is told, and a model that is told a lower level says more about it.

    Attributes:
        base: the table of the vector 0.
        parts: where in the vector each of ``free`` stands.
        first: the first call that each number changes something about.
        steps: of the differences along each number.
    """

    def __init__(self, scheduler: PlanScheduler, free: Sequence[str], reach: float = 1.0) -> None:
        self.scheduler, self.free = scheduler, tuple(name for name in FREE if name in free)
        self.grid, self.schedule = grid_of(scheduler), scheduler.schedule
        self.base = LearnedTable.of(scheduler.plan)
        if reach != 1.0:
            self.base = self._reaching(reach)
        calls = self.base.calls
        sizes = {
            "times": self.grid.steps if self.grid.steps > 1 else 0,
            "end": 1,
            "labels": calls,
            "scales": calls - 1,
            "weights": calls * (calls - 1),
        }
        self.parts: dict[str, slice] = {}
        self.first: list[int] = []
        for name in self.free:
            begin = len(self.first)
            self.parts[name] = slice(begin, begin + sizes[name])
            self.first += self._first(name, sizes[name])
        self.steps = np.concatenate([np.full(sizes[name], _DIFFERENCE[name]) for name in self.free] or [np.zeros(0)])
        if "labels" in self.parts:
            # The first label is the highest and can only fall.
            self.steps[self.parts["labels"].start] *= -1.0

    def __len__(self) -> int:
        return len(self.first)

    def _first(self, name: str, size: int) -> list[int]:
        if name == "times":
            return [1] * size
        if name == "end":
            return [self.base.calls if self.base.calls == self.grid.steps else 1]
        if name == "weights":
            # Row k has k numbers for the clean samples and k for the noises; it makes the sample of call k + 1.
            return [k + 1 for k in range(self.base.calls) for _ in range(2 * k)]
        return list(range(size)) if name == "labels" else list(range(1, size + 1))

    def table(self, values: np.ndarray) -> LearnedTable:
        table = self.base
        times, end = (values[self.parts.get(name, slice(0))] for name in ("times", "end"))
        if times.any() or end.any():
            table = self._at(self._levels(times if len(times) else np.zeros(self.grid.steps), *end))
        if "labels" in self.parts:
            ends = self.schedule.min_level, self.schedule.max_level
            lowest, highest = (float(self.schedule.timestep(level)) for level in ends)
            moved = np.array(table.labels) + values[self.parts["labels"]] * _LABEL_UNIT * (highest - lowest)
            labels = np.clip(moved, min(lowest, *table.labels), max(highest, *table.labels))
            table = replace(table, labels=tuple(labels.tolist()))
        if "weights" in self.parts:
            table = self._weighted(table, iter(values[self.parts["weights"]].tolist()))
        if "scales" in self.parts:
            scales = (1.0, *np.exp(values[self.parts["scales"]]).tolist())
            data, noise = (
                tuple(tuple(c * r for c in row) for row, r in zip(rows, (*scales[1:], 1.0), strict=True))
                for rows in (table.data, table.noise)
            )
            table = replace(table, scales=scales, data=data, noise=noise)
        return table

    def _levels(self, values: np.ndarray, end: float = 0.0) -> list[float]:
        """Levels whose intervals in ``atan(sigma / alpha)`` are those of the start times powers of e.

        Args:
            values: exponents.
            end: share of the last interval that is left out; below 0 is 0.
        """
        angles = np.array([math.atan2(node.sigma, node.alpha) for node in self.grid.nodes])
        # A fit that lets two times coincide has wasted a call: factors stay between 1/2 and 2, before normalising.
        widths = -np.diff(angles) * np.exp(math.log(2.0) * np.tanh(values / math.log(2.0)))
        widths *= (angles[0] - angles[-1]) / widths.sum()
        widths[-1] *= 1.0 - min(max(end, 0.0), 0.9)
        levels = [float(self.schedule.level_of_rho(math.tan(angle))) for angle in angles[0] - np.cumsum(widths)]
        return [float(self.grid.levels[0]), *levels[:-1], levels[-1] if end > 0.0 else float(self.grid.levels[-1])]

    def _reaching(self, reach: float) -> LearnedTable:
        """The start with the labels of all calls, and all times but the first, moved down."""
        lowest = float(self.schedule.timestep(self.schedule.min_level))
        labels = lowest + reach * (self.grid.timesteps - lowest)
        inner = np.minimum(self.schedule.level(labels[1:]), self.grid.levels[1:-1])
        levels = [self.grid.levels[0], *inner, self.grid.levels[-1]]
        self.grid = Grid.of(self.schedule, levels, [labels[0], *self.schedule.timestep(inner)])
        return self._at(self.grid.levels.tolist())

    def _at(self, levels: list[float]) -> LearnedTable:
        """The start's solver at other times."""
        labels = [self.grid.timesteps[0], *self.schedule.timestep(levels[1:-1])]
        grid = Grid.of(self.schedule, levels, labels)
        builder = PlanBuilder(grid, self.scheduler.config.prediction_type)
        return LearnedTable.of(self.scheduler._write(builder, self.scheduler._chosen))

    def _weighted(self, table: LearnedTable, values: Iterator[float]) -> LearnedTable:
        """Shifts weight from the newest prediction to older ones."""
        rows: dict[str, list[tuple[float, ...]]] = {"data": [], "noise": []}
        sigmas = [node.sigma for node in table.nodes(self.schedule)]
        for k in range(table.calls):
            for name, old in (("data", table.data[k]), ("noise", table.noise[k])):
                unit = 1.0 if name == "data" else max(sigmas[k + 1], 0.3 * sigmas[k])
                moved = [unit * next(values) for _ in range(k)]
                rows[name].append((*(c + m for c, m in zip(old, moved, strict=False)), old[-1] - math.fsum(moved)))
        return replace(table, data=tuple(rows["data"]), noise=tuple(rows["noise"]))
