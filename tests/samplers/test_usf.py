"""The decisions of solver schedules: what is refused, the file format, and the authors' files."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from analytic import EDM, FLOW, STABLE_DIFFUSION
from fewstep.samplers import DPMSolverPPScheduler
from fewstep.samplers.usf.decisions import Correction, Derivative, SolverSchedule, SolverStep, newest
from fewstep.samplers.usf.known import known_schedule, released_schedule

LEVELS = (10.0, 3.0, 1.0, 0.2, 0.0)
STEPS = (
    SolverStep("noise", correction=Correction(-2, (Derivative((-1,), "unipc-bh2"),), True)),
    SolverStep("data", -1, newest(2, "linear", 0.3)),
    SolverStep("data", -2, (Derivative((-1, -3)), Derivative((-1, -3)))),
    SolverStep(),
)
SCHEDULE = SolverSchedule("vp", LEVELS, STEPS, (900.0, 500.5, 200.0, 20.0))


def with_step(i: int, **changes: object) -> dict[str, object]:
    steps = list(STEPS)
    steps[i] = dataclasses.replace(steps[i], **changes)
    return {"steps": tuple(steps)}


def test_network_calls_are_counted():
    assert SCHEDULE.calls == 5
    assert dataclasses.replace(SCHEDULE, afs="zero_x0").calls == 4
    assert dataclasses.replace(SCHEDULE, **with_step(0, correction=None)).calls == 4


REFUSED = {
    "kind": ({"kind": "ve"}, "kind 've' is unknown; use one of vp, flow, edm"),
    "afs": ({"afs": "half"}, "afs 'half' is unknown"),
    "mean": ({"afs": "average_x0"}, "afs 'average_x0' needs the mean image .* use zero_x0"),
    "count": ({"levels": LEVELS[:-1]}, "4 steps need 5 levels and got 4"),
    "order of levels": ({"levels": (10.0, 3.0, 3.0, 0.2, 0.0)}, "number 1 is 3 and the next 3; leave one"),
    "infinite": ({"levels": (float("inf"), 3.0, 1.0, 0.2, 0.0)}, "levels must be finite"),
    "negative": ({"levels": (10.0, 3.0, 1.0, 0.2, -1.0)}, "levels must be finite, not negative"),
    "flow": ({"kind": "flow"}, "and not above 1"),
    "labels": ({"timesteps": (900.0, 500.0)}, "4 steps need as many timesteps and got 2"),
    "label": ({"timesteps": (900.0, 500.0, float("nan"), 1.0)}, "timesteps must be finite"),
    "measure": (with_step(1, measure="v"), "measure of step 1 is 'v'; use data or noise"),
    "start": (with_step(1, start=-3, derivatives=()), "start of step 1 is -3; use -1 to -2"),
    "future": (with_step(1, start=0, derivatives=()), "start of step 1 is 0; use -1 to -2"),
    "too few points": (
        with_step(2, start=-1, derivatives=(Derivative((-2,)), Derivative((-2,)))),
        r"active_points of derivative 2 of step 2 are \[-2\]; give at least 2",
    ),
    "repeated": (with_step(2, derivatives=(Derivative((-1, -1)),)), "step 2 are .* give distinct ones"),
    "start is active": (with_step(2, derivatives=(Derivative((-2,)),)), "without the start -2"),
    "unknown point": (with_step(1, derivatives=(Derivative((-3,)),)), "only -1 to -2 are known there"),
    "order": (with_step(3, derivatives=(Derivative((-2,)),) * 4), "derivatives of step 3 make order 5; use at most 3"),
    "relaxation": (
        with_step(1, derivatives=(Derivative((-2,), "much"),)),
        "relaxation of derivative 1 of step 1 is 'much'",
    ),
    "second": (
        with_step(2, derivatives=(Derivative((-1, -3)), Derivative((-1, -3), "linear", 0.1))),
        "relaxation of derivative 2 of step 2 is 'linear'; only the first has one",
    ),
    "coefficient": (
        with_step(1, derivatives=(Derivative((-2,), "unipc-bh1", 0.1),)),
        "coefficient of derivative 1 of step 1 is 0.1; give a finite number, and 0 unless",
    ),
    "not finite": (with_step(1, derivatives=(Derivative((-2,), "linear", float("nan")),)), "is nan; give a finite"),
    "last corrector": (
        with_step(3, correction=SolverStep().own_correction()),
        "correction of step 3, the last one, would need a network call at the end; leave it out",
    ),
    "corrector without the new node": (
        with_step(1, correction=Correction(-2, (Derivative((-3,)),))),
        "correction of step 1 leave out -1, the new node",
    ),
    "corrector's start": (
        with_step(1, correction=Correction(-1, (Derivative((-2,)),))),
        "active_points of the correction of step 1 leave out -1",
    ),
    "corrector from the new node": (
        with_step(1, correction=Correction(-1, (Derivative((-1,)),))),
        "start of the correction of step 1 is -1; use -2 to -3",
    ),
    "close": ({"levels": (10.0, 1.0005, 1.0, 0.2, 0.0)}, r"step 2 are \[-1, -3\], two of them within 0.001"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradicting_decisions_are_refused(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SCHEDULE, **changes)


def test_a_step_cannot_be_analytic_and_the_only_one():
    with pytest.raises(ValueError, match="without a network call; add a step"):
        SolverSchedule("vp", (10.0, 0.0), (SolverStep(),), afs="zero_x0")


def test_an_analytic_node_is_not_the_result():
    with pytest.raises(ValueError, match="start of step 1 is the analytic node"):
        SolverSchedule("vp", (10.0, 1.0, 0.0), (SolverStep(), SolverStep("data", -2)), afs="zero_x0")


def test_the_paper_gives_a_step_its_corrector():
    step = SolverStep("data", -2, (Derivative((-1, -3), "linear", 0.5), Derivative((-3, -4))))
    assert step.own_correction(implicit=True) == Correction(
        -3, (Derivative((-2, -4, -1)), Derivative((-4, -5, -1)), Derivative((-4, -5, -1))), True
    )


def test_files_give_back_every_decision():
    text = json.dumps(SCHEDULE.to_dict(), allow_nan=False)
    assert SolverSchedule.from_dict(json.loads(text)) == SCHEDULE
    other = dataclasses.replace(SCHEDULE, timesteps=None, afs="zero_x0")
    assert SolverSchedule.from_dict(json.loads(json.dumps(other.to_dict()))) == other


DAMAGES = {
    "format": (lambda d: d.update(format="fewstep.plan"), "no fewstep.usf of version 1"),
    "version": (lambda d: d.update(version=2), "no fewstep.usf of version 1"),
    "missing": (lambda d: d.pop("levels"), "decisions is damaged: levels is missing"),
    "unknown": (lambda d: d.update(skip=1), "decisions is damaged: 'skip' is unknown"),
    "steps": (lambda d: d.update(steps=5), "steps of decisions is 5; give a list"),
    "levels": (lambda d: d.update(levels=["a"]), "levels is .* give numbers"),
    "step": (lambda d: d["steps"].__setitem__(1, 5), "step 1 is 5; give a mapping"),
    "start": (lambda d: d["steps"][1].update(start=-1.5), "start of step 1 is -1.5; give a whole number"),
    "derivatives": (lambda d: d["steps"][1].update(derivatives=None), "derivatives of step 1 is None; give a list"),
    "points": (lambda d: d["steps"][1]["derivatives"][0].update(active_points="a"), "derivative 1 of step 1 is 'a'"),
    "point": (lambda d: d["steps"][1]["derivatives"][0].update(active_points=["a"]), "derivative 1 of step 1 is 'a'"),
    "implicit": (lambda d: d["steps"][0]["correction"].update(implicit=1), "implicit of the correction of step 0 is 1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused(name):
    damage, message = DAMAGES[name]
    data = json.loads(json.dumps(SCHEDULE.to_dict()))
    damage(data)
    with pytest.raises(ValueError, match=message):
        SolverSchedule.from_dict(data)


def test_a_schedule_belongs_to_a_kind_of_model():
    flow = DPMSolverPPScheduler(**FLOW).schedule
    with pytest.raises(ValueError, match="made for a vp model and this one is flow"):
        SCHEDULE.grid(flow)


def test_labels_follow_from_levels():
    schedule = DPMSolverPPScheduler(**STABLE_DIFFUSION).schedule
    unlabelled = dataclasses.replace(SCHEDULE, timesteps=None)
    expected = schedule.timestep(unlabelled.grid(schedule).levels[:-1])
    assert unlabelled.grid(schedule, fractional=True).timesteps.tolist() == expected.tolist()
    assert unlabelled.grid(schedule).timesteps.tolist() == expected.round().tolist()
    assert SCHEDULE.grid(schedule).timesteps.tolist() == [900.0, 500.5, 200.0, 20.0]


def test_unknown_solvers_are_named():
    scheduler = DPMSolverPPScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="solver 'rk' is unknown; use one of ddim, "):
        known_schedule("rk", scheduler._grid)


# The shape of the authors' file for EDM on CIFAR-10 with 3 network calls, with values as published.
RELEASED = {
    "timesteps": [80.0, 7.7355, 1.4069, 0.29714, 0.0023523],
    "orders": [1, 2, 3, 2],
    "prediction_types": ["data_prediction", "noise_prediction", "data_prediction", "data_prediction"],
    "start_points": [-1, -1, -1, -1],
    "derivative_types": [
        [{"estimate": "Difference_0", "relaxation": None, "active_points": []}],
        [{"estimate": "Difference_1", "active_points": [-2], "relaxation": "linear", "relaxation_coefficient": 0.01}],
        [
            {"estimate": "Difference_1", "active_points": [-2], "relaxation": None},
            {"estimate": "Difference_2", "active_points": None, "relaxation": "no_relaxation"},
        ],
        [{"estimate": "Difference_1", "active_points": [-2], "relaxation": "linear", "relaxation_coefficient": 0.0545}],
    ],
    "corrector_types": [
        {"type": "no_corrector", "start_point": None, "taylor_order": None, "derivative_type": None},
        {
            "type": "pseudo",
            "start_point": -2,
            "taylor_order": 3,
            "derivative_type": [
                {"estimate": "Difference_2", "active_points": [-3, -1], "relaxation": None},
                {"estimate": "Difference_2", "active_points": None, "relaxation": None},
            ],
        },
        {"type": "no_corrector", "start_point": None, "taylor_order": None, "derivative_type": None},
        {"type": "no_corrector", "start_point": None, "taylor_order": None, "derivative_type": None},
    ],
    "afs": "zero_x0",
    "skip_coefficients": [1.0, 1.0],
}


def test_the_authors_files_are_read():
    schedule = released_schedule(RELEASED, DPMSolverPPScheduler(**EDM).schedule)
    assert schedule == SolverSchedule(
        "edm",
        (80.0, 7.7355, 1.4069, 0.29714, 0.0023523),
        (
            SolverStep("data"),
            SolverStep(
                "noise",
                -1,
                newest(2, "linear", 0.01),
                Correction(-2, (Derivative((-3, -1)), Derivative((-1, -3)))),
            ),
            SolverStep("data", -1, (Derivative((-2,)), Derivative((-2, -3)))),
            SolverStep("data", -1, newest(2, "linear", 0.0545)),
        ),
        afs="zero_x0",
    )
    assert schedule.calls == 3


def test_times_of_the_authors_vp_files_are_labels_and_one():
    """Time t is label 1000 t - 1; below the first label the level falls to 0 in a straight line."""
    noise = DPMSolverPPScheduler(**STABLE_DIFFUSION).schedule
    times = [1.0, 0.5, 0.1005, 0.01, 0.0004]
    schedule = released_schedule({**RELEASED, "timesteps": times}, noise)
    assert schedule.timesteps == pytest.approx((999.0, 499.0, 99.5, 9.0))
    table = noise.level([999.0, 499.0, 99.5, 9.0])
    assert schedule.levels == pytest.approx((*table, 0.4 * noise.min_level))


RELEASED_REFUSED = {
    "missing": ({"orders": ...}, "orders is missing; give timesteps, orders"),
    "count": ({"orders": [1, 2]}, "orders has 2 entries; 5 timesteps make 4 steps"),
    "average": ({"afs": "average_x0"}, "needs the mean image"),
    "skips": ({"skip_coefficients": [1.0, 0.9]}, "skip_coefficients change the network"),
    "v3": ({"prediction_types": ["dpmsolver_v3_prediction"] * 4}, "prediction_types of step 0 is 'dpmsolver_v3"),
    "estimate": (
        {"derivative_types": [[], [{"estimate": "Pade_1", "active_points": [-2]}], [], []], "orders": [1, 2, 1, 1]},
        "estimate of derivative 1 of step 1 is 'Pade_1'",
    ),
    "derivatives": (
        {"derivative_types": [[], [], [], []]},
        "derivative_types of step 1 has 0 entries; order 2 needs 1",
    ),
    "points": (
        {
            "derivative_types": [[], [{"estimate": "Difference_2", "active_points": [-2]}], [], []],
            "orders": [1, 2, 1, 1],
        },
        r"active_points of derivative 1 of step 1 are \[-2\]; Difference_2 needs 2",
    ),
    "corrector": ({"corrector_types": [{"type": "pc"}] * 4}, "corrector_types of step 0 is 'pc'"),
}


@pytest.mark.parametrize("name", RELEASED_REFUSED)
def test_what_the_authors_files_hold_beyond_the_space_is_refused(name):
    changes, message = RELEASED_REFUSED[name]
    data = {key: value for key, value in {**copy.deepcopy(RELEASED), **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        released_schedule(data, DPMSolverPPScheduler(**EDM).schedule)


def test_the_authors_files_are_not_for_flow_models():
    with pytest.raises(ValueError, match="for VP and EDM models, not for flow"):
        released_schedule(RELEASED, DPMSolverPPScheduler(**FLOW).schedule)
