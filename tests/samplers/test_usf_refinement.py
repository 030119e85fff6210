"""The continuous last stage: its vector is the schedule, and its evolution strategy finds minima."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from analytic import EDM, FLOW, STABLE_DIFFUSION, sample
from fewstep.samplers import DPMSolverPPScheduler, SearchedScheduler
from fewstep.samplers.usf.decisions import SolverSchedule, SolverStep
from fewstep.samplers.usf.known import KNOWN_SOLVERS, known_schedule
from fewstep.samplers.usf.mutation import SearchSpace
from fewstep.samplers.usf.refinement import Handles, _CovarianceAdaptation, refine

MODELS = {"vp": STABLE_DIFFUSION, "flow": FLOW, "edm": EDM}


def case(model: str, solver: str, **changes: object) -> tuple[SolverSchedule, SearchSpace]:
    scheduler = DPMSolverPPScheduler(**MODELS[model], fractional_timesteps=True)
    scheduler.set_timesteps(6)
    schedule = dataclasses.replace(known_schedule(solver, scheduler._grid), **changes)
    low = scheduler.schedule.min_level
    return schedule, SearchSpace(scheduler.schedule, schedule.calls, (0.1 * low, low), True, True)


def result_of(schedule: SolverSchedule, model: str) -> torch.Tensor:
    searched = SearchedScheduler.from_config(MODELS[model], decisions=schedule, fractional_timesteps=True)
    searched.set_timesteps()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sample(searched, x * float(searched.init_noise_sigma))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("solver", KNOWN_SOLVERS)
def test_the_vector_of_a_schedule_is_the_schedule(solver, model):
    """Every known solver, written with linear relaxations and derivatives of factor 0, gives the same samples."""
    schedule, space = case(model, solver)
    handles = Handles(schedule, space)
    again = handles.at(handles.vector())
    assert all(step.order >= 2 for step in again.steps[1:-1])
    expected = result_of(schedule, model)
    # Levels go through exponentials of their logarithms and the table's float32.
    torch.testing.assert_close(result_of(again, model), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    np.testing.assert_allclose(Handles(again, space).vector(), handles.vector(), rtol=0, atol=1e-9)


def test_every_entry_of_the_vector_matters():
    schedule, space = case("vp", "unipc3")
    handles = Handles(schedule, space)
    before = result_of(schedule, "vp")
    vector = handles.vector()
    # Five inner times; steps 1 to 4 and the correctors of steps 0 to 3: the last one's sample is read by no step.
    assert len(vector) == 5 + 4 + 4
    for k in range(len(vector)):
        moved = vector.copy()
        moved[k] += 0.05
        assert (result_of(handles.at(moved), "vp") - before).abs().max() > 1e-5


def test_free_ends_move_within_their_bounds():
    schedule, space = case("vp", "dpm++3m")
    levels = (*schedule.levels[:-1], 0.5 * space.ends[1])
    handles = Handles(dataclasses.replace(schedule, levels=levels), space)
    vector = handles.vector()
    assert handles.times[-1] == 6
    vector[5] += 0.1
    assert handles.at(vector).levels[-1] == pytest.approx(0.5 * space.ends[1] * math.exp(-0.1))
    vector[5] += 5.0
    with pytest.raises(ValueError, match="end"):
        handles.at(vector)


def test_it_keeps_its_budget_and_finds_better_schedules():
    schedule, space = case("vp", "dpm++")
    target = Handles(schedule, space).vector() + 0.2
    asked: list[float] = []

    def distance(candidate: SolverSchedule) -> float:
        asked.append(float(np.square(Handles(candidate, space).vector() - target).sum()))
        return asked[-1]

    refine([schedule], space, distance, 300, seed=1)
    assert len(asked) <= 300
    assert min(asked) < 0.05 * len(target) * 0.2**2


def test_it_goes_on_from_the_start_that_leads_further():
    """Half of the budget for both, the other half for the one that came nearer."""
    (far, space), (near, _) = case("vp", "dpm++"), case("vp", "dpm++3m")
    asked: list[bool] = []

    def distance(candidate: SolverSchedule) -> float:
        is_near = candidate.steps[2].order == 3
        asked.append(is_near)
        return float(np.square(Handles(candidate, space).vector()).sum()) + 100.0 * (not is_near)

    refine([far, near], space, distance, 200)
    assert 160 < len(asked) <= 200
    assert asked == sorted(asked)
    assert 30 < asked.count(False) <= 50


def test_it_ends_where_nothing_is_valid():
    """Also where no sample lies within the space."""
    schedule, space = case("vp", "dpm++")
    asked: list[SolverSchedule] = []

    def fitness(candidate: SolverSchedule) -> float:
        asked.append(candidate)
        return 1.0

    refine([schedule], space, fitness, 20, deviation=1e6)
    assert asked == []


def test_the_evolution_strategy_minimises_a_rotated_ellipsoid():
    """Condition 1e4 in 6 dimensions: without adaptation of the covariance it does not come near."""
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.standard_normal((6, 6)))
    scales = np.logspace(0, 4, 6)

    def value(x: np.ndarray) -> float:
        return float((scales * (basis @ (x - 1.0)) ** 2).sum())

    strategy = _CovarianceAdaptation(np.zeros(6), 0.3, np.random.default_rng(1))
    evaluations = 0
    while evaluations < 2500:
        samples = strategy.ask()
        strategy.tell(samples, np.array([value(x) for x in samples]))
        evaluations += len(samples)
    assert value(strategy.mean) < 1e-9
    assert strategy.deviation < 1e-3


def test_one_step_has_nothing_to_refine():
    schedule = SolverSchedule("vp", (14.0, 0.0), (SolverStep(),))
    _, space = case("vp", "dpm++")
    refine([schedule], space, lambda candidate: pytest.fail("nothing can move"), 10)
