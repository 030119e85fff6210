"""Every sampler in every pipeline: it runs, calls the network where its plan says, and leaves its config alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.samplers import SAMPLERS, DEISScheduler, DPMSolverPPScheduler, UniPCScheduler
from pipelines.loops import SHIFTED
from pipelines.tiny import CASES, FLUX_SHIFT, STEPS, batched, counted, flow_euler, recorded

DEFAULTS = ("dpm++", "deis", "unipc")
# These take the number of network calls for the number of steps, so several calls a step put the start inside a step.
COUNTS_CALLS = ("flux-img2img", "flux-inpaint")
FLOW_CASES = [name for name, case in CASES.items() if case.kind == "flow"]


def clean_config(scheduler: Any) -> dict[str, Any]:
    """The config without diffusers' bookkeeping, which saving and printing add to."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def calls_per_step(name: str) -> int:
    entry = SAMPLERS[name]
    return entry.order if entry.options.get("solver_type") == "rhork" else 1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("case", CASES)
def test_every_sampler_runs_in_every_pipeline(case: str, name: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    config = clean_config(pipe.scheduler)
    if case in COUNTS_CALLS and calls_per_step(name) > 1:
        with pytest.raises(ValueError, match="begin_index"):
            chosen.call(pipe)
        return
    with counted(pipe) as labels, recorded(pipe.scheduler) as steps:
        latents = chosen.call(pipe)
    assert latents.shape == chosen.shape
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()
    assert clean_config(pipe.scheduler) == config
    assert pipe.scheduler.schedule.kind == chosen.kind
    assert pipe.scheduler.step_index == len(pipe.scheduler.timesteps)
    # One network call an entry of timesteps (two where guidance calls twice), with that entry as its label.
    begin = pipe.scheduler.begin_index or 0
    planned = [call.timestep for call in list(pipe.scheduler.plan)]
    if name in SHIFTED:
        planned = pipe.scheduler.timesteps[begin:].tolist()
    assert len(steps) == len(planned) == len(pipe.scheduler.timesteps) - begin
    assert [step.timestep for step in steps] == pytest.approx(planned, rel=1e-6)
    scale = 1e-3 if chosen.pipeline.startswith("Flux") else 1.0
    twice = len(labels) // len(steps)
    assert labels[::twice] == pytest.approx([scale * label for label in planned], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("case", ["sd", "sd3", "wan", "dit", "ddpm"])
def test_one_step_and_many(case: str, name: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    for steps in (1, 2, 16):
        assert chosen.call(pipe, steps).isfinite().all()
        assert pipe.scheduler.num_inference_steps == steps


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_gives_the_same_result_twice(case: str, name: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    first = chosen.call(pipe)
    chosen.call(pipe, steps=STEPS + 1)
    assert torch.equal(chosen.call(pipe), first)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("case", ["sd", "sdxl", "sd3", "flux", "dit"])
def test_each_image_of_a_batch_is_the_image_of_its_own_run(case: str, name: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    many = batched(chosen.inputs(), 3)
    batch = chosen.call(pipe, generator=generators, **many)
    singles = torch.cat([chosen.call(pipe, seed=seed) for seed in (7, 8, 9)])
    torch.testing.assert_close(batch, singles, rtol=1e-4, atol=1e-4 * float(singles.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("case", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_half_precision(case: str, name: str, dtype: torch.dtype) -> None:
    chosen = CASES[case]
    modules = copy.deepcopy(chosen.modules())
    pipe = chosen.build(**modules)
    stock = pipe.scheduler
    pipe.to(dtype)
    inputs = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in chosen.inputs().items()
    }
    reference = chosen.call(pipe, **inputs)
    pipe.scheduler = SAMPLERS[name].build(stock.config)
    with recorded(pipe.scheduler) as steps:
        latents = chosen.call(pipe, **inputs)
    assert all(step.result.dtype == step.sample.dtype for step in steps)
    assert latents.dtype == reference.dtype
    assert latents.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("case", ["sd", "sd3", "wan"])
def test_a_callback_that_changes_nothing_leaves_the_run_alone(case: str, name: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config).manual_seed(3)
    seen = []

    def callback(pipe: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((i, float(t), pipe.scheduler.step_index))
        return {"latents": tensors["latents"].clone()}

    plain = chosen.call(pipe)
    observed = chosen.call(pipe, callback_on_step_end=callback)
    assert torch.equal(observed, plain)
    assert [index for _, _, index in seen] == list(range(1, len(pipe.scheduler.timesteps) + 1))


# ------------------------------------------------------------------------------------------------ what the config says


@pytest.mark.parametrize("cls", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
@pytest.mark.parametrize("case", FLOW_CASES)
def test_flow_models_are_recognised_from_their_config(case: str, cls: Any) -> None:
    stock = CASES[case].scheduler()
    scheduler = cls.from_config(stock.config)
    assert scheduler.config.prediction_type == "flow_prediction"
    assert scheduler.config.use_flow_sigmas is True
    shift = stock.config.get("shift", stock.config.get("flow_shift"))
    assert scheduler.config.flow_shift == shift
    assert bool(scheduler.config.use_dynamic_shifting) == bool(stock.config.get("use_dynamic_shifting"))
    for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        if key in stock.config:
            assert scheduler.config.get(key) == stock.config[key]


@pytest.mark.parametrize("cls", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
@pytest.mark.parametrize("options", [{"shift": 1.0}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_custom_sigmas_are_shifted_as_in_the_flow_euler_scheduler(cls: Any, options: Any, kind: str) -> None:
    stock = flow_euler(**options, time_shift_type=kind)
    times: dict[str, Any] = {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    if stock.config.use_dynamic_shifting:
        times["mu"] = 0.8
    stock.set_timesteps(**times)
    scheduler = cls.from_config(stock.config)
    scheduler.set_timesteps(**times)
    torch.testing.assert_close(scheduler.sigmas, stock.sigmas, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps, stock.timesteps, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("cls", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
def test_the_shift_of_the_default_grid(cls: Any) -> None:
    """Undoing the shift gives a uniform grid that ends at 0."""
    static = cls.from_config(flow_euler(shift=3.0).config)
    static.set_timesteps(8)
    dynamic = cls.from_config(flow_euler(use_dynamic_shifting=True).config)
    dynamic.set_timesteps(8, mu=float(torch.log(torch.tensor(3.0))))
    torch.testing.assert_close(dynamic.sigmas, static.sigmas, rtol=1e-5, atol=1e-6)
    uniform = static.sigmas / (3.0 - 2.0 * static.sigmas)
    assert static.sigmas[-1] == 0.0
    assert (uniform[:-1].diff() - uniform[:-1].diff().mean()).abs().max() < 1e-5
    assert uniform[0] > 0.998


def test_the_flux_pipeline_hands_over_the_shift_of_the_image_size() -> None:
    chosen = CASES["flux-dynamic"]
    pipe = chosen.build()
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    chosen.call(pipe)
    tokens = chosen.shape[1]
    slope = (FLUX_SHIFT["max_shift"] - FLUX_SHIFT["base_shift"]) / (4096 - 256)
    mu = tokens * slope + FLUX_SHIFT["base_shift"] - 256 * slope
    expected = DPMSolverPPScheduler.from_config(flow_euler(shift=float(torch.tensor(mu).exp())).config)
    expected.set_timesteps(STEPS)
    torch.testing.assert_close(pipe.scheduler.sigmas, expected.sigmas, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
def test_dynamic_shifting_without_mu_is_refused(cls: Any) -> None:
    scheduler = cls.from_config(flow_euler(use_dynamic_shifting=True).config)
    with pytest.raises(ValueError, match="mu"):
        scheduler.set_timesteps(4)


def test_flow_runs_go_to_zero_and_start_at_noise() -> None:
    for name in SAMPLERS:
        scheduler = SAMPLERS[name].build(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
        scheduler.set_timesteps(6)
        assert scheduler.plan.final_level == 0.0
        assert scheduler.sigmas[0] > 0.998


def test_a_stable_diffusion_pipeline_may_rewrite_the_config() -> None:
    """It sets ``steps_offset`` to 1 when it is built; the times follow."""
    chosen = CASES["sd"]
    scheduler = DPMSolverPPScheduler(timestep_spacing="leading", steps_offset=0)
    pipe = type(chosen.build())(**chosen.modules(), scheduler=scheduler)
    assert pipe.scheduler.config.steps_offset == 1
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [801, 601, 401, 201]


def test_pipelines_take_custom_times() -> None:
    chosen = CASES["sd"]
    for cls in (DPMSolverPPScheduler, DEISScheduler, UniPCScheduler):
        pipe = chosen.build()
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        chosen.call(pipe, timesteps=[900, 600, 300, 50])
        assert pipe.scheduler.timesteps.tolist() == [900, 600, 300, 50]
        chosen.call(pipe, sigmas=[10.0, 3.0, 1.0, 0.3])
        assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx([10.0, 3.0, 1.0, 0.3])
    for name in ("sd3", "flux"):
        pipe = CASES[name].build()
        pipe.scheduler = UniPCScheduler.from_config(flow_euler(shift=1.0).config)
        CASES[name].call(pipe, sigmas=[0.9, 0.6, 0.3])
        # FluxPipeline sets aside the sigmas of its caller where the scheduler makes flow sigmas itself.
        if name == "sd3":
            assert pipe.scheduler.sigmas.tolist() == pytest.approx([0.9, 0.6, 0.3, 0.0])
