"""Runs whose result is known: Gaussian data through Stable Diffusion 1 and 3, and diffusers' schedulers beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

from fewstep.samplers import SAMPLERS, DEISScheduler, DPMSolverPPScheduler, UniPCScheduler
from pipelines.analytic import GaussianDenoiser, flow_level, guided_mean, vp_level
from pipelines.loops import SHIFTED, STOCHASTIC
from pipelines.tiny import CASES, DENOISERS, seeded

DETERMINISTIC = [name for name, entry in SAMPLERS.items() if not entry.stochastic and name not in SHIFTED]
GUIDANCE = 5.0
FAMILIES = {
    "dpm": (DPMSolverPPScheduler, DPMSolverMultistepScheduler),
    "deis": (DEISScheduler, DEISMultistepScheduler),
    "unipc": (UniPCScheduler, UniPCMultistepScheduler),
    "edm": (DPMSolverPPScheduler, EDMDPMSolverMultistepScheduler),
}


def gaussian_pipeline(case: str, name: str, spread: float) -> tuple[Any, GaussianDenoiser]:
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    flow = chosen.kind == "flow"
    level = flow_level if flow else vp_level(pipe.scheduler.alphas_cumprod)
    part = "transformer" if flow else "unet"
    denoiser = GaussianDenoiser(getattr(pipe, part), level, spread=spread, flow=flow)
    setattr(pipe, part, denoiser)
    return pipe, denoiser


def gaussian_run(case: str, name: str, steps: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """What the pipeline made of a noise, what is exact at the level where it ends, and the mean."""
    chosen = CASES[case]
    pipe, denoiser = gaussian_pipeline(case, name, spread)
    # In double precision, or what is seen is how far a few coarse steps amplify rounding.
    noise = seeded(*chosen.shape, seed=5, dtype=torch.float64)
    prompts = {key: value.double() for key, value in chosen.inputs().items() if isinstance(value, torch.Tensor)}
    latents = chosen.call(pipe, steps, latents=noise, guidance_scale=GUIDANCE, **prompts)
    mean = guided_mean(prompts, GUIDANCE)
    plan = pipe.scheduler.plan
    exact = denoiser.solution(
        noise, mean, (plan.calls[0].alpha, plan.calls[0].sigma), (plan.final_alpha, plan.final_sigma)
    )
    assert latents.dtype == torch.float64
    return latents, exact, mean


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("case", ["sd", "sd3"])
def test_data_in_one_point_is_found_in_any_number_of_steps(case: str, name: str) -> None:
    for steps in (1, 2, 5):
        latents, exact, _ = gaussian_run(case, name, steps, spread=0.0)
        torch.testing.assert_close(latents, exact, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name not in SHIFTED])
@pytest.mark.parametrize("case", ["sd", "sd3"])
def test_stochastic_runs_end_in_the_point_too(case: str, name: str) -> None:
    latents, _, mean = gaussian_run(case, name, 5, spread=0.0)
    torch.testing.assert_close(latents, torch.full_like(latents, mean), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("case", ["sd", "sd3"])
def test_gaussian_data_converges_to_the_probability_flow(case: str, name: str) -> None:
    errors = []
    # Momentum lags some steps behind: its first order takes longer to show.
    for steps in (8, 32 if SAMPLERS[name].order > 1 else 64):
        latents, exact, _ = gaussian_run(case, name, steps, spread=0.7)
        errors.append(float((latents - exact).abs().max()))
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.15


# ------------------------------------------------------------------------------------------------- beside diffusers


@contextmanager
def one_label(pipe: Any) -> Iterator[None]:
    """The network sees one time label throughout: diffusers truncates those of flow models to integers."""
    network: Any = next(getattr(pipe, name) for name in DENOISERS if hasattr(pipe, name))

    def replace(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "timestep": torch.full_like(kwargs["timestep"], 500)}

    handle = network.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def relative_difference(case: str, ours: Any, theirs: Any, steps: int, **inputs: Any) -> float:
    chosen = CASES[case]
    results = []
    for scheduler in (ours, theirs):
        pipe = chosen.build()
        pipe.scheduler = scheduler
        if chosen.kind == "flow":
            with one_label(pipe):
                results.append(chosen.call(pipe, steps, **inputs))
        else:
            results.append(chosen.call(pipe, steps, **inputs))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-6)
    return float((results[0] - results[1]).abs().max() / results[1].abs().max())


# What diffusers' classes run in: no step of theirs takes DDPM's generator but DPM's, none but UniPC's runs Flux without
# dynamic shifting, and their DEIS leaves noise in flow models.
VP = ["sd", "sdxl", "dit", "dit-learned", "sd-img2img", "sdxl-img2img", "sd-inpaint", "sd-inpaint9", "sdxl-inpaint"]
FLOW = ["sd3", "sd3-dynamic", "flux-dynamic", "wan", "wan-euler"]
PAIRS = [
    *((case, family) for case in VP for family in ("dpm", "deis", "unipc")),
    ("ddpm", "dpm"),
    *((case, family) for case in FLOW for family in ("dpm", "unipc")),
    ("flux", "unipc"),
    ("sdxl-edm", "edm"),
]


@pytest.mark.parametrize(("case", "family"), PAIRS)
def test_the_latents_are_those_of_diffusers(case: str, family: str) -> None:
    chosen = CASES[case]
    ours_class, theirs_class = FAMILIES[family]
    stock = chosen.scheduler()
    options: dict[str, Any] = {}
    if chosen.kind == "flow":
        dynamic = bool(stock.config.get("use_dynamic_shifting"))
        shift = stock.config.get("shift", stock.config.get("flow_shift"))
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        options["use_dynamic_shifting"] = dynamic
    theirs = theirs_class.from_config(stock.config, **options)
    ours = ours_class.from_config(theirs.config)
    for steps in (2, 5, 20):
        assert relative_difference(case, ours, theirs, steps) < 5e-6


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("dpm", {"use_karras_sigmas": True}),
    ("dpm", {"use_lu_lambdas": True}),
    ("dpm", {"timestep_spacing": "trailing", "solver_type": "heun", "euler_at_final": True}),
    ("dpm", {"algorithm_type": "sde-dpmsolver++"}),
    ("dpm", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "use_karras_sigmas": True}),
    ("dpm", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("deis", {"solver_order": 3, "timestep_spacing": "leading"}),
    ("unipc", {"solver_order": 3, "use_karras_sigmas": True}),
    ("unipc", {"disable_corrector": [0, 1], "timestep_spacing": "trailing"}),
    ("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS)
@pytest.mark.parametrize("case", ["sd", "sdxl-img2img"])
def test_options_mean_what_they_mean_in_diffusers(case: str, family: str, options: dict[str, Any]) -> None:
    """Stochastic solvers too: the same generator gives the same noise."""
    ours_class, theirs_class = FAMILIES[family]
    theirs = theirs_class.from_config(CASES[case].scheduler().config, **options)
    ours = ours_class.from_config(theirs.config)
    for steps in (3, 20):
        assert relative_difference(case, ours, theirs, steps) < 2e-5
