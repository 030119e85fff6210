"""Fits a plan to a model: its times, its labels and its coefficients, to the ends of fine runs from the same noises.

LD3 (arXiv 2405.15506) fits times and labels, S4S (arXiv 2502.17423) coefficients and times, both by gradient descent
through the network. A plan has a few dozen numbers and the error is a norm, so the Gauss-Newton method needs some ten
steps instead of hundreds; its derivatives along every number are differences of runs, which begin where the number
first matters. Nothing is stored for a backward pass, and the network may be anything that can be called.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .builder import PlanBuilder
from .grid import Grid
from .learned import LearnedTable
from .prediction import conversions
from .scheduler import PlanScheduler
from .trajectory import Network, asked, combined, fine_trajectory, grid_of, limits_of
from .weights import Node

FREE = ("times", "end", "labels", "scales", "weights")
"""What can be fitted."""

_LABEL_UNIT = 0.03
"""Of the range of labels: a change that matters about as much as 1 does for the logarithm of an interval."""
_DIFFERENCE = {"times": 0.005, "end": 0.002, "labels": 0.02, "scales": 0.002, "weights": 0.004}
_LEAST_DAMPING = 1e-4


@dataclass(frozen=True)
class Problem:
    """A batch of noises, and where the exact flow takes them.

    Attributes:
        network: the model; it knows the noises' conditions.
        start: ``(batch, ...)`` samples at the first level.
        end: the exact ones at the last.
    """

    network: Network
    start: torch.Tensor
    end: torch.Tensor


@dataclass(frozen=True)
class FitStep:
    """The state after an iteration.

    Attributes:
        iteration: 0 is the start.
        error: mean over the noises of each sample's root mean square distance to the exact end.
        validation: the same on noises that only choose when to stop, ``None`` without.
        evaluations: of the network so far, counted for each sample.
    """

    iteration: int
    error: float
    validation: float | None
    evaluations: int

    @property
    def measure(self) -> float:
        """What is best when it is smallest."""
        return self.error if self.validation is None else self.validation


@dataclass(frozen=True)
class PlanFit:
    """What ``fit_plan`` found.

    Attributes:
        table: for ``LearnedScheduler(table=...)``; the best one on the noises for validation, or else on the seen ones.
        history: from the start on.
    """

    table: LearnedTable
    history: list[FitStep]


def fit_plan(
    scheduler: PlanScheduler,
    problems: Sequence[Problem],
    *,
    validation: Sequence[Problem] = (),
    free: Sequence[str] = FREE,
    iterations: int = 30,
    patience: int = 4,
    checkpoint: str | Path | None = None,
    progress: Callable[[FitStep], None] | None = None,
) -> PlanFit:
    """Fits the plan of a scheduler by the Gauss-Newton method with Marquardt's damping.

    What is minimised is the mean over the noises of each sample's distance to the exact end: unlike its square it is
    not ruled by the few samples that end in another mode. Sums of coefficients stay consistent, and an interval of
    times stays within a factor of 4 of what it was, whatever the fit does.

    Args:
        scheduler: where the fit begins: any deterministic sampler of ours, with its timesteps set.
        problems: noises to fit to, 32 or more in all, in batches that the network takes at once; ``problem_of`` makes
            one.
        validation: others; the fit ends when they no longer gain, and returns what was best for them.
        free: what may change, of ``FREE``: the times; how much noise the end keeps (few calls blur, and a little noise
            is nearer to the detail that they miss than none; leave it out for pixels that are looked at closely); the
            labels that the network is given for the times; the scales of its inputs; and the coefficients of everything
            that it said.
        iterations: at most. One costs about ``n^2 / 2 + 3 n`` calls of the network a noise with labels, scales and
            coefficients of ``n`` calls, and as many times ``n / 3`` for large ``n``.
        patience: iterations without gain after which it ends.
        checkpoint: a JSON file, written after every iteration; a fit that finds one goes on from it, to the same end.
        progress: called after every iteration.

    Raises:
        ValueError: no timesteps were set, a stochastic sampler, nothing free, a checkpoint of another fit, or a network
            that does not return finite numbers.
    """
    unknown = sorted(set(free) - set(FREE))
    if unknown or not free:
        raise ValueError(f"free {list(free)} must name some of {', '.join(FREE)}")
    if iterations < 1 or patience < 1:
        raise ValueError(f"iterations {iterations} and patience {patience} must be at least 1")
    if not problems:
        raise ValueError("problems is empty; make some with problem_of")
    numbers = _Numbers(scheduler, free)
    if not len(numbers):
        raise ValueError(f"a run of {numbers.base.calls} call leaves nothing to fit; use more steps")
    fit = _Fit(scheduler, problems, validation, numbers)
    state = _State.load(checkpoint, fit.fingerprint()) or fit.begin()
    if len(state.history) == 1 and progress is not None:
        progress(state.history[0])
    while len(state.history) <= iterations and not state.is_over(patience):
        fit.iterate(state)
        if checkpoint is not None:
            state.save(checkpoint, fit.fingerprint())
        if progress is not None:
            progress(state.history[-1])
    return PlanFit(fit.numbers.table(np.array(state.best)), state.history)


@torch.no_grad()
def problem_of(scheduler: PlanScheduler, network: Network, noise: torch.Tensor, *, steps: int = 200) -> Problem:
    """A problem whose exact ends come from a fine run.

    Args:
        scheduler: with its timesteps set; the run begins and ends where its runs do.
        network: the model.
        noise: ``(batch, ...)`` standard normal.
        steps: of the fine run, about.
    """
    truth = fine_trajectory(scheduler, network, noise, steps=max(steps, grid_of(scheduler).steps))
    return Problem(network, truth.samples[0], truth.samples[-1])


class _Numbers:
    """What is fitted, as a vector that is 0 at the start, and the tables that such vectors stand for."""

    def __init__(self, scheduler: PlanScheduler, free: Sequence[str]) -> None:
        self.scheduler, self.free = scheduler, tuple(name for name in FREE if name in free)
        self.grid, self.schedule = grid_of(scheduler), scheduler.schedule
        self.base = LearnedTable.of(scheduler.plan)
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
        """The first call that each number changes something about."""
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
            lowest, highest = (float(self.schedule.timestep(level)) for level in self._ends())
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

    def _ends(self) -> tuple[float, float]:
        return self.schedule.min_level, self.schedule.max_level

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


class _Fit:
    """The normal equations of a problem."""

    def __init__(
        self,
        scheduler: PlanScheduler,
        problems: Sequence[Problem],
        validation: Sequence[Problem],
        numbers: _Numbers,
    ) -> None:
        self.problems, self.validation, self.numbers = problems, validation, numbers
        self.runner = _Runner(scheduler)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must have been made with."""
        sums = [
            [float(tensor.double().sum()) for tensor in (part.start, part.end)]
            for part in (*self.problems, *self.validation)
        ]
        return {"table": self.numbers.base.to_dict(), "free": list(self.numbers.free), "noises": sums}

    def begin(self) -> _State:
        start = np.zeros(len(self.numbers))
        state = _State(start.tolist(), start.tolist(), 1e-2, False, [])
        self._record(state, 0, self.error(start, self.problems))
        return state

    def iterate(self, state: _State) -> None:
        """One step, with as much damping as it takes to gain."""
        before = state.history[-1]
        self.runner.evaluations = before.evaluations
        values, error = np.array(state.values), before.error
        matrix, vector = self.equations(values)
        scale = np.diag(matrix) + 1e-9 * np.trace(matrix) / len(vector)
        state.is_stuck = True
        for _ in range(8):
            trial = values + np.linalg.solve(matrix + np.diag(state.damping * scale), -vector)
            tried = self.error(trial, self.problems)
            if tried < error:
                state.values, error, state.is_stuck = trial.tolist(), tried, False
                state.damping = max(0.3 * state.damping, _LEAST_DAMPING)
                break
            state.damping *= 6.0
        self._record(state, before.iteration + 1, error)

    def _record(self, state: _State, iteration: int, error: float) -> None:
        held = self.error(np.array(state.values), self.validation) if self.validation else None
        step = FitStep(iteration, error, held, self.runner.evaluations)
        if all(step.measure < other.measure for other in state.history):
            state.best = state.values
        state.history.append(step)

    @torch.no_grad()
    def equations(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and vector of the normal equations, of residuals whose squares add up to the samples' distances."""
        size = len(self.numbers)
        matrix, vector = np.zeros((size, size)), np.zeros(size)
        table = self.numbers.table(values)
        changed = [
            self.numbers.table(values + step * unit)
            for step, unit in zip(self.numbers.steps, np.eye(size), strict=True)
        ]
        for problem in self.problems:
            root = math.sqrt(problem.end[0].numel())
            run = self.runner.run(table, problem)
            residual = (run.end - problem.end).flatten(1).double() / root
            norm = residual.norm(dim=1, keepdim=True).clamp(min=1e-12)
            rows = []
            for other, first, step in zip(changed, self.numbers.first, self.numbers.steps, strict=True):
                end = self.runner.run(other, problem, run, first).end
                slope = (end - run.end).flatten(1).double() / (float(step) * root)
                along = (residual * slope).sum(1, keepdim=True)
                rows.append((slope / norm.sqrt() - 0.5 * residual * along / norm**2.5).flatten())
            jacobian = torch.stack(rows)
            matrix += (jacobian @ jacobian.T).cpu().numpy()
            vector += (jacobian @ (residual / norm.sqrt()).flatten()).cpu().numpy()
        if not (np.isfinite(matrix).all() and np.isfinite(vector).all()):
            raise ValueError("network returned numbers that are not finite near the present plan")
        return matrix, vector

    @torch.no_grad()
    def error(self, values: np.ndarray, problems: Sequence[Problem]) -> float:
        """Mean of the samples' distances; infinite where a run is not finite."""
        table, total = self.numbers.table(values), 0.0
        for problem in problems:
            end = self.runner.run(table, problem).end
            total += float((end - problem.end).flatten(1).double().square().mean(1).sqrt().sum())
        return total / sum(len(p.start) for p in problems) if math.isfinite(total) else math.inf


@dataclass(frozen=True)
class _Run:
    """What a run went through: samples and predicted clean samples of its calls, and its end."""

    samples: list[torch.Tensor]
    cleans: list[torch.Tensor]
    end: torch.Tensor


class _Runner:
    """Runs tables, from where they differ from a run that is known.

    Attributes:
        evaluations: of the network, counted for each sample.
    """

    def __init__(self, scheduler: PlanScheduler) -> None:
        self.scheduler = scheduler
        self.limits = limits_of(scheduler)
        self.evaluations = 0

    def run(self, table: LearnedTable, problem: Problem, known: _Run | None = None, first: int = 0) -> _Run:
        """The run of a table, whose calls before ``first`` are those of ``known``."""
        samples = [] if known is None else known.samples[:first]
        cleans = [] if known is None else known.cleans[:first]
        nodes = table.nodes(self.scheduler.schedule)
        x = self._next(table, nodes, samples, cleans) if samples else problem.start
        for k in range(len(samples), table.calls):
            samples.append(x)
            cleans.append(self._clean(problem.network, x, table.labels[k]))
            x = self._next(table, nodes, samples, cleans)
        return _Run(samples, cleans, x)

    def _clean(self, network: Network, x: torch.Tensor, label: float) -> torch.Tensor:
        schedule, config = self.scheduler.schedule, self.scheduler.config
        level = float(schedule.level(label))
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(level))
        data, _ = conversions(schedule, config.prediction_type, level, alpha, sigma)
        assert data is not None
        self.evaluations += len(x)
        output = asked(self.scheduler, network, x, torch.tensor(label, dtype=torch.float32), schedule.in_scale(level))
        clean = x * data[0] + output.to(x.dtype) * data[1]
        return self.limits(clean) if self.limits else clean

    @staticmethod
    def _next(
        table: LearnedTable, nodes: Sequence[Node], samples: list[torch.Tensor], cleans: list[torch.Tensor]
    ) -> torch.Tensor:
        k = len(samples) - 1
        weights = [table.noise[k][j] / nodes[j].sigma for j in range(k + 1)]
        return combined(
            [*weights, *(table.data[k][j] - w * nodes[j].alpha for j, w in enumerate(weights))], [*samples, *cleans]
        )


@dataclass
class _State:
    """Where a fit stands."""

    values: list[float]
    best: list[float]
    damping: float
    is_stuck: bool
    history: list[FitStep]

    def is_over(self, patience: int) -> bool:
        """Whether no step gains, or the last ones gained less than a thousandth."""
        measures = [step.measure for step in self.history]
        if self.is_stuck or len(measures) <= patience:
            return self.is_stuck
        return min(measures[-patience:]) > 0.999 * min(measures[:-patience])

    def save(self, path: str | Path, fingerprint: Mapping[str, Any]) -> None:
        partial = Path(path).with_name(Path(path).name + ".partial")
        partial.write_text(json.dumps({"fit": fingerprint, **asdict(self)}, indent=1) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path | None, fingerprint: Mapping[str, Any]) -> _State | None:
        if path is None or not Path(path).exists():
            return None
        try:
            data = json.loads(Path(path).read_text())
            made_with = data.pop("fit")
            state = cls(**{**data, "history": [FitStep(**step) for step in data["history"]]})
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"checkpoint {path} holds no fit; remove it to begin anew") from None
        if made_with != json.loads(json.dumps(fingerprint)):
            raise ValueError(f"checkpoint {path} belongs to another fit; name another file, or remove it to begin anew")
        return state
