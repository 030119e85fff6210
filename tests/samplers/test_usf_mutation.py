"""Children of solver schedules: valid whatever happens, within the budget, and as often as the probabilities say."""

from __future__ import annotations

import dataclasses
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analytic import EDM, FLOW, STABLE_DIFFUSION, sample
from fewstep.samplers import DPMSolverPPScheduler, SearchedScheduler
from fewstep.samplers.usf.decisions import Derivative, SolverSchedule, SolverStep, newest
from fewstep.samplers.usf.known import KNOWN_SOLVERS, known_schedule
from fewstep.samplers.usf.mutation import Breeder, MutationSettings, SearchSpace, fitted

MODELS = {"vp": STABLE_DIFFUSION, "flow": FLOW, "edm": EDM}
NOTHING = MutationSettings(
    crossover=0, insert=0, delete=0, time=0, order=0, measure=0, relaxation=0, estimate=0, correction=0, afs=0, start=0
)


def space_of(model: str, calls: int, *, afs: bool = True) -> SearchSpace:
    schedule = DPMSolverPPScheduler(**MODELS[model]).schedule
    return SearchSpace(schedule, calls, (0.1 * schedule.min_level, schedule.min_level), True, afs)


def parents_of(model: str, calls: int) -> list[SolverSchedule]:
    scheduler = DPMSolverPPScheduler(**MODELS[model])
    scheduler.set_timesteps(calls)
    return [known_schedule(solver, scheduler._grid) for solver in KNOWN_SOLVERS]


def children(count: int, probabilities: MutationSettings, parents: list[SolverSchedule], **space: bool) -> list:
    breeder, random = Breeder(space_of("vp", parents[0].calls, **space), probabilities), Random(0)
    return [breeder.child(parents, random) for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(2, 8), st.integers(0, 10**6))
def test_descendants_stay_within_the_space(model, calls, seed):
    """Eight generations: each can be written, runs, and makes the same number of calls between the same ends."""
    probabilities = MutationSettings(corrections=(0.3, 0.4, 0.3), start=0.3)
    space = space_of(model, calls)
    breeder, random = Breeder(space, probabilities), Random(seed)
    parents = parents_of(model, calls)
    first = parents[0].levels[0]
    for _ in range(8):
        child = breeder.child(parents[-4:], random)
        assert child is not None
        assert child.calls == calls
        assert child.levels[0] == first
        assert child.levels[-1] == 0.0 or space.ends[0] <= child.levels[-1] <= space.ends[1]
        assert SolverSchedule.from_dict(child.to_dict()) == child
        parents.append(child)
    scheduler = SearchedScheduler.from_config(MODELS[model], decisions=parents[-1])
    scheduler.set_timesteps(calls)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if parents[-1].afs == "none":
        assert sample(scheduler, x * float(scheduler.init_noise_sigma)).isfinite().all()


def test_without_probabilities_there_are_no_children():
    assert children(1, NOTHING, parents_of("vp", 4)) == [None]


def test_moves_of_times_have_the_stated_size():
    """Of the time of VP models, and of the level of EDM models."""
    for model, expected in (("vp", 0.03), ("edm", 0.08)):
        parent = parents_of(model, 6)[0]
        breeder, random = Breeder(space_of(model, 6), dataclasses.replace(NOTHING, time=0.3)), Random(0)
        moves, moved = [], 0
        for _ in range(500):
            child = breeder.child([parent], random)
            for before, after in zip(parent.levels[1:-1], child.levels[1:-1], strict=True):
                if before != after:
                    position = breeder.space.position
                    moves.append(position(after) / position(before) - 1.0)
                    moved += 1
            assert child.steps == parent.steps
            assert child.timesteps is None or child.levels == parent.levels
        # Children that are their parents are no children: somewhat more than 0.3 of the nodes moved.
        assert 0.3 < moved / 2500 < 0.4
        assert np.std(moves) == pytest.approx(expected, rel=0.1)


def test_orders_are_drawn_with_the_stated_probabilities():
    parent = parents_of("vp", 8)[0]
    found = children(600, dataclasses.replace(NOTHING, order=1.0), [parent])
    orders = [child.steps[k].order for child in found for k in (3, 4, 5, 6)]
    shares = [orders.count(order) / len(orders) for order in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.2, 0.4, 0.3, 0.1], abs=0.04)
    assert max(child.steps[0].order for child in found) == 1
    assert {child.steps[1].order for child in found} == {1, 2}


