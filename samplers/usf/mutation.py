"""Random changes of solver schedules: the mutation and crossover of S^3 (arXiv 2312.07243)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from ..schedule import NoiseSchedule
from ..weights import Measure
from .decisions import CLOSEST, MAX_ORDER, Correction, Derivative, SolverSchedule, SolverStep, newest
from .rows import relaxation_factor

_ATTEMPTS = 100


@dataclass(frozen=True)
class MutationSettings:
    """Probabilities of the changes; the defaults are those that the authors released.

    Attributes:
        crossover: that a child has two parents.
        deep_crossover: that its parents are then mixed step by step, rather than field by field.
        insert: that a step is inserted; another one is deleted to keep the number of calls.
        delete: that a step is deleted; another one is inserted to keep the number of calls.
        time: that a node moves, each.
        time_deviation: standard deviation of its relative move (of the level of EDM models, of the time of others);
            ``None`` is 0.08 for EDM models and 0.03 for others.
        order: that the Taylor order of a step is drawn anew, each.
        orders: probabilities of the orders 1 to 4.
        measure: that a step's kind of prediction is drawn anew, each.
        relaxation: that a step's relaxation becomes linear, each; as often, its coefficient moves.
        relaxation_deviation: standard deviation of that move.
        estimate: that the number of nodes of a first derivative is drawn anew, 1 or 2, each.
        correction: that a step's corrector is drawn anew, each.
        corrections: probabilities of none, the pseudo and the implicit corrector.
        afs: that it is drawn anew whether the first step is analytic.
        start: that a step's start point is drawn anew, each; the authors leave it alone.
    """

    crossover: float = 0.3
    deep_crossover: float = 0.5
    insert: float = 0.2
    delete: float = 0.2
    time: float = 0.3
    time_deviation: float | None = None
    order: float = 0.3
    orders: tuple[float, float, float, float] = (0.2, 0.4, 0.3, 0.1)
    measure: float = 0.3
    relaxation: float = 0.3
    relaxation_deviation: float = 0.03
    estimate: float = 0.3
    correction: float = 0.3
    corrections: tuple[float, float, float] = (0.5, 0.5, 0.0)
    afs: float = 0.3
    start: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            values = value if isinstance(value, tuple) else (value,)
            if name == "time_deviation" and value is None:
                continue
            if not all(0.0 <= v < math.inf for v in values) or (not name.endswith("deviation") and max(values) > 1.0):
                raise ValueError(f"{name} {value} must be a probability, or a finite deviation of at least 0")
        for name in ("orders", "corrections"):
            if abs(sum(getattr(self, name)) - 1.0) > 1e-6:
                raise ValueError(f"{name} {getattr(self, name)} must sum to 1")


@dataclass(frozen=True)
class SearchSpace:
    """What all schedules of a search share.

    Attributes:
        schedule: of the model.
        calls: network calls of a run.
        ends: lowest and highest level above 0 where runs may end.
        clean: whether runs may also end at level 0.
        afs: whether the first step may be analytic.
    """

    schedule: NoiseSchedule
    calls: int
    ends: tuple[float, float]
    clean: bool
    afs: bool

    def position(self, level: float) -> float:
        """The variable in which nodes move, positive and increasing with the level."""
        return float(self.schedule.timestep(level)) + 1.0 if self.schedule.kind == "vp" else level

    def level(self, position: float) -> float:
        """The inverse of ``position``."""
        return float(self.schedule.level(max(position - 1.0, 0.0))) if self.schedule.kind == "vp" else position

    def draw_end(self, random: Random) -> float:
        """A random end."""
        low, high = self.ends
        if self.clean and random.random() < 0.5:
            return 0.0
        return math.exp(random.uniform(math.log(low), math.log(high)))


class Breeder:
    """Makes children of solver schedules.

    Args:
        space: what they share.
        settings: probabilities.
    """

    def __init__(self, space: SearchSpace, settings: MutationSettings) -> None:
        self.space, self.settings = space, settings
        deviation = settings.time_deviation
        self._deviation = (0.08 if space.schedule.kind == "edm" else 0.03) if deviation is None else deviation

    def child(self, parents: list[SolverSchedule], random: Random) -> SolverSchedule | None:
        """A crossover or copy of random parents, mutated; ``None`` where nothing valid was found.

        Args:
            parents: of at least one schedule.
            random: of everything.
        """
        for _ in range(_ATTEMPTS):
            one = random.choice(parents)
            alike = [other for other in parents if len(other.steps) == len(one.steps) and other is not one]
            try:
                if alike and random.random() < self.settings.crossover:
                    one = self._crossed(one, random.choice(alike), random)
                changed = self._mutated(one, random)
                changed.grid(self.space.schedule)
            except ValueError:
                # Two nodes too close for a derivative, or no room for another one.
                continue
            if changed.calls == self.space.calls and changed not in parents:
                return changed
        return None

    def _crossed(self, one: SolverSchedule, other: SolverSchedule, random: Random) -> SolverSchedule:
        """Every field from one of the two parents as a whole, or their steps mixed."""
        choices = [random.random() < 0.5 for _ in range(4)]
        if len(set(choices)) == 1:
            choices[random.randrange(4)] ^= True
        times, measures, orders, corrections = (one if choice else other for choice in choices)
        deep = random.random() < self.settings.deep_crossover
        steps = []
        for i in range(len(one.steps)):
            if deep:
                measures = orders = one if random.random() < 0.5 else other
            order = orders.steps[i]
            step = SolverStep(measures.steps[i].measure, order.start, order.derivatives)
            kept = corrections.steps[i].correction
            if kept is not None:
                # A corrector belongs to its predictor.
                step = replace(step, correction=kept if corrections is orders else step.own_correction())
            steps.append(step)
        return SolverSchedule(one.kind, times.levels, fitted(steps), times.timesteps, times.afs)

    def _mutated(self, schedule: SolverSchedule, random: Random) -> SolverSchedule:
        settings = self.settings
        levels, steps = list(schedule.levels), list(schedule.steps)
        afs = schedule.afs
        if self.space.afs and random.random() < settings.afs:
            afs = random.choice(("none", "zero_x0"))
        draw = random.random()
        if draw < settings.insert:
            self._insert(levels, steps, random)
        elif draw > 1.0 - settings.delete and len(steps) > 1:
            self._delete(levels, steps, random)
        self._move(levels, random)
        for i in range(len(steps)):
            steps[i] = self._changed(steps[i], i, levels, random)
        while (excess := _calls(steps, afs) - self.space.calls) != 0:
            if excess < 0:
                self._insert(levels, steps, random)
            elif len(steps) > 1:
                self._delete(levels, steps, random)
            else:
                raise ValueError(f"one step makes {_calls(steps, afs)} calls; {self.space.calls} are wanted")
        timesteps = schedule.timesteps if tuple(levels) == schedule.levels else None
        return SolverSchedule(schedule.kind, tuple(levels), fitted(steps), timesteps, afs)

    def _insert(self, levels: list[float], steps: list[SolverStep], random: Random) -> None:
        i = random.randrange(len(steps))
        low, high = self.space.position(levels[i + 1]), self.space.position(levels[i])
        level = self.space.level(random.uniform(low, high))
        if not levels[i + 1] < level < levels[i]:
            raise ValueError(f"no level fits between {levels[i]} and {levels[i + 1]}; take another interval")
        levels.insert(i + 1, level)
        steps.insert(i, SolverStep(self._measure(random), -1, newest(min(self._order(random), i + 1))))

    def _delete(self, levels: list[float], steps: list[SolverStep], random: Random) -> None:
        i = random.randrange(1, len(steps))
        del levels[i], steps[i - 1]

    def _move(self, levels: list[float], random: Random) -> None:
        """Moves nodes, but the first, and draws the end."""
        first, last = levels[0], levels[-1]
        for i in range(1, len(levels) - 1):
            if random.random() < self.settings.time:
                position = self.space.position(levels[i]) * (1.0 + random.gauss(0.0, self._deviation))
                level = self.space.level(position)
                if last < level < first:
                    levels[i] = level
        if random.random() < self.settings.time and self.space.ends[0] < self.space.ends[1]:
            levels[-1] = self.space.draw_end(random)
        levels[1:-1] = sorted(levels[1:-1], reverse=True)

    def _changed(self, step: SolverStep, i: int, levels: list[float], random: Random) -> SolverStep:
        settings = self.settings
        measure, start, derivatives = step.measure, step.start, list(step.derivatives)
        if random.random() < settings.order:
            order = min(self._order(random), i + 1)
            if order != step.order:
                start, derivatives = -1, list(newest(order))
        if random.random() < settings.measure:
            measure = self._measure(random)
        if random.random() < settings.start:
            start = -random.randint(1, min(i + 1, MAX_ORDER - 1))
            order = min(1 + len(derivatives), i + 1)
            points = [p for p in range(-1, -MAX_ORDER - 1, -1) if p != start][: order - 1]
            derivatives = [Derivative(tuple(points)) for _ in range(order - 1)]
        if derivatives and random.random() < settings.relaxation:
            coefficient = self._linear(derivatives[0], measure, start, i, levels)
            if random.random() < settings.relaxation:
                coefficient += random.gauss(0.0, settings.relaxation_deviation)
            derivatives[0] = Derivative(derivatives[0].active_points, "linear", coefficient)
        if derivatives and start == -1 and random.random() < settings.estimate:
            count = min(random.choice((1, 2)), len(derivatives))
            derivatives[0] = replace(derivatives[0], active_points=tuple(range(-2, -2 - count, -1)))
        changed = SolverStep(measure, start, tuple(derivatives))
        correction = step.correction
        if random.random() < settings.correction:
            kind = random.choices(("none", "pseudo", "implicit"), settings.corrections)[0]
            correction = None if kind == "none" else changed.own_correction(implicit=kind == "implicit")
        elif correction is not None and changed != replace(step, correction=None):
            correction = changed.own_correction(implicit=correction.implicit)
        return replace(changed, correction=correction)

    def _linear(self, derivative: Derivative, measure: Measure, start: int, i: int, levels: list[float]) -> float:
        """The coefficient with which nothing changes, or 0 where the step is infinitely long."""
        if i + 1 + start < 0 or levels[i + 1] == 0.0:
            return 0.0
        pair = SolverSchedule(self.space.schedule.kind, (levels[i + 1 + start], levels[i + 1]), (SolverStep(),))
        h = pair.half_logsnr[1] - pair.half_logsnr[0]
        if h < CLOSEST:
            raise ValueError(f"levels {pair.levels} lie within {CLOSEST} in half log-SNR; move one of them")
        return (relaxation_factor(derivative, measure, h) - 1.0) / h if math.isfinite(h) else 0.0

    def _order(self, random: Random) -> int:
        return random.choices(range(1, MAX_ORDER + 1), self.settings.orders)[0]

    @staticmethod
    def _measure(random: Random) -> Measure:
        return "data" if random.random() < 0.5 else "noise"


def fitted(steps: list[SolverStep]) -> tuple[SolverStep, ...]:
    """Steps with what their place in the run allows: points that exist, no corrector at the end."""
    result = []
    for i, step in enumerate(steps):
        start = max(step.start, -(i + 1))
        derivatives = _kept(step.derivatives, i + 1, start)
        correction = step.correction if i < len(steps) - 1 else None
        fit = SolverStep(step.measure, start, derivatives)
        if correction is not None:
            again = max(correction.start, -(i + 2))
            kept = _kept(correction.derivatives, i + 2, again)
            if any(-1 in derivative.active_points for derivative in kept):
                correction = Correction(again, kept, correction.implicit)
            else:
                correction = fit.own_correction(implicit=correction.implicit)
        result.append(replace(fit, correction=correction))
    return tuple(result)


def _kept(derivatives: tuple[Derivative, ...], known: int, start: int) -> tuple[Derivative, ...]:
    kept: list[Derivative] = []
    for j, derivative in enumerate(derivatives, 1):
        points = tuple(p for p in derivative.active_points if -known <= p and p != start)
        if len(points) < j:
            break
        kept.append(replace(derivative, active_points=points))
    return tuple(kept)


def _calls(steps: list[SolverStep], afs: str) -> int:
    """As ``SolverSchedule.calls``; a correction of the last step goes, wherever it stands."""
    implicit = sum(step.correction is not None and step.correction.implicit for step in steps[:-1])
    return len(steps) - (afs != "none") + implicit
