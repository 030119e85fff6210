"""The ranking predictor: what it sees, what it learns, and that it is the same each time."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from random import Random

import pytest
import torch

from fewstep.samplers import DPMSolverPPScheduler
from fewstep.samplers.usf.decisions import Derivative, SolverSchedule, SolverStep
from fewstep.samplers.usf.mutation import Breeder, MutationSettings, SearchSpace
from fewstep.samplers.usf.ranking import RankingPredictor, RankingSettings, ScheduleBatch

SMALL = RankingSettings(
    time_embedding=(32, 16), order_embedding=4, decision_hidden=16, hidden=32, head=(32,), epochs=120, batch=64
)


def population(count: int, calls: int = 5) -> list[SolverSchedule]:
    """Descendants of a first-order schedule."""
    noise = DPMSolverPPScheduler().schedule
    levels = (*noise.level([999.0 - 124.0 * k for k in range(calls)]).tolist(), 0.0)
    found = [SolverSchedule("vp", levels, (SolverStep(),) * calls)]
    breeder = Breeder(SearchSpace(noise, calls, (0.001, 0.01), True, True), MutationSettings())
    random = Random(0)
    while len(found) < count:
        child = breeder.child(found[-20:], random)
        assert child is not None
        found.append(child)
    return found


def quality(schedule: SolverSchedule) -> float:
    """Something to learn from times and decisions: the mean distance of steps from equal ones, and their orders."""
    logs = [min(value, 5.0) for value in schedule.half_logsnr]
    gaps = [b - a for a, b in pairwise(logs)]
    mean = sum(gaps) / len(gaps)
    uneven = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    return 0.1 + uneven + 0.3 * sum(step.order == 1 for step in schedule.steps)


def agreement(scores: list[float], values: list[float]) -> float:
    """Share of pairs in the right order."""
    pairs = [(i, j) for i in range(len(values)) for j in range(i) if values[i] != values[j]]
    return sum((scores[i] < scores[j]) == (values[i] < values[j]) for i, j in pairs) / len(pairs)


def test_it_ranks_schedules_that_it_has_not_seen():
    schedules = population(180)
    values = [quality(schedule) for schedule in schedules]
    random = Random(1)
    order = random.sample(range(180), 180)
    seen, unseen = order[:130], order[130:]
    predictor = RankingPredictor(SMALL, seed=0)
    untrained = agreement(predictor.score([schedules[k] for k in unseen]), [values[k] for k in unseen])
    predictor.fit([schedules[k] for k in seen], [values[k] for k in seen], seed=0)
    trained = agreement(predictor.score([schedules[k] for k in unseen]), [values[k] for k in unseen])
    assert trained > 0.8
    assert trained > untrained + 0.1


def test_the_same_seed_is_the_same_predictor():
    schedules = population(40)
    values = [quality(schedule) for schedule in schedules]
    state = torch.random.get_rng_state()

    def scores(seed: int) -> list[float]:
        predictor = RankingPredictor(SMALL, seed=seed)
        predictor.fit(schedules, values, seed=seed)
        return predictor.score(schedules)

    assert scores(3) == scores(3)
    assert scores(3) != scores(4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_score_does_not_depend_on_longer_schedules_beside_it():
    short, long = population(3, calls=4), population(3, calls=8)
    predictor = RankingPredictor(SMALL, seed=0)
    assert predictor.score([*short, *long])[:3] == pytest.approx(predictor.score(short), abs=1e-6)


def test_every_decision_is_seen():
    base = population(1)[0]
    first = dataclasses.replace(
        base, steps=(*base.steps[:1], SolverStep("data", -1, (Derivative((-2,)),)), *base.steps[2:])
    )

    def with_step(**changes: object) -> SolverSchedule:
        step = dataclasses.replace(first.steps[1], **changes)
        return dataclasses.replace(first, steps=(*first.steps[:1], step, *first.steps[2:]))

    others = [
        with_step(measure="noise"),
        with_step(start=-2, derivatives=(Derivative((-1,)),)),
        with_step(derivatives=()),
        with_step(derivatives=(Derivative((-2,), "unipc-bh1"),)),
        with_step(derivatives=(Derivative((-2,), "linear", 0.3),)),
        with_step(derivatives=(Derivative((-2,), "linear", 0.2),)),
        with_step(correction=first.steps[1].own_correction()),
        with_step(correction=first.steps[1].own_correction(implicit=True)),
        dataclasses.replace(first, afs="zero_x0"),
        dataclasses.replace(first, levels=(*first.levels[:2], first.levels[2] * 1.05, *first.levels[3:])),
    ]
    scores = RankingPredictor(SMALL, seed=0).score([first, *others])
    assert len(set(scores)) == len(others) + 1


def test_infinities_are_the_worst_and_equal_values_teach_nothing():
    schedules = population(30)
    predictor = RankingPredictor(SMALL, seed=0)
    before = predictor.score(schedules)
    assert predictor.fit(schedules, [1.0] * 30) == 0.0
    assert predictor.score(schedules) == before
    values = [math.inf if k % 3 == 0 else 1.0 for k in range(30)]
    assert math.isfinite(predictor.fit(schedules, values))
    assert agreement(predictor.score(schedules), values) > 0.9


def test_batches_are_finite_at_infinite_levels():
    batch = ScheduleBatch.of([SolverSchedule("flow", (1.0, 0.5, 0.0), (SolverStep(),) * 2)])
    assert batch.times.tolist() == [[-10.0, 0.0, 10.0]]
    assert batch.orders.tolist() == [[1, 1]]
