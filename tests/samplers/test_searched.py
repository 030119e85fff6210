"""The scheduler that runs a searched schedule: pipelines, saving, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from analytic import EDM, FLOW, MIXTURE, STABLE_DIFFUSION, output, sample
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS
from fewstep.samplers.scheduler import PlanScheduler
from fewstep.samplers.searched import SearchedScheduler
from fewstep.samplers.usf.decisions import Derivative, SolverSchedule, SolverStep, newest
from fewstep.samplers.usf.known import known_schedule
from pipelines.tiny import CASES, STEPS, missing, recorded

MODELS = {"vp": STABLE_DIFFUSION, "flow": FLOW, "edm": EDM}


def mixed(scheduler: PlanScheduler, calls: int) -> SolverSchedule:
    """A schedule of its own for a scheduler's model, with switches, relaxations and correctors."""
    scheduler.set_timesteps(calls)
    grid = scheduler._grid
    steps = []
    for i in range(calls):
        step = SolverStep("noise" if i % 2 else "data", -1, newest(min(i + 1, 3), "linear", 0.1 if i else 0.0))
        if i in (1, 2) and i < calls - 1:
            step = dataclasses.replace(step, correction=step.own_correction())
        steps.append(step)
    return SolverSchedule(grid.schedule.kind, tuple(grid.levels.tolist()), tuple(steps))


def searched(config: Any, calls: int = STEPS, **changes: Any) -> SearchedScheduler:
    schedule = mixed(SAMPLERS["dpm++"].build(config), calls)
    return SearchedScheduler.from_config(config, decisions=dataclasses.replace(schedule, **changes))


@pytest.mark.parametrize("case", CASES)
def test_it_runs_in_unmodified_pipelines(case):
    """From noise and from images, the network is called where the plan says; and it is another sampler's image."""
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = searched({**pipe.scheduler.config, "use_dynamic_shifting": False})
    latents = chosen.call(pipe)
    assert latents.shape == chosen.shape
    assert latents.isfinite().all()
    assert pipe.scheduler.step_index == len(pipe.scheduler.timesteps) == STEPS
    assert len(pipe.scheduler.plan) == STEPS - (pipe.scheduler.begin_index or 0)
    base = chosen.build(SAMPLERS["dpm++"].build(pipe.scheduler.config))
    assert not torch.allclose(latents, chosen.call(base), atol=1e-4)