def test_relaxations_become_linear_without_a_change_of_the_solver():
    """A coefficient that does not move keeps the factor that the named relaxation had."""
    scheduler = DPMSolverPPScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(5)
    parent = known_schedule("dpm++", scheduler._grid)
    (child,) = children(1, dataclasses.replace(NOTHING, relaxation=1.0, relaxation_deviation=0.0), [parent])
    assert all(step.derivatives[0].relaxation == "linear" for step in child.steps[1:-1])
    results = []
    for schedule in (parent, child):
        searched = SearchedScheduler.from_config(STABLE_DIFFUSION, decisions=schedule)
        searched.set_timesteps(5)
        results.append(sample(searched, torch.ones(2, 3, dtype=torch.float64)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


def test_correctors_follow_their_predictors():
    parent = known_schedule("unipc3", _grid(6))
    found = children(100, dataclasses.replace(NOTHING, order=0.5), [parent])
    for child in found:
        for before, after in zip(parent.steps[:-1], child.steps[:-1], strict=True):
            same = dataclasses.replace(before, correction=None) == dataclasses.replace(after, correction=None)
            assert after.correction == (before.correction if same else after.own_correction())
        assert child.steps[-1].correction is None


def test_crossovers_take_fields_or_steps_of_two_parents():
    one, other = (known_schedule(solver, _grid(6)) for solver in ("dpm++3m", "deis"))
    crossing = dataclasses.replace(NOTHING, crossover=1.0)
    whole, mixed = (
        [child for child in children(40, dataclasses.replace(crossing, deep_crossover=deep), [one, other]) if child]
        for deep in (0.0, 1.0)
    )
    assert len(whole) > 5
    # Only one field differs and can be exchanged: the kind of prediction of one parent, the orders of the other.
    measures = {tuple(step.measure for step in child.steps) for child in whole}
    orders = {tuple(step.derivatives for step in child.steps) for child in whole}
    assert measures == {("data",) * 6, ("noise",) * 6}
    assert orders == {tuple(step.derivatives for step in parent.steps) for parent in (one, other)}
    sources = [set(enumerate(parent.steps)) for parent in (one, other)]
    for child in mixed:
        steps = set(enumerate(child.steps))
        assert steps <= sources[0] | sources[1]
        assert steps & (sources[0] - sources[1])
        assert steps & (sources[1] - sources[0])


def test_analytic_first_steps_only_where_they_are_allowed():
    parents = parents_of("vp", 4)
    often = dataclasses.replace(NOTHING, afs=1.0, measure=0.3)
    found = children(60, often, parents)
    assert {child.afs for child in found} == {"none", "zero_x0"}
    assert all(len(child.steps) == 4 + (child.afs != "none") for child in found)
    assert {child.afs for child in children(60, often, parents, afs=False)} == {"none"}


def test_steps_are_cut_to_what_their_place_allows():
    steps = [
        SolverStep("data", -2, newest(2), SolverStep("data", -1, newest(3)).own_correction()),
        SolverStep("noise", -1, newest(4)),
        SolverStep("data", -1, (Derivative((-3, -2)), Derivative((-2, -3))), SolverStep().own_correction()),
    ]
    first, second, third = fitted(steps)
    assert first == SolverStep(
        "data", -1, (), SolverStep("data", -1).own_correction().__class__(-2, (Derivative((-1,)),))
    )
    assert second == SolverStep("noise", -1, (Derivative((-2,)),))
    assert third == dataclasses.replace(steps[2], correction=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": 1.5}, "order 1.5 must be a probability"),
        ({"time_deviation": -0.1}, "time_deviation -0.1 must be a probability, or a finite deviation"),
        ({"orders": (0.5, 0.5, 0.5, 0.5)}, "orders .* must sum to 1"),
        ({"corrections": (0.5, 0.6, 0.0)}, "corrections .* must sum to 1"),
    ],
)
def test_impossible_probabilities_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MutationSettings(**changes)


def _grid(steps: int):
    scheduler = DPMSolverPPScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(steps)
    return scheduler._grid
