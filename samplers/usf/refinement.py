"""Continuous refinement of a solver schedule: its times and relaxations move until its fitness falls no more.

This is no part of S^3 (arXiv 2312.07243), whose mutations are random. What it finds lies in the same space: every
first derivative gets the linear relaxation, and a first-order step a derivative with the factor 0, which changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..schedule import Array
from .decisions import Derivative, SolverSchedule, SolverStep, newest
from .mutation import SearchSpace
from .rows import relaxation_factor


@dataclass(frozen=True)
class _Handle:
    """A relaxation that can move: of a step's first derivative, or of its correction's."""

    step: int
    corrects: bool


def refine(
    starts: Sequence[SolverSchedule],
    space: SearchSpace,
    evaluate: Callable[[SolverSchedule], float],
    evaluations: int,
    *,
    deviation: float = 0.1,
    seed: int = 0,
) -> None:
    """Looks for better schedules around some; what it finds is what ``evaluate`` was asked for.

    Half of the evaluations are shared by all starts, and the other half goes on where the best was found.

    Args:
        starts: where to begin.
        space: of the search.
        evaluate: fitness of a schedule, lower is better.
        evaluations: at most.
        deviation: first standard deviation, in half log-SNR and in factors of derivatives.
        seed: of the samples.
    """
    descents = [
        _Descent(Handles(start, space), space, evaluate, deviation, np.random.default_rng([seed, k]))
        for k, start in enumerate(starts)
    ]
    descents = [descent for descent in descents if descent.strategy is not None]
    if not descents:
        return
    left = evaluations
    if len(descents) > 1:
        for descent in descents:
            left -= descent.advance(evaluations // (2 * len(descents)))
    min(descents, key=lambda descent: descent.best).advance(left)


class _Descent:
    """The refinement of one schedule, which can be taken up again."""

    def __init__(
        self,
        handles: Handles,
        space: SearchSpace,
        evaluate: Callable[[SolverSchedule], float],
        deviation: float,
        generator: np.random.Generator,
    ) -> None:
        self.handles, self.space, self.evaluate = handles, space, evaluate
        vector = handles.vector()
        self.strategy = _CovarianceAdaptation(vector, deviation, generator) if len(vector) else None
        self.best = math.inf

    def advance(self, evaluations: int) -> int:
        """Goes on for whole generations, within so many evaluations; returns how many it took."""
        strategy, used = self.strategy, 0
        assert strategy is not None
        # Samples outside of the space cost nothing, but where all of them lie there it would go on forever.
        for _ in range(evaluations):
            if used + strategy.count > evaluations or strategy.deviation < _FINEST:
                break
            samples = strategy.ask()
            fitness = []
            for sample in samples:
                try:
                    schedule = self.handles.at(sample)
                    schedule.grid(self.space.schedule)
                except (ValueError, OverflowError):
                    fitness.append(math.inf)
                    continue
                fitness.append(self.evaluate(schedule))
                used += 1
            self.best = min(self.best, *fitness)
            strategy.tell(samples, np.array(fitness))
        return used


_FINEST = 1e-4
"""Where moving on is not worth an evaluation."""


class _CovarianceAdaptation:
    """CMA-ES with the default parameters of arXiv 1604.00772, table 1 (without negative weights)."""

    def __init__(self, mean: Array, deviation: float, generator: np.random.Generator) -> None:
        d = len(mean)
        self.mean, self.deviation, self.generator = mean, deviation, generator
        self.count = 4 + int(3 * math.log(d))
        raw = math.log((self.count + 1) / 2) - np.log(np.arange(1, self.count // 2 + 1))
        self.weights = raw / raw.sum()
        mass = 1.0 / float((self.weights**2).sum())
        self.mass = mass
        self.c_path = (4 + mass / d) / (d + 4 + 2 * mass / d)
        self.c_step = (mass + 2) / (d + mass + 5)
        self.c_one = 2 / ((d + 1.3) ** 2 + mass)
        self.c_many = min(1 - self.c_one, 2 * (mass - 2 + 1 / mass) / ((d + 2) ** 2 + mass))
        self.damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (d + 1)) - 1) + self.c_step
        self.length = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))
        self.covariance: Array = np.eye(d)
        self.path: Array = np.zeros(d)
        self.step_path: Array = np.zeros(d)
        self.generation = 0

    def ask(self) -> Array:
        """The samples of a generation, ``(count, d)``."""
        values, vectors = np.linalg.eigh(self.covariance)
        self.root = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
        self.inverse = vectors / np.sqrt(np.maximum(values, 1e-20)) @ vectors.T
        normal = self.generator.standard_normal((self.count, len(self.mean)))
        return np.asarray(self.mean + self.deviation * normal @ self.root)

    def tell(self, samples: Array, fitness: Array) -> None:
        """Moves and reshapes the distribution towards the better half of the samples."""
        best = samples[np.argsort(fitness, kind="stable")[: len(self.weights)]]
        moves = (best - self.mean) / self.deviation
        move = self.weights @ moves
        self.mean = self.mean + self.deviation * move
        self.generation += 1
        gain = math.sqrt(self.c_step * (2 - self.c_step) * self.mass)
        self.step_path = (1 - self.c_step) * self.step_path + gain * (self.inverse @ move)
        size = float(np.linalg.norm(self.step_path))
        expected = math.sqrt(1 - (1 - self.c_step) ** (2 * self.generation)) * self.length
        steady = float(size / expected < 1.4 + 2 / (len(self.mean) + 1))
        gain = math.sqrt(self.c_path * (2 - self.c_path) * self.mass)
        self.path = (1 - self.c_path) * self.path + steady * gain * move
        lost = (1 - steady) * self.c_path * (2 - self.c_path)
        one = np.outer(self.path, self.path) + lost * self.covariance
        many = (moves.T * self.weights) @ moves
        self.covariance = (1 - self.c_one - self.c_many) * self.covariance + self.c_one * one + self.c_many * many
        self.deviation *= math.exp(self.c_step / self.damping * (size / self.length - 1))


class Handles:
    """The continuous decisions of a schedule as a vector: half log-SNRs of inner nodes, then factors of derivatives.

    Args:
        schedule: where to begin.
        space: whether its end may move.
    """

    def __init__(self, schedule: SolverSchedule, space: SearchSpace) -> None:
        steps = []
        for i, step in enumerate(schedule.steps):
            finite = math.isfinite(_length(schedule, i, step.start))
            if step.order == 1 and i > 0 and step.start == -1 and finite:
                step = replace(step, derivatives=_relaxed(newest(2), -1.0 / _length(schedule, i, -1)))
            steps.append(step)
        self.schedule = replace(schedule, steps=tuple(steps))
        self.relaxations = [
            _Handle(i, corrects)
            for i, step in enumerate(steps)
            for corrects in (False, True)
            if _derivatives(step, corrects)
            and math.isfinite(_length(schedule, i, _start(step, corrects)))
            and not (corrects and self._is_unread(i))
        ]
        count = len(schedule.levels)
        self.moves_end = schedule.levels[-1] > 0.0 and space.ends[0] < space.ends[1]
        self.times = list(range(1, count if self.moves_end else count - 1))
        self.space = space

    def _is_unread(self, i: int) -> bool:
        """Whether nothing follows from a correction's sample: a step to level 0 returns its clean prediction."""
        correction = self.schedule.steps[i].correction
        assert correction is not None
        last = i == len(self.schedule.steps) - 2 and self.schedule.levels[-1] == 0.0
        return last and not correction.implicit

    def vector(self) -> Array:
        """Where the schedule stands."""
        logs = [self.schedule.half_logsnr[k] for k in self.times]
        return np.array([*logs, *(self._factor(handle) for handle in self.relaxations)])

    def at(self, vector: Array) -> SolverSchedule:
        """The schedule of a vector.

        Raises:
            ValueError: times that do not follow each other, or lie too close.
        """
        levels = list(self.schedule.levels)
        for k, value in zip(self.times, vector, strict=False):
            levels[k] = self.space.schedule.level_of_rho(math.exp(-value))
        if self.moves_end and not self.space.ends[0] <= levels[-1] <= self.space.ends[1]:
            raise ValueError(f"end {levels[-1]} lies outside of {self.space.ends}; move it less")
        steps = list(self.schedule.steps)
        moved = SolverSchedule(self.schedule.kind, tuple(levels), tuple(steps), None, self.schedule.afs)
        for handle, factor in zip(self.relaxations, vector[len(self.times) :], strict=True):
            step = steps[handle.step]
            coefficient = (float(factor) - 1.0) / _length(moved, handle.step, _start(step, handle.corrects))
            relaxed = _relaxed(_derivatives(step, handle.corrects), coefficient)
            if handle.corrects:
                assert step.correction is not None
                steps[handle.step] = replace(step, correction=replace(step.correction, derivatives=relaxed))
            else:
                steps[handle.step] = replace(step, derivatives=relaxed)
        return replace(moved, steps=tuple(steps))

    def _factor(self, handle: _Handle) -> float:
        step = self.schedule.steps[handle.step]
        h = _length(self.schedule, handle.step, _start(step, handle.corrects))
        return relaxation_factor(_derivatives(step, handle.corrects)[0], step.measure, h)


def _start(step: SolverStep, corrects: bool) -> int:
    """The start point, counted from the newest node before the step."""
    if corrects:
        assert step.correction is not None
        return step.correction.start + 1
    return step.start


def _derivatives(step: SolverStep, corrects: bool) -> tuple[Derivative, ...]:
    if corrects:
        return () if step.correction is None else step.correction.derivatives
    return step.derivatives


def _relaxed(derivatives: tuple[Derivative, ...], coefficient: float) -> tuple[Derivative, ...]:
    return (Derivative(derivatives[0].active_points, "linear", coefficient), *derivatives[1:])


def _length(schedule: SolverSchedule, i: int, start: int) -> float:
    """Of the step to node ``i + 1`` in half log-SNR."""
    return schedule.half_logsnr[i + 1] - schedule.half_logsnr[i + 1 + start]
