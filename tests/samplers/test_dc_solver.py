"""DC-Solver: the published numbers, the sampler beneath where nothing is compensated, and configs that save and load.

The search is in ``test_compensation.py``.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from analytic import EDM, FLOW, MIXTURE, STABLE_DIFFUSION, ZERO_SNR, lambda_grid, rounding, run, sample
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, DEISScheduler, DPMSolverPPScheduler, UniPCScheduler, unipc
from fewstep.samplers.builder import PlanBuilder
from fewstep.samplers.cascade import CascadeRegression
from fewstep.samplers.dc_solver import DCSolverScheduler, compensation_weights, compensator
from fewstep.samplers.dpm_solver import predictor as dpm_predictor
from fewstep.samplers.multistep import multistep
from fewstep.samplers.plan import Plan

MODELS: dict[str, dict[str, Any]] = {"vp": STABLE_DIFFUSION, "zero_snr": ZERO_SNR, "flow": FLOW, "edm": EDM}
TRAJECTORY = lambda_grid(np.linspace(-2.5, 2.0, 7))
CONSTANT = {ratio: [1.0, 1.0, ratio, ratio, ratio, ratio] for ratio in (0.9, 1.0, 1.1)}


@pytest.mark.parametrize(
    ("times", "ratio", "expected"),
    [
        ((0.35, 0.6, 0.8), 1.1, (1.161111111111, -0.2375, 0.076388888889)),
        ((0.35, 0.6, 0.8), 0.9, (0.85, 0.2125, -0.0625)),
        ((0.35, 0.6), 1.1, (1.1, -0.1)),
        ((0.35, 0.6, 0.8), 1.0, (1.0, 0.0, 0.0)),
        ((0.35, 0.6, 0.8, 0.9), 0.0, (0.0, 1.0, 0.0, 0.0)),
    ],
)
def test_weights(times, ratio, expected):
    weights = compensation_weights(times, ratio)
    assert weights == pytest.approx(expected, abs=2e-12)
    assert sum(weights) == pytest.approx(1.0, abs=1e-15)
    # Labels of a model count in thousandths, from another origin.
    assert compensation_weights([1000 * t - 1 for t in times], ratio) == pytest.approx(weights, abs=1e-12)


def unipc_plan(
    order: int, form: str, ratio: float, corrector_form: str = "classic", prediction_type: str = "sample"
) -> Plan:
    orders = unipc.step_orders(TRAJECTORY, order, 0, False)
    return multistep(
        PlanBuilder(TRAJECTORY, prediction_type),
        unipc.predictor(TRAJECTORY, orders, measure="data", form=form),
        unipc.corrector(TRAJECTORY, orders, [], measure="data", form=form),
        compensator=compensator(TRAJECTORY, CONSTANT[ratio], 2),
        form=corrector_form,
    )


def dpm_plan(ratio: float) -> Plan:
    options = {"lower_order_final": False, "euler_at_final": False, "diffusers_third_order": False}
    chosen = dpm_predictor(TRAJECTORY, order=2, measure="data", stochastic=False, form="midpoint", **options)
    return multistep(PlanBuilder(TRAJECTORY, "sample"), chosen, compensator=compensator(TRAJECTORY, CONSTANT[ratio], 2))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (lambda: unipc_plan(2, "bh2", 1.1), 1.092498431857),
        (lambda: unipc_plan(3, "bh1", 0.9), 1.031236039052),
        (lambda: unipc_plan(2, "bh2", 1.1, "delta"), 1.092498431857),
        (lambda: unipc_plan(3, "bh1", 0.9, "delta"), 1.031236039052),
        (lambda: dpm_plan(1.1), 1.099341470735),
        (lambda: unipc_plan(3, "bh1", 1.0), 1.047268903369),
    ],
)
def test_golden_trajectories(plan, expected):
    assert float(run(plan(), torch.ones(1, 1, dtype=torch.float64))) == pytest.approx(expected, abs=2e-11)


def test_golden_rows():
    """Call 3 of UniPC-3 with ratio 0.9 on a noise-predicting network: corrected sample, moved prediction, next sample.

    Over the corrected sample before, what the network saw, what it returned, and the three kept predictions.
    """
    call = unipc_plan(3, "bh1", 0.9, prediction_type="epsilon").calls[3]
    inputs = ["sample", "output", *sorted({slot for row in call.rows for slot, _ in row.terms if "kept" in slot})]
    values = dict(zip(inputs, np.eye(len(inputs)), strict=True))
    values["prediction"] = call.prediction[0] * values["sample"] + call.prediction[1] * values["output"]
    rows = []
    for row in call.rows:
        rows.append(sum(c * values[slot] for slot, c in row.terms))
        values.update({row.out: rows[-1]} if row.out != "sample" else {})
    expected = [
        [0.840655, 0.230602, -0.181936, 0.236709, -0.067917, 0.013717],
        [0.0, 1.387310, -1.094533, 0.200932, -0.053356, 0.0],
        [0.552575, 1.429148, -1.127542, -0.345387, 0.122479, 0.009016],
    ]
    # Which slot keeps what is the compiler's choice.
    assert len(rows) == 3
    for row, wanted in zip(rows, expected, strict=True):
        np.testing.assert_allclose(np.sort(row), np.sort(wanted), atol=6e-7)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{}, {"solver_order": 3, "solver_type": "bh1"}, {"disable_corrector": [0]}])
def test_ratios_of_one_are_unipc(model, options):
    """Bit for bit: the plan is the same."""
    config = {**MODELS[model], **options}
    ours, theirs = DCSolverScheduler(**config, ratios=[1.0] * 6), UniPCScheduler(**config)
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    assert ours.plan.calls == theirs.plan.calls
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for t in theirs.timesteps:
        output = torch.tanh(x)
        following = theirs.step(output, t, x, return_dict=False)[0]
        assert torch.equal(ours.step(output, t, x, return_dict=False)[0], following)
        x = following


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["ddim", "dpm++", "dpm++3m", "deis", "deis-tab2", "ipndm"])
def test_predictors_without_compensation_are_themselves(name, model):
    """Alone, times and ending included, and under UniC."""
    config = MODELS[model]
    for steps in (1, 2, 7):
        ours = DCSolverScheduler(**config, solver_p=name, corrector=False, ratios=[1.0] * steps)
        theirs = SAMPLERS[name].scheduler(**{**SAMPLERS[name].options, **config})
        corrected, unic = (cls(**config, solver_p=name) for cls in (DCSolverScheduler, UniPCScheduler))
        for scheduler in (ours, theirs, corrected, unic):
            scheduler.set_timesteps(steps)
        assert ours.plan.calls == theirs.plan.calls
        assert corrected.plan.calls == unic.plan.calls


def reference(nodes, times, ratios, order_of_base, x, clean):
    """The method as its authors wrote it, tensor by tensor, for DDIM and DPM-Solver++(2M) with two more predictions."""
    history: list[tuple[float, int, torch.Tensor]] = []
    for i, (s, t) in enumerate(pairwise(nodes)):
        history.insert(0, (times[i], i, clean(x, s.alpha, s.sigma)))
        if len(history) >= 3 and ratios[i] != 1.0:
            at = ratios[i] * times[i] + (1 - ratios[i]) * times[i - 1]
            total = torch.zeros_like(x)
            for j in range(3):
                term = history[j][2]
                for k in range(3):
                    if j != k:
                        term = term * (at - history[k][0]) / (history[j][0] - history[k][0])
                total = total + term
            history[0] = (times[i], i, total)
        m = history[0][2]
        h = t.half_logsnr - s.half_logsnr
        if order_of_base == 2 and i > 0:
            r = (s.half_logsnr - nodes[i - 1].half_logsnr) / h
            m = (1 + 0.5 / r) * m - 0.5 / r * history[1][2]
        x = t.sigma / s.sigma * x - t.alpha * np.expm1(-h) * m
    return x


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm++", 2)])
def test_compensated_predictors(name, order):
    """Against the authors' loop: what was moved once stays moved."""
    ratios = [1.0, 1.0, 0.8, 1.15, 1.0, 1.3, 0.9]
    scheduler = DCSolverScheduler(
        **{**STABLE_DIFFUSION, "prediction_type": "sample", "final_sigmas_type": "sigma_min"},
        solver_p=name,
        corrector=False,
        ratios=ratios,
    )
    scheduler.set_timesteps(7)
    nodes, times = scheduler._grid.nodes, scheduler._grid.timesteps.tolist()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    # dpm++ takes its last step with first order, and so below.
    middle = reference(nodes[:-1], times, ratios, order, x, MIXTURE.clean)
    states, y = [x], x
    for k, call in enumerate(scheduler.plan):
        y = scheduler.step(MIXTURE.clean(y, call.alpha, call.sigma), scheduler.timesteps[k], y, return_dict=False)[0]
        states.append(y)
    torch.testing.assert_close(states[-2], middle, rtol=0, atol=1e-12)
    if order == 1:
        torch.testing.assert_close(y, reference(nodes, times, ratios, 1, x, MIXTURE.clean), rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("base", [{}, {"solver_p": "ddim", "corrector": False}, {"predict_x0": False}])
def test_compensated_plans_are_exact_on_straight_lines(model, base):
    """With any ratios: the weights of an interpolation have sum 1."""
    config = {**MODELS[model], **base}
    scheduler = DCSolverScheduler(**config, ratios=[1.0, 1.0, 0.7, 1.2, 1.4, 0.6])
    scheduler.set_timesteps(6)
    plan = scheduler.plan
    clean, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = plan.calls[0].alpha * clean + plan.calls[0].sigma * noise
    bounds = rounding(plan, scheduler._grid)
    for k, call in enumerate(plan):
        p, q = call.clean
        x = scheduler.step((clean - p * x) / q, scheduler.timesteps[k], x, return_dict=False)[0]
    torch.testing.assert_close(x, plan.final_alpha * clean + plan.final_sigma * noise, rtol=0, atol=bounds[-1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_prediction_types_are_one(prediction_type):
    mixture = GaussianMixture.random(4, 6, seed=3)
    results = []
    for kind in ("sample", prediction_type):
        scheduler = DCSolverScheduler(
            **{**STABLE_DIFFUSION, "prediction_type": kind}, ratios=[1.0, 1.0, 0.8, 1.2, 1.1, 0.9]
        )
        scheduler.set_timesteps(6)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for k, call in enumerate(scheduler.plan):
            u = mixture.predict(x, call.alpha, call.sigma, kind)
            x = scheduler.step(u, scheduler.timesteps[k], x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_a_constant_ratio_is_of_first_order():
    """The shift is of the size of a step (the reason for searching anew for every number of steps)."""

    def error(steps: int) -> float:
        grid = lambda_grid(np.linspace(-2.5, 2.0, steps + 1))
        orders = unipc.step_orders(grid, 2, 0, False)
        plan = multistep(
            PlanBuilder(grid, "sample"),
            unipc.predictor(grid, orders, measure="data", form="bh2"),
            unipc.corrector(grid, orders, [], measure="data", form="bh2"),
            compensator=compensator(grid, [1.1] * steps, 2),
        )
        return abs(float(run(plan, torch.ones(1, 1, dtype=torch.float64))) - 1.053096079036)

    errors = [error(steps) for steps in (80, 160, 320)]
    assert np.log2(errors[0] / errors[2]) / 2 == pytest.approx(1.0, abs=0.15)


def test_kept_tensors():
    """No more than the method reads: three predictions and, with a corrector, the corrected sample."""
    ratios = [1.0, 1.0, *[1.1] * 6]
    for options, kept in (({}, 3), ({"solver_p": "ddim", "corrector": False}, 2)):
        scheduler = DCSolverScheduler(**STABLE_DIFFUSION, **options, ratios=ratios)
        scheduler.set_timesteps(8)
        assert scheduler.plan.slots == kept, scheduler.plan


def test_saved_configs_bring_the_ratios_back(tmp_path):
    ratios = [1.0, 1.0, 0.1 + 0.7, 1.2345678901234567, 0.9]
    first = DCSolverScheduler(**STABLE_DIFFUSION, ratios=tuple(ratios), disable_corrector=[0], dc_order=2)
    first.save_pretrained(tmp_path)
    second = DCSolverScheduler.from_pretrained(tmp_path)
    assert second.config.ratios == ratios
    for scheduler in (first, second):
        scheduler.set_timesteps(5)
    assert second.plan == first.plan
    # Taken over by another sampler, they mean nothing and are no obstacle.
    UniPCScheduler.from_config(first.config).set_timesteps(8)


def test_foreign_configs_become_the_same_model():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    for theirs in (DDIMScheduler(**STABLE_DIFFUSION), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        ours, twin = (cls.from_config(theirs.config) for cls in (DCSolverScheduler, UniPCScheduler))
        ours.set_timesteps(6)
        twin.set_timesteps(6)
        assert ours.plan.calls == twin.plan.calls
        assert "ratios" in ours.config["_use_default_values"]
    theirs = UniPCMultistepScheduler(**STABLE_DIFFUSION, solver_order=3, solver_type="bh2")
    ours = DCSolverScheduler.from_config(theirs.config)
    assert ours.config.solver_order == 3
    theirs.set_timesteps(8)
    ours.set_timesteps(8)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sample(ours, x), sample(theirs, x), rtol=0, atol=2e-5)


def test_runs_that_begin_in_the_middle():
    """Compensation waits for three predictions, counted from the beginning of the run."""
    ratios = [1.0, 1.0, *[1.1] * 6]
    scheduler = DCSolverScheduler(**STABLE_DIFFUSION, ratios=ratios)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    late = DCSolverScheduler(**STABLE_DIFFUSION, ratios=[*[1.0] * 5, *[1.1] * 3])
    late.set_timesteps(8)
    late.set_begin_index(3)
    assert scheduler.plan.calls == late.plan.calls
    plain = UniPCScheduler(**STABLE_DIFFUSION)
    plain.set_timesteps(8)
    plain.set_begin_index(3)
    assert scheduler.plan.calls[:2] == plain.plan.calls[:2]
    assert scheduler.plan.calls[2:] != plain.plan.calls[2:]


RATIOS = [1.0, 1.0, 0.9]
CASCADE = CascadeRegression.fit({(5, 1.0): [1, 1, 0.9, 1.0, 1.1], (8, 4.0): [1, 1, 0.9, 1.0, 1.1, 1.0, 1.0, 1.0]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [1.0, 0.9, 1.0]}, r"the first 2 ratios must be 1.*\[1.0, 0.9, 1.0\]"),
        ({"ratios": RATIOS, "dc_order": 3}, "the first 3 ratios must be 1"),
        ({"ratios": []}, "ratios must be finite numbers, one a step"),
        ({"ratios": [1.0, 1.0, float("nan")]}, "ratios must be finite numbers"),
        ({"ratios": "abc"}, "ratios must be a list of numbers.*'abc'"),
        ({"ratios": 0.9}, "ratios must be a list of numbers.*0.9"),
        ({"dc_order": 0}, "dc_order 0 must be 1, 2 or 3"),
        ({"dc_order": 4}, "dc_order 4 must be 1, 2 or 3"),
        ({"ratios": RATIOS, "regression": CASCADE, "guidance_scale": 2.0}, "leave one of them out"),
        ({"regression": CASCADE}, "guidance_scale is needed.* 1 to 4"),
        ({"regression": CASCADE, "guidance_scale": 5.0}, "guidance_scale 5 lies outside the 1 to 4"),
        ({"regression": CASCADE, "guidance_scale": 2.0, "dc_order": 1}, "fitted with dc_order 2, not 1"),
        ({"regression": {"steps": [5, 8]}}, "regression is no fewstep.cascade"),
        ({"solver_p": "dpm++2s", "corrector": False}, "solver_p 'dpm\\+\\+2s' is no deterministic multistep sampler"),
        ({"solver_order": 5}, "solver_order 5"),
        ({"solver_type": "bh3"}, "solver_type 'bh3'"),
        ({"preset": "accurate"}, "preset 'accurate' was not measured for DCSolverScheduler"),
    ],
)
def test_impossible_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        DCSolverScheduler(**STABLE_DIFFUSION, **options)


def test_ratios_of_another_number_of_steps_are_refused():
    scheduler = DCSolverScheduler(**STABLE_DIFFUSION, ratios=[1.0, 1.0, 0.9, 1.1, 1.0])
    with pytest.raises(ValueError, match=r"run of 5 steps, and this one has 8; use 5 steps"):
        scheduler.set_timesteps(8)
    scheduler.set_timesteps(5)
    assert len(scheduler.plan) == 5


def test_timesteps_that_round_to_the_same_label_are_refused():
    """At 300 Karras levels neighbours share a label: the interpolation would divide by zero."""
    ratios = [1.0, 1.0, *[1.1] * 298]
    with pytest.raises(ValueError, match=r"compensation needs distinct timesteps.*fewer steps"):
        DCSolverScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True, ratios=ratios).set_timesteps(300)


def test_registered_names_are_their_samplers():
    for name, base in (("dc-solver", "unipc"), ("dc-ddim", "ddim"), ("dc-dpm++", "dpm++"), ("dc-deis", "deis")):
        for config in (STABLE_DIFFUSION, FLOW):
            plans = []
            for each in (name, base):
                scheduler = SAMPLERS[each].build(config)
                scheduler.set_timesteps(6)
                plans.append(scheduler.plan.calls)
            assert plans[0] == plans[1], name
            assert SAMPLERS[name].order == SAMPLERS[base].order


def test_solver_p_as_an_object():
    ours = DCSolverScheduler(**STABLE_DIFFUSION, solver_p=DPMSolverPPScheduler(solver_order=1), corrector=False)
    assert ours.config.solver_p == "ddim"
    assert DCSolverScheduler(**STABLE_DIFFUSION, solver_p=DEISScheduler(), corrector=False).config.solver_p == "deis"


def test_a_regression_in_the_config(tmp_path):
    scheduler = DCSolverScheduler(**STABLE_DIFFUSION, regression=CASCADE, guidance_scale=2.0)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["regression"]["steps"] == [5, 8]
    again = DCSolverScheduler.from_pretrained(tmp_path)
    fixed = DCSolverScheduler(**STABLE_DIFFUSION, ratios=CASCADE.predict(6, 2.0))
    for each in (again, fixed):
        each.set_timesteps(6)
    assert again.plan.calls == fixed.plan.calls
    with pytest.raises(ValueError, match="run of 9 steps lies outside the 5 to 8 steps"):
        again.set_timesteps(9)
