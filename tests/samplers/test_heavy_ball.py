"""HB momentum: published numbers, the paper's recurrence step by step, and special values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from analytic import EDM, FLOW, MIXTURE, STABLE_DIFFUSION, ZERO_SNR, lambda_grid
from fewstep.samplers import SAMPLERS, Plan, PlanScheduler, UniPCScheduler, deis, dpm_solver, unipc
from fewstep.samplers.builder import PlanBuilder
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.grid import Grid
from fewstep.samplers.heavy_ball import HeavyBallScheduler, heavy_ball
from fewstep.samplers.multistep import Corrector, Predictor

MULTISTEP = [
    name
    for name, sampler in SAMPLERS.items()
    if sampler.scheduler is UniPCScheduler
    or (
        hasattr(sampler.scheduler, "_predictor")
        and not sampler.stochastic
        and sampler.options.get("method") != "singlestep"
        and sampler.options.get("solver_type") != "rhork"
    )
]
MODELS = {"vp": STABLE_DIFFUSION, "zero_snr": ZERO_SNR, "flow": FLOW, "edm": EDM}
TRAJECTORY = lambda_grid(np.linspace(-2.5, 2.0, 7))


def plms(grid: Grid, order: int) -> Predictor:
    return deis.predictor(grid, order=order, form="ipndm", lower_order_final=False)


def dpm(grid: Grid, order: int = 2, measure: Any = "data") -> Predictor:
    return dpm_solver.predictor(
        grid,
        order=order,
        measure=measure,
        stochastic=False,
        form="midpoint",
        lower_order_final=False,
        euler_at_final=False,
        diffusers_third_order=False,
    )


# ---------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("base", "damping", "expected"),
    [
        (dpm(TRAJECTORY), 0.8, 1.008487304222),
        (plms(TRAJECTORY, 4), 0.9, 1.038534287553),
        (plms(TRAJECTORY, 2), 0.8, 0.993206971659),
        (dpm(TRAJECTORY), 1.0, 1.076815086012),
    ],
)
def test_trajectories_of_hb(base, damping, expected):
    plan = heavy_ball(PlanBuilder(TRAJECTORY, "sample"), base, damping)
    assert float(samples_of(plan)[-1]) == pytest.approx(expected, abs=2e-11)


# ---------------------------------------------------------------------------------------------- the recurrences


def by_the_paper(
    grid: Grid, predictor: Predictor, damping: float, corrector: Corrector | None = None
) -> list[torch.Tensor]:
    """HB as it is written down: velocities in the solver's chart, directions whose weights sum to 1."""
    x = base = torch.ones(1, 1, dtype=torch.float64)
    samples, history = [x], []
    velocity: Any = None
    before: Any = None
    corrected: Any = None
    for i in range(grid.steps):
        node, target = grid.nodes[i], grid.nodes[i + 1]
        m = MIXTURE.clean(x, node.alpha, node.sigma)
        if predictor.measure == "noise":
            m = (x - node.alpha * m) / node.sigma
        weights = corrector(i - 1, len(history)) if corrector and history else None
        if weights is not None:
            s, t = grid.nodes[i - 1], node
            width = t.alpha - s.alpha * t.sigma / s.sigma
            if predictor.measure == "noise":
                width = t.sigma - s.sigma * t.alpha / s.alpha
            direction = sum(w / width * v for w, v in zip(weights.predictions, [m, *history], strict=False))
            old = before if corrected is None else corrected
            corrected = direction if old is None else (1 - damping) * old + damping * direction
            base = weights.state * base + width * corrected
        else:
            base, corrected = x, None
        history.insert(0, m)
        rule = predictor.rule(i, len(history))
        width = target.alpha - node.alpha * target.sigma / node.sigma
        if predictor.measure == "noise":
            width = target.sigma - node.sigma * target.alpha / node.alpha
        direction = sum(w / width * v for w, v in zip(rule.predictions, history, strict=False))
        plain = velocity is None or (i == grid.steps - 1 and np.count_nonzero(rule.predictions) == 1)
        before = velocity
        velocity = direction if plain else (1 - damping) * velocity + damping * direction
        x = rule.state * base + width * velocity
        samples.append(x)
    return samples


