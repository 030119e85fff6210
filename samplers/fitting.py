"""Fits a plan to a model: its times, its labels and its coefficients, to the ends of fine runs from the same noises.

LD3 (arXiv 2405.15506) fits times and labels, S4S (arXiv 2502.17423) coefficients and times, both by gradient descent
through the network. A plan has a few dozen numbers and the error is a norm, so the Gauss-Newton method needs some ten
steps instead of hundreds; its derivatives along every number are differences of runs, which begin where the number
first matters. Nothing is stored for a backward pass, and the network may be anything that can be called.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import replaced
from .learned import LearnedTable
from .plan_numbers import FREE, PlanNumbers
from .scheduler import PlanScheduler
from .table_run import TableRunner
from .trajectory import Network, fine_trajectory, grid_of

_REACHES = (1.0, 0.85, 0.7)
"""Of the starts that are tried."""
_SCOUTING = 4
"""Iterations after which the best start is chosen."""
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
        reach: of the labels at the start that this iteration belongs to, as a share of their range.
        iteration: since that start, which is 0.
        error: mean over the noises of each sample's root mean square distance to the exact end.
        validation: the same on noises that only choose when to stop, ``None`` without.
        evaluations: of the network so far, counted for each sample.
    """

    reach: float
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
        history: of all starts, in order.
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
    times stays within a factor of 4 of what it was, whatever the fit does. Where times and labels are free, three
    starts are tried for 4 iterations each: the scheduler's, and others whose first call is told a lower level, which
    few-step samplers gain from; the best of them goes on.

    Args:
        scheduler: where the fit begins: any deterministic sampler of ours, with its timesteps set.
        problems: noises to fit to, 32 or more in all, in batches that the network takes at once; ``problem_of`` makes
            one.
        validation: others; the fit ends when they no longer gain, and returns what was best for them.
        free: what may change, of ``FREE``: the times; how much noise the end keeps (few calls blur, and a little noise
            is nearer to the detail that they miss than none; leave it out for pixels that are looked at closely); the
            labels that the network is given for the times; the scales of its inputs; and the coefficients of everything
            that it said.
        iterations: from a start, at most. One costs about 65 calls of the network a noise for a run of 5 calls, and
            450 for one of 10.
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
    reaches = _REACHES if {"times", "labels"} <= set(free) else _REACHES[:1]
    fits = {reach: _Fit(scheduler, problems, validation, PlanNumbers(scheduler, free, reach)) for reach in reaches}
    numbers = fits[1.0].numbers
    if not len(numbers):
        raise ValueError(f"a run of {numbers.base.calls} call leaves nothing to fit; use more steps")
    made_with = fits[1.0].fingerprint()
    walks = [] if checkpoint is None else _load(Path(checkpoint), made_with)
    for reach in reaches[len(walks) :]:
        walks.append(_Walk(reach, [0.0] * len(numbers), [0.0] * len(numbers), 1e-2, False, []))
    while (walk := _next(walks, iterations, patience)) is not None:
        done = max((step.evaluations for other in walks for step in other.steps), default=0)
        fits[walk.reach].advance(walk, done)
        if checkpoint is not None:
            _save(Path(checkpoint), made_with, walks)
        if progress is not None:
            progress(walk.steps[-1])
    best = min(walks, key=lambda walk: walk.measure)
    history = sorted((step for walk in walks for step in walk.steps), key=lambda step: step.evaluations)
    return PlanFit(fits[best.reach].numbers.table(np.array(best.best)), history)


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