@pytest.mark.parametrize("case", ["sd", "sd3", "dit", "wan"])
def test_pipelines_save_it_and_load_it(case, tmp_path):
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = searched(pipe.scheduler.config)
    expected = chosen.call(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **missing(case))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is SearchedScheduler
    assert loaded.scheduler.solver_schedule == pipe.scheduler.solver_schedule
    assert (chosen.call(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_decisions_are_json_in_the_config(tmp_path):
    scheduler = searched(STABLE_DIFFUSION)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["decisions"] == scheduler.solver_schedule.to_dict()
    again = SearchedScheduler.from_pretrained(tmp_path)
    for one in (scheduler, again):
        one.set_timesteps(STEPS)
    assert again.plan == scheduler.plan
    assert SearchedScheduler.from_config(scheduler.config).solver_schedule == scheduler.solver_schedule


@pytest.mark.parametrize("model", MODELS)
def test_prediction_types_are_one(model):
    mixture = GaussianMixture.random(4, 6, seed=3)
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    types = ("epsilon", "v_prediction") if model == "edm" else ("epsilon", "sample", "v_prediction", "flow_prediction")
    results = []
    for prediction_type in types:
        scheduler = searched({**MODELS[model], "prediction_type": prediction_type}, 6)
        scheduler.set_timesteps(6)
        results.append(sample(scheduler, start * float(scheduler.init_noise_sigma), mixture.clean))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


def test_a_run_from_the_middle_goes_on_with_the_schedule():
    """Straight lines stay straight from any entry on."""
    scheduler = searched(STABLE_DIFFUSION, 6)
    clean, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for begin in range(1, 6):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(begin)
        plan = scheduler.plan
        assert len(plan) == 6 - begin
        x = scheduler.add_noise(clean, noise, scheduler.timesteps[begin : begin + 1].repeat(3))
        result = sample(scheduler, x, lambda *_: clean, begin=begin)
        torch.testing.assert_close(result, clean, rtol=0, atol=1e-9)


def test_the_analytic_step_scales_the_first_input():
    """With x_0 = 0 the run begins at the second node with the noise scaled to it, whatever the prediction type."""
    base = mixed(SAMPLERS["dpm++"].build(STABLE_DIFFUSION), 5)
    analytic = SearchedScheduler.from_config(STABLE_DIFFUSION, decisions=dataclasses.replace(base, afs="zero_x0"))
    analytic.set_timesteps(4)
    assert len(analytic.timesteps) == analytic.num_inference_steps == 4
    grid = analytic._grid
    start = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start
    for k, call in enumerate(analytic.plan):
        seen = analytic.scale_model_input(x, analytic.timesteps[k])
        if k == 0:
            torch.testing.assert_close(seen, start * grid.nodes[1].sigma / grid.nodes[0].sigma)
        u = output(
            MIXTURE.clean(seen.reshape(-1, 1), call.alpha, call.sigma).reshape(4, 5),
            seen,
            call.alpha,
            call.sigma,
            "epsilon",
        )
        result = analytic.step(u, analytic.timesteps[k], x)
        x = result.prev_sample
        clean = MIXTURE.clean(seen.reshape(-1, 1), call.alpha, call.sigma).reshape(4, 5)
        torch.testing.assert_close(result.pred_original_sample, clean, rtol=1e-8, atol=1e-8)
    again = SearchedScheduler.from_config(STABLE_DIFFUSION, decisions=analytic.config.decisions)
    again.set_timesteps(4)
    with pytest.raises(ValueError, match="afs needs scale_model_input before every step"):
        again.step(start, again.timesteps[0], start)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pipelines_may_go_on_with_the_scaled_sample(scale):
    """DiT's does; its run is the one of a loop that keeps the sample apart from the network's input."""
    chosen = CASES["dit"]
    pipe = chosen.build()
    schedule = dataclasses.replace(mixed(SAMPLERS["dpm++"].build(pipe.scheduler.config), STEPS + 1), afs="zero_x0")
    pipe.scheduler = SearchedScheduler.from_config(pipe.scheduler.config, decisions=schedule)
    with recorded(pipe.scheduler) as steps:
        pipe(
            class_labels=[1],
            num_inference_steps=STEPS,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(7),
        )
    outputs = [step.model_output for step in steps]
    again = SearchedScheduler.from_config(pipe.scheduler.config)
    again.set_timesteps(STEPS)
    x = steps[0].sample / again.plan.calls[0].in_scale
    for t, output_ in zip(again.timesteps, outputs, strict=True):
        again.scale_model_input(x, t)
        x = again.step(output_, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, steps[-1].result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("thresholding", [False, True])
def test_the_analytic_step_works_in_pipelines(thresholding):
    chosen = CASES["sd"]
    pipe = chosen.build()
    schedule = mixed(SAMPLERS["dpm++"].build(pipe.scheduler.config), STEPS + 1)
    schedule = dataclasses.replace(schedule, afs="zero_x0")
    options = {"thresholding": thresholding}
    pipe.scheduler = SearchedScheduler.from_config(pipe.scheduler.config, decisions=schedule, **options)
    assert chosen.call(pipe).isfinite().all()
    assert len(pipe.scheduler.plan) == STEPS


def test_thresholding_after_an_analytic_step_knows_the_scaled_sample():
    """Noise predictions of a clean sample within the bound are the same with and without thresholding."""
    steps = (SolverStep("noise"), SolverStep("noise", -1, newest(2)), SolverStep("noise", -1, newest(2)))
    schedule = SolverSchedule("vp", (14.0, 4.0, 1.0, 0.1), steps, afs="zero_x0")
    results = []
    for thresholding in (False, True):
        scheduler = SearchedScheduler(**STABLE_DIFFUSION, thresholding=thresholding, decisions=schedule)
        scheduler.set_timesteps(2)
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for k, call in enumerate(scheduler.plan):
            seen = scheduler.scale_model_input(x, scheduler.timesteps[k])
            x = scheduler.step((seen - call.alpha * 0.5 * seen.tanh()) / call.sigma, scheduler.timesteps[k], x)[0]
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_options_of_times_have_no_effect():
    plain = searched(FLOW)
    plain.set_timesteps(STEPS)
    for options in (
        {"use_karras_sigmas": True},
        {"flow_shift": 9.0},
        {"use_dynamic_shifting": True, "flow_shift": 1.0},
    ):
        other = SearchedScheduler.from_config(plain.config, **options)
        other.set_timesteps(STEPS)
        assert other.plan == plain.plan


def test_the_number_of_calls_is_that_of_the_decisions():
    scheduler = searched(STABLE_DIFFUSION)
    scheduler.set_timesteps()
    assert scheduler.num_inference_steps == STEPS
    with pytest.raises(
        ValueError, match="num_inference_steps 7: this scheduler was made for 4 network calls; use 4, or search"
    ):
        scheduler.set_timesteps(7)
    with pytest.raises(ValueError, match=r"num_inference_steps 3: .* made for 4"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 3))
    with pytest.raises(ValueError, match="timesteps are part of this scheduler; leave them out"):
        scheduler.set_timesteps(timesteps=[900, 500, 200, 20])
    flow = searched(FLOW)
    flow.set_timesteps(sigmas=np.linspace(1.0, 0.25, STEPS), mu=0.9)
    assert flow.sigmas.tolist() == pytest.approx(flow.solver_schedule.levels)


def test_what_it_cannot_run_is_refused():
    with pytest.raises(ValueError, match=r"decisions are missing.*search_schedule.*known_schedule"):
        SearchedScheduler.from_config(STABLE_DIFFUSION)
    with pytest.raises(ValueError, match=r"decisions are no fewstep\.usf"):
        SearchedScheduler(decisions={"format": "other"})
    schedule = searched(STABLE_DIFFUSION).solver_schedule
    with pytest.raises(ValueError, match="made for a vp model and this one is edm"):
        SearchedScheduler.from_config(EDM, decisions=schedule)


def test_implicit_correctors_call_twice_at_a_node():
    step = SolverStep("data", -1, newest(2))
    corrected = dataclasses.replace(step, correction=step.own_correction(implicit=True))
    schedule = SolverSchedule("vp", (14.0, 4.0, 1.0, 0.0), (SolverStep(), corrected, SolverStep()))
    scheduler = SearchedScheduler(**STABLE_DIFFUSION, decisions=schedule)
    scheduler.set_timesteps(4)
    labels = scheduler.timesteps.tolist()
    assert len(labels) == 4
    assert labels[2] == labels[3]
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sample(scheduler, x).isfinite().all()


def test_schedules_of_one_step_and_of_known_solvers_run():
    scheduler = SAMPLERS["unipc"].build(STABLE_DIFFUSION)
    scheduler.set_timesteps(1)
    one = SearchedScheduler.from_config(STABLE_DIFFUSION, decisions=known_schedule("unipc", scheduler._grid))
    one.set_timesteps(1)
    assert len(one.plan) == 1
    relaxed = SolverStep("data", -1, (Derivative((-2,), "0.5exp"),))
    schedule = SolverSchedule("vp", (14.0, 1.0, 0.1), (SolverStep(), relaxed))
    assert SearchedScheduler(**STABLE_DIFFUSION, decisions=schedule.to_dict()).solver_schedule == schedule