def samples_of(plan: Plan) -> list[torch.Tensor]:
    execution, x = PlanRun(plan), torch.ones(1, 1, dtype=torch.float64)
    samples = [x]
    for call in plan:
        x, _ = execution.step(x, MIXTURE.clean(x, call.alpha, call.sigma))
        samples.append(x)
    return samples


UNEVEN = lambda_grid([-2.4, -1.9, -1.0, -0.6, 0.3, 0.5, 1.6, math.inf])


def uni(measure: Any, disabled: tuple[int, ...] = ()) -> tuple[Predictor, Corrector]:
    orders = unipc.step_orders(UNEVEN, 3, 0, True)
    options: Any = {"measure": measure, "form": "bh1"}
    return unipc.predictor(UNEVEN, orders, **options), unipc.corrector(UNEVEN, orders, disabled, **options)


def tab(order: int) -> Predictor:
    return deis.predictor(UNEVEN, order=order, form="tab", lower_order_final=True)


@pytest.mark.parametrize("damping", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("measure", ["data", "noise"])
@pytest.mark.parametrize("disabled", [(), (0,), (0, 1), (3,)])
@pytest.mark.parametrize("form", ["classic", "delta"])
def test_hb_with_a_corrector_is_the_recurrence(damping, measure, disabled, form):
    solver = uni(measure, disabled)
    plan = heavy_ball(PlanBuilder(UNEVEN, "sample"), solver[0], damping, solver[1], form=form)
    expected = by_the_paper(UNEVEN, solver[0], damping, solver[1])
    for ours, theirs in zip(samples_of(plan), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("damping", [0.3, 0.8, 1.0])
@pytest.mark.parametrize(
    "base",
    [dpm(UNEVEN, 1), dpm(UNEVEN, 2), dpm(UNEVEN, 3), dpm(UNEVEN, 3, "noise"), plms(UNEVEN, 4), tab(3), tab(1)],
    ids=["ddim", "2M", "3M", "dpm3m", "plms4", "tab2", "ddim-noise"],
)
def test_hb_is_the_recurrence(damping, base):
    plan = heavy_ball(PlanBuilder(UNEVEN, "sample"), base, damping)
    for ours, theirs in zip(samples_of(plan), by_the_paper(UNEVEN, base, damping), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------------------------------- special values


def sampled(scheduler: PlanScheduler) -> torch.Tensor:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MULTISTEP)
def test_without_damping_hb_is_the_solver(name, model):
    ours = HeavyBallScheduler(**MODELS[model], damping=1.0, solver=name)
    theirs = SAMPLERS[name].scheduler(**MODELS[model], **SAMPLERS[name].options)
    for steps in (1, 2, 7, 16):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
        assert ours.plan.calls == theirs.plan.calls
        assert torch.equal(sampled(ours), sampled(theirs))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("unipc", {"corrector_form": "delta"}),
        ("unipc3", {"disable_corrector": [0, 3], "solver_p": "deis3"}),
        ("unipc", {"predict_x0": False, "lower_order_final": False}),
        ("dpm++", {"denoise_to_zero": True}),
        ("dpm++", {"solver_order": 3, "euler_at_final": True}),
    ],
)
def test_without_damping_hb_is_the_solver_with_its_options(name, own):
    config = {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min"}
    ours = HeavyBallScheduler(**config, damping=1.0, solver=name, solver_options=own)
    theirs = SAMPLERS[name].scheduler(**config, **{**SAMPLERS[name].options, **own})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
    assert ours.plan.calls == theirs.plan.calls
    loaded = HeavyBallScheduler.from_config(ours.config)
    loaded.set_timesteps(8)
    assert loaded.plan.calls == ours.plan.calls
    damped = HeavyBallScheduler(**config, damping=0.8, solver=name, solver_options=own)
    damped.set_timesteps(8)
    assert not torch.equal(sampled(damped), sampled(theirs))


@pytest.mark.parametrize("name", ["hb-dpm++", "hb-ipndm", "hb-unipc"])
def test_the_first_step_has_no_momentum(name):
    first = []
    for damping in (SAMPLERS[name].options["damping"], 1.0):
        scheduler = SAMPLERS[name].build(STABLE_DIFFUSION, damping=damping)
        scheduler.set_timesteps(6)
        x = torch.full((1, 3), 0.7, dtype=torch.float64)
        first.append(scheduler.step(torch.tanh(x), scheduler.timesteps[0], x, return_dict=False)[0])
    torch.testing.assert_close(*first, rtol=1e-15, atol=1e-15)


def test_a_last_step_of_first_order_has_no_momentum():
    for options in ({}, {"final_sigmas_type": "sigma_min"}, {"use_flow_sigmas": True}):
        scheduler = HeavyBallScheduler(damping=0.6, **options)
        scheduler.set_timesteps(6)
        (row,) = scheduler.plan.calls[-1].rows
        assert {slot for slot, _ in row.terms} <= {"sample", "prediction"}
    scheduler = HeavyBallScheduler(damping=0.6, solver_options={"lower_order_final": False})
    scheduler.set_timesteps(6)
    assert [slot for slot, _ in scheduler.plan.calls[-1].rows[-1].terms] == ["prediction"]


def test_a_run_that_begins_later_begins_without_momentum():
    scheduler = HeavyBallScheduler(**STABLE_DIFFUSION, damping=0.7)
    scheduler.set_timesteps(9)
    scheduler.set_begin_index(4)
    base = SAMPLERS["dpm++"].build(STABLE_DIFFUSION)
    base.set_timesteps(9)
    base.set_begin_index(4)
    terms = [dict(s.plan.calls[0].rows[-1].terms) for s in (scheduler, base)]
    assert terms[0]["sample"] == terms[1]["sample"]
    assert len(scheduler.plan) == 5


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": 0.0}, ["damping", "0.0", "(0, 1]"]),
        ({"damping": 1.01}, ["damping", "1.01", "(0, 1]"]),
        ({"damping": math.nan}, ["damping", "nan"]),
        ({"solver": "heun"}, ["solver", "heun", "dpm++"]),
        ({"solver": "dpm++2s"}, ["solver", "dpm++2s", "ipndm"]),
        ({"solver": "deis-heun"}, ["solver", "deis-heun", "unipc"]),
        ({"solver": "sde-dpm++"}, ["solver", "sde-dpm++", "deis"]),
        ({"solver": "hb-dpm++"}, ["solver", "hb-dpm++", "dpm++"]),
        ({"solver": "ghvb2.8"}, ["solver", "ghvb2.8", "ipndm"]),
        ({"solver_options": {"order": 2}}, ["solver_options", "order", "solver_order"]),
        ({"solver_options": {"beta_start": 0.1}}, ["solver_options", "beta_start", "solver_order"]),
        ({"solver_options": {"solver_order": 7}}, ["solver_order", "7"]),
        (
            {"solver_options": {"algorithm_type": "sde-dpmsolver++"}},
            ["solver_options", "sde-dpmsolver++", "stochastic"],
        ),
        ({"solver_options": {"method": "singlestep"}}, ["solver_options", "singlestep"]),
        ({"preset": "accurate"}, ["preset", "HeavyBallScheduler", "UniPCScheduler"]),
    ],
)
def test_hb_refuses_what_it_cannot_do(options, words):
    with pytest.raises(ValueError, match=r".+") as caught:
        HeavyBallScheduler(**options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"
