"""The search for solver schedules: S^3 (arXiv 2312.07243), a multi-stage evolutionary search with a predictor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch

from ..grid import Grid
from ..options import DEFAULTS
from ..scheduler import PlanScheduler
from ..searched import SearchedScheduler
from ..trajectory import Network, Trajectory, grid_of, network_output, run_of
from .archive import Evaluation, SearchArchive, key_of
from .decisions import SolverSchedule
from .known import KNOWN_SOLVERS, known_schedule
from .mutation import Breeder, MutationSettings, SearchSpace
from .ranking import RankingPredictor, RankingSettings
from .refinement import refine

Fitness = Callable[[SearchedScheduler], float]
"""What a search minimises: of a scheduler with its timesteps set, lower is better, positive. Infinity is allowed, and
NaN counts as infinity. A Frechet distance is one: put the scheduler into the pipeline, generate, measure."""


@dataclass(frozen=True)
class SearchSettings:
    """How long and how a search goes on.

    Attributes:
        rounds: of the evolution; each trains the predictor on all evaluations so far.
        evaluations: of schedules in a round.
        generations: of candidates in a round, which only the predictor sees.
        children: in a generation.
        parents: the best so many schedules have children.
        unscreened: share of a round's evaluations that the predictor has no say in.
        patience: rounds without an improvement of 0.1 % after which the evolution ends.
        refinement: evaluations of the last stage, beyond the paper: times and relaxations of the best schedule move
            continuously; 0 leaves it out.
        starts: of the refinement: the best schedules of so many kinds share half of it.
        finalists: the best so many schedules are compared on the second fitness.
        afs: whether the first step may be analytic; ``None`` allows it but for flow models, whose pipelines do not
            call ``scale_model_input``.
        mutation: probabilities of changes.
        ranking: of the predictor.
    """

    rounds: int = 8
    evaluations: int = 24
    generations: int = 4
    children: int = 40
    parents: int = 15
    unscreened: float = 0.25
    patience: int = 4
    refinement: int = 600
    starts: int = 4
    finalists: int = 5
    afs: bool | None = None
    mutation: MutationSettings = field(default_factory=MutationSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)

    def __post_init__(self) -> None:
        for name in ("evaluations", "generations", "children", "parents", "patience", "starts", "finalists"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("rounds", "refinement"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0, which leaves this stage out")
        if not 0.0 <= self.unscreened <= 1.0:
            raise ValueError(f"unscreened {self.unscreened} must be a share, from 0 to 1")


@dataclass(frozen=True)
class ScheduleSearch:
    """What ``search_schedule`` found.

    Attributes:
        schedule: for ``SearchedScheduler(decisions=...)``.
        fitness: of it; the second fitness where one was given.
        known: the best fitness (the first one) among the known solvers that the search began with.
        evaluations: everything that was evaluated, in order.
    """

    schedule: SolverSchedule
    fitness: float
    known: float
    evaluations: tuple[Evaluation, ...]


def trajectory_fitness(network: Network, noise: torch.Tensor, truth: Trajectory) -> Fitness:
    """The distance to the end of a fine trajectory: the mean over samples of their root mean square errors.

    Args:
        network: the model.
        noise: ``(batch, ...)`` standard normal; all of it goes through the network at once.
        truth: from ``fine_trajectory`` with the same noise.
    """
    end = truth.samples[-1]

    @torch.no_grad()
    def fitness(scheduler: SearchedScheduler) -> float:
        plan = scheduler.plan
        run, x = run_of(scheduler, plan), noise * scheduler.init_noise_sigma
        for call in plan:
            x, _ = run.step(x, network_output(scheduler, network, x, call), clean=False)
        return float((x - end).flatten(1).double().square().mean(1).sqrt().mean())

    return fitness


def search_schedule(
    scheduler: PlanScheduler,
    fitness: Fitness,
    *,
    settings: SearchSettings | None = None,
    final_fitness: Fitness | None = None,
    archive: str | Path | None = None,
    progress: Callable[[str, int, float], None] | None = None,
    seed: int = 0,
) -> ScheduleSearch:
    """Searches times and solver decisions of a run for a model.

    It begins with the known solvers on several spacings, then repeats: train the predictor on everything evaluated,
    let it choose among mutations and crossovers of the best, evaluate those. At the end the best schedule's times and
    relaxations are moved continuously, and the best few are compared on the second fitness.

    Args:
        scheduler: any of ours for the model, with its timesteps set: the search is for its number of steps as network
            calls, between its first and last time.
        fitness: what to minimise, for example ``trajectory_fitness``; it should give the same number for the same
            scheduler.
        settings: budget and probabilities.
        final_fitness: on noises that the search does not see, to choose among the finalists.
        archive: JSON-lines file of all evaluations. Where it exists the search goes on from there, to the same result
            as without the interruption.
        progress: called after every evaluation with the stage, the number of evaluations so far, and the best fitness.
        seed: of all that is random.

    Raises:
        ValueError: no timesteps were set, an archive of another search, or nothing that was evaluated was finite.
    """
    return _Search(scheduler, fitness, settings or SearchSettings(), archive, progress, seed).run(final_fitness)


class _Search:
    def __init__(
        self,
        scheduler: PlanScheduler,
        fitness: Fitness,
        settings: SearchSettings,
        archive: str | Path | None,
        progress: Callable[[str, int, float], None] | None,
        seed: int,
    ) -> None:
        grid = grid_of(scheduler)
        first, last = float(grid.levels[0]), float(grid.levels[-1])
        schedule = grid.schedule
        afs = schedule.kind != "flow" if settings.afs is None else settings.afs
        ends = (0.1 * schedule.min_level, schedule.min_level) if last == 0.0 else (last, last)
        self.space = SearchSpace(schedule, grid.steps, ends, last == 0.0, afs)
        self.scheduler, self.grid, self.fitness, self.settings = scheduler, grid, fitness, settings
        self.progress, self.seed = progress, seed
        self.breeder = Breeder(self.space, settings.mutation)
        search = {"kind": schedule.kind, "first": first, "last": last, "calls": grid.steps, "seed": seed}
        self.archive = SearchArchive(archive, {**search, **asdict(settings)})
        # What this search has asked for, in order. The archive may hold more, from a run that was cut off.
        self.known: dict[str, Evaluation] = {}

    def run(self, final_fitness: Fitness | None) -> ScheduleSearch:
        for schedule in initial_schedules(self.grid, self.space):
            self.value(schedule, "initial")
        known = self.best().fitness
        if not math.isfinite(known):
            raise ValueError("fitness is finite for none of the known solvers; check the network and the truth")
        self.evolve()
        if self.settings.refinement:
            budget = self.settings.refinement
            refine(
                self.starts(), self.space, lambda schedule: self.value(schedule, "refinement"), budget, seed=self.seed
            )
        best = self.best()
        if final_fitness is not None:
            finalists = self.ranked()[: self.settings.finalists]
            again = [(self.final_value(entry.schedule, final_fitness), k) for k, entry in enumerate(finalists)]
            value, k = min(again)
            best = Evaluation("final", 0, value, finalists[k].schedule)
        return ScheduleSearch(best.schedule, best.fitness, known, tuple(self.archive.evaluations))

    def starts(self) -> list[SolverSchedule]:
        """The best schedules that differ in what a continuous refinement cannot change."""
        found: dict[tuple[object, ...], SolverSchedule] = {}
        for entry in self.ranked():
            steps = entry.schedule.steps
            key = (entry.schedule.afs, tuple((step.measure, step.order > 2, step.start) for step in steps))
            found.setdefault(key, entry.schedule)
        return list(found.values())[: self.settings.starts]

    def evolve(self) -> None:
        before, waited = self.best().fitness, 0
        for number in range(1, self.settings.rounds + 1):
            for schedule in self.candidates(number):
                self.value(schedule, "evolution", number)
            improved = self.best().fitness < before * 0.999
            before, waited = self.best().fitness, 0 if improved else waited + 1
            if waited == self.settings.patience:
                break

    def candidates(self, number: int) -> list[SolverSchedule]:
        """What a round evaluates: mostly what the predictor thinks best of several generations of children."""
        settings = self.settings
        random = Random(f"{self.seed} {number}")
        ranked = self.ranked()
        predictor = RankingPredictor(settings.ranking, seed=random.getrandbits(32))
        fitness = [entry.fitness for entry in self.known.values()]
        predictor.fit([entry.schedule for entry in self.known.values()], fitness, seed=random.getrandbits(32))
        parents = [entry.schedule for entry in ranked[: settings.parents]]
        chosen: dict[str, SolverSchedule] = {}
        pool: dict[str, SolverSchedule] = {}
        free = round(settings.evaluations * settings.unscreened)
        for child in (self.breeder.child(parents, random) for _ in range(4 * free)):
            if child is not None and key_of(child) not in self.known and len(chosen) < free:
                chosen[key_of(child)] = child
        for _ in range(settings.generations):
            children = [self.breeder.child(parents, random) for _ in range(settings.children)]
            pool.update({key_of(child): child for child in children if child is not None})
            new = [schedule for key, schedule in pool.items() if key not in self.known and key not in chosen]
            if not new:
                break
            order = np.argsort(predictor.score(new), kind="stable")
            best = [new[k] for k in order]
            # The next generation descends from what was evaluated and from what looks better still.
            parents = [entry.schedule for entry in ranked[: settings.parents]] + best[: settings.parents]
        else:
            chosen.update({key_of(schedule): schedule for schedule in best[: settings.evaluations - len(chosen)]})
        return list(chosen.values())

    def value(self, schedule: SolverSchedule, stage: str, number: int = 0) -> float:
        """The fitness, from the archive where it is known."""
        key = key_of(schedule)
        if key in self.known:
            return self.known[key].fitness
        found = self.archive.get(schedule)
        entry = Evaluation(stage, number, self.measure(schedule, self.fitness) if found is None else found, schedule)
        if found is None:
            self.archive.add(entry)
        self.known[key] = entry
        if self.progress is not None:
            self.progress(stage, len(self.known), self.best().fitness)
        return entry.fitness

    def final_value(self, schedule: SolverSchedule, fitness: Fitness) -> float:
        found = self.archive.get(schedule, final=True)
        if found is None:
            found = self.measure(schedule, fitness)
            self.archive.add(Evaluation("final", 0, found, schedule))
        if self.progress is not None:
            self.progress("final", len(self.known), self.best().fitness)
        return found

    def measure(self, schedule: SolverSchedule, fitness: Fitness) -> float:
        config = {key: self.scheduler.config[key] for key in DEFAULTS if key != "preset"}
        scheduler = SearchedScheduler(**config, decisions=schedule)
        scheduler.set_timesteps()
        value = float(fitness(scheduler))
        return value if math.isfinite(value) else math.inf

    def ranked(self) -> list[Evaluation]:
        return sorted(self.known.values(), key=lambda entry: entry.fitness)

    def best(self) -> Evaluation:
        return min(self.known.values(), key=lambda entry: entry.fitness)


def initial_schedules(grid: Grid, space: SearchSpace) -> list[SolverSchedule]:
    """The known solvers on the run's own grid, and on uniform times, uniform half log-SNR and Karras levels.

    Args:
        grid: of the run.
        space: what the schedules share; where it has free ends, those grids also end at one above level 0, and where it
            has analytic first steps, some schedules begin with one.
    """
    schedules = []
    grids = [grid]
    ends = [float(grid.levels[-1])]
    if space.ends[0] < space.ends[1]:
        ends.append(math.sqrt(space.ends[0] * space.ends[1]))
    for end in ends:
        grids += [_grid(space, float(grid.levels[0]), end, grid.steps, spacing) for spacing in _SPACINGS]
    for times in grids:
        schedules += [known_schedule(solver, times) for solver in KNOWN_SOLVERS]
    if space.afs:
        for spacing in _SPACINGS:
            times = _grid(space, float(grid.levels[0]), ends[0], grid.steps + 1, spacing)
            for solver in ("dpm++", "unipc", "unipc3", "deis", "deis3"):
                known = known_schedule(solver, times)
                schedules.append(SolverSchedule(known.kind, known.levels, known.steps, known.timesteps, "zero_x0"))
    return schedules


_SPACINGS = ("time", "half log-SNR", "karras")


def _grid(space: SearchSpace, first: float, last: float, steps: int, spacing: str) -> Grid:
    """A spacing from the first level to the last; to level 0 by way of the model's cleanest level."""
    schedule = space.schedule
    if spacing == "time":
        low = last if last > 0.0 else 0.0
        positions = np.linspace(space.position(first), space.position(low) if low else 0.0, steps + 1)
        levels = [first, *(space.level(float(p)) for p in positions[1:-1]), last]
    else:
        points = steps + 1 if last > 0.0 else steps
        ratios = [
            float(s / a) if a else math.inf
            for a, s in (
                tuple(float(v) for v in schedule.alpha_sigma(level)) for level in (first, last or schedule.min_level)
            )
        ]
        power = 7.0
        high, low = (min(r, _NOISIEST) for r in ratios)
        if spacing == "karras":
            rho = np.linspace(high ** (1 / power), low ** (1 / power), points) ** power
        else:
            rho = np.exp(np.linspace(math.log(high), math.log(low), points))
        levels = [first, *(schedule.level_of_rho(float(r)) for r in rho[1:]), *([] if last > 0.0 else [0.0])]
        levels[steps] = last
    labels = schedule.timestep(np.array(levels[:-1]))
    if schedule.kind == "vp":
        labels = labels.round()
    return Grid.of(schedule, levels, labels)


_NOISIEST = 1e6
"""Where a uniform spacing in half log-SNR begins on flow models: just below pure noise."""