class _Fit:
    """The normal equations of a problem."""

    def __init__(
        self,
        scheduler: PlanScheduler,
        problems: Sequence[Problem],
        validation: Sequence[Problem],
        numbers: PlanNumbers,
    ) -> None:
        self.problems, self.validation, self.numbers = problems, validation, numbers
        self.runner = TableRunner(scheduler)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must have been made with."""
        sums = [
            [float(tensor.double().sum()) for tensor in (part.start, part.end)]
            for part in (*self.problems, *self.validation)
        ]
        return {"table": self.numbers.base.to_dict(), "free": list(self.numbers.free), "noises": sums}

    def advance(self, walk: _Walk, evaluations: int) -> None:
        """The start's error, or one step from where the walk stands, with as much damping as it takes to gain.

        Args:
            walk: is changed.
            evaluations: of the network so far.
        """
        self.runner.evaluations = evaluations
        values = np.array(walk.values)
        if not walk.steps:
            self._record(walk, self.error(values, self.problems))
            return
        error = walk.steps[-1].error
        matrix, vector = self.equations(values)
        scale = np.diag(matrix) + 1e-9 * np.trace(matrix) / len(vector)
        walk.is_stuck = True
        for _ in range(8):
            trial = values + np.linalg.solve(matrix + np.diag(walk.damping * scale), -vector)
            tried = self.error(trial, self.problems)
            if tried < error:
                walk.values, error, walk.is_stuck = trial.tolist(), tried, False
                walk.damping = max(0.3 * walk.damping, _LEAST_DAMPING)
                break
            walk.damping *= 6.0
        self._record(walk, error)

    def _record(self, walk: _Walk, error: float) -> None:
        held = self.error(np.array(walk.values), self.validation) if self.validation else None
        step = FitStep(walk.reach, len(walk.steps), error, held, self.runner.evaluations)
        if step.measure < walk.measure:
            walk.best = walk.values
        walk.steps.append(step)

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
            run = self.runner.run(table, problem.network, problem.start)
            residual = (run.end - problem.end).flatten(1).double() / root
            norm = residual.norm(dim=1, keepdim=True).clamp(min=1e-12)
            rows = []
            for other, first, step in zip(changed, self.numbers.first, self.numbers.steps, strict=True):
                end = self.runner.run(other, problem.network, problem.start, run, first).end
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
            end = self.runner.run(table, problem.network, problem.start).end
            total += float((end - problem.end).flatten(1).double().square().mean(1).sqrt().sum())
        return total / sum(len(p.start) for p in problems) if math.isfinite(total) else math.inf


@dataclass
class _Walk:
    """Where the iteration from one start stands."""

    reach: float
    values: list[float]
    best: list[float]
    damping: float
    is_stuck: bool
    steps: list[FitStep]

    @property
    def measure(self) -> float:
        """Of its best step."""
        return min((step.measure for step in self.steps), default=math.inf)

    def is_over(self, patience: int) -> bool:
        """Whether no step gains, or the last ones gained less than a thousandth."""
        measures = [step.measure for step in self.steps]
        if self.is_stuck or len(measures) <= patience:
            return self.is_stuck
        return min(measures[-patience:]) > 0.999 * min(measures[:-patience])


def _next(walks: Sequence[_Walk], iterations: int, patience: int) -> _Walk | None:
    """The walk whose turn it is: each in turn at first, then the best."""
    for walk in walks:
        if len(walk.steps) <= min(_SCOUTING, iterations) and not walk.is_stuck:
            return walk
    best = min(walks, key=lambda walk: walk.measure)
    return None if len(best.steps) > iterations or best.is_over(patience) else best


def _save(path: Path, made_with: Mapping[str, Any], walks: Sequence[_Walk]) -> None:
    content = {"fit": made_with, "walks": [asdict(walk) for walk in walks]}
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def _load(path: Path, made_with: Mapping[str, Any]) -> list[_Walk]:
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text())
        found = data["fit"]
        walks = [_Walk(**{**walk, "steps": [FitStep(**step) for step in walk["steps"]]}) for walk in data["walks"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"checkpoint {path} holds no fit; remove it to begin anew") from None
    if found != json.loads(json.dumps(made_with)):
        raise ValueError(f"checkpoint {path} belongs to another fit; name another file, or remove it to begin anew")
    return walks
