"""Runs that begin or end in the middle: image to image, inpainting, base and refiner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fewstep.samplers import SAMPLERS, DPMSolverPPScheduler, UniPCScheduler
from pipelines.tiny import CASES, Case, recorded, seeded

ONE_CALL = [name for name, entry in SAMPLERS.items() if entry.options.get("solver_type") != "rhork"]
FROM_IMAGE = [name for name, case in CASES.items() if case.from_image]
IMAGE_TO_IMAGE = [name for name in FROM_IMAGE if name.endswith("img2img")]


@contextmanager
def noised(scheduler: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """What ``add_noise`` was given and what it made: clean sample, noise, result."""
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    original = scheduler.add_noise

    def recording(original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = original(original_samples, noise, timesteps)
        calls.append((original_samples.clone(), noise.clone(), result.clone()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "add_noise", recording)
        yield calls


def packed(chosen: Case, latents: torch.Tensor) -> torch.Tensor:
    """Flux works on two by two patches, as tokens."""
    if not chosen.pipeline.startswith("Flux") or latents.ndim == 3:
        return latents
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


@pytest.mark.parametrize("strength", [0.25, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("name", ["dpm++", "deis", "unipc", "dpm++2s", "sde-dpm++"])
@pytest.mark.parametrize("case", IMAGE_TO_IMAGE)
def test_a_run_from_an_image_begins_at_the_level_that_the_network_is_told(
    case: str, name: str, strength: float
) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    scheduler = pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    with noised(scheduler) as mixtures, recorded(scheduler) as steps:
        latents = chosen.call(pipe, 8, strength=strength)
    assert latents.isfinite().all()
    # Pipelines of flow models do not round the number of steps before they subtract it.
    begin = 8 - int(8 * strength) if chosen.kind == "vp" else int(8 - 8 * strength)
    assert [step.timestep for step in steps] == pytest.approx(scheduler.timesteps[begin:].tolist())
    ((clean, noise, result),) = mixtures
    torch.testing.assert_close(packed(chosen, result), steps[0].sample)
    start = scheduler.plan.calls[0]
    torch.testing.assert_close(result, start.alpha * clean + start.sigma * noise, rtol=1e-5, atol=1e-5)
    level = float(steps[0].timestep)
    if chosen.kind == "flow":
        assert start.sigma == pytest.approx(level / 1000, rel=1e-6)
    else:
        assert start.alpha**2 == pytest.approx(float(scheduler.alphas_cumprod[int(level)]), rel=1e-5)


@pytest.mark.parametrize("name", ["dpm++", "deis", "unipc", "dpm++2s", "unipc3", "ipndm"])
@pytest.mark.parametrize("case", ["sd-inpaint", "sdxl-inpaint", "sd3-inpaint", "flux-inpaint"])
def test_inpainting_keeps_the_image_at_the_level_of_the_next_step(case: str, name: str) -> None:
    """After step k the known half is the noised image at level k + 1, and the image itself at the end."""
    chosen = CASES[case]
    pipe = chosen.build()
    scheduler = pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    with noised(scheduler) as mixtures, recorded(scheduler) as steps:
        latents = chosen.call(pipe, 5)
    calls = scheduler.plan.calls
    assert len(mixtures) == len(steps) == len(calls)
    clean, noise, _ = mixtures[-1]
    known = torch.ones_like(latents, dtype=torch.bool)
    if chosen.pipeline.startswith("Flux"):
        known = packed(chosen, torch.arange(16).expand(1, 1, 16, 16) < 8).all(-1, keepdim=True)
    else:
        known[..., 4:] = False
    for step, call in zip(steps[1:], calls[1:], strict=True):
        expected = packed(chosen, call.alpha * clean + call.sigma * noise)
        difference = torch.where(known, step.sample - expected, 0.0)
        assert difference.abs().max() < 1e-5
    assert torch.where(known, latents - packed(chosen, clean), 0.0).abs().max() < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("case", ["sd-img2img", "sd3-img2img"])
def test_begin_index_and_the_first_timestep_mean_the_same_start(case: str, name: str) -> None:
    chosen = CASES[case]
    scheduler = SAMPLERS[name].build(chosen.scheduler().config)
    order = scheduler.order
    scheduler.set_timesteps(6)
    begin = 2 * order
    noise = [seeded(2, 4, 8, 8, seed=k) for k in range(len(scheduler.timesteps))]

    def run() -> torch.Tensor:
        x = seeded(2, 4, 8, 8, seed=99)
        for k, t in enumerate(scheduler.timesteps[begin:]):
            x = scheduler.step(torch.tanh(x), t, x, variance_noise=noise[k]).prev_sample
        return x

    scheduler.set_begin_index(begin)
    told = run()
    assert scheduler.begin_index == begin
    scheduler.set_timesteps(6)
    assert scheduler.begin_index is None
    # The stages of a Runge-Kutta step share the label of the next node: only begin_index tells them apart.
    if order == 1:
        assert torch.equal(run(), told)


@pytest.mark.parametrize("name", ["dpm++", "deis-heun"])
def test_a_start_outside_the_run_is_refused_at_once(name: str) -> None:
    """A pipeline that cuts all timesteps away never gets to a step."""
    scheduler = SAMPLERS[name].build({})
    scheduler.set_timesteps(4)
    for begin in (-1, len(scheduler.timesteps) + 1):
        with pytest.raises(ValueError, match="begin_index"):
            scheduler.set_begin_index(begin)


def test_runge_kutta_runs_cannot_start_inside_a_step() -> None:
    scheduler = SAMPLERS["deis-rk4"].build({})
    scheduler.set_timesteps(4)
    x = seeded(1, 4, 8, 8)

    def start(begin: int) -> None:
        scheduler.set_begin_index(begin)
        scheduler.step(x, scheduler.timesteps[begin], x)

    start(4)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="begin_index 2"):
        start(2)


@pytest.mark.parametrize("name", ["deis-heun", "deis-kutta3", "deis-rk4"])
def test_runge_kutta_starts_where_its_steps_start_after_a_shorter_first_step(name: str) -> None:
    """From pure noise (alpha = 0) the first step takes one call, so steps do not begin at multiples of the order."""
    scheduler = SAMPLERS[name].build({"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    calls = scheduler.plan.calls
    for begin in range(len(calls)):
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        try:
            scheduler.set_begin_index(begin)
            rest = scheduler.plan.calls
        except ValueError as error:
            assert "begin_index" in str(error)  # noqa: PT017
            continue
        assert [call.level for call in rest] == [call.level for call in calls[begin:]]


@pytest.mark.parametrize("name", SAMPLERS)
def test_base_and_refiner_share_a_run(name: str) -> None:
    """The refiner goes on at the level at which the base stopped, and together they visit every timestep once."""
    base, refiner = CASES["sdxl"], CASES["sdxl-img2img"]
    pipe, second = base.build(), refiner.build()
    pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    second.scheduler = SAMPLERS[name].build(second.scheduler.config)
    with recorded(pipe.scheduler) as first_half:
        latents = base.call(pipe, 10, denoising_end=0.7)
    if name not in ONE_CALL:
        # The pipelines cut between two labels, which is inside a Runge-Kutta step.
        with pytest.raises(ValueError, match="begin_index"):
            refiner.call(second, 10, denoising_start=0.7, image=latents)
        return
    with recorded(second.scheduler) as second_half:
        result = refiner.call(second, 10, denoising_start=0.7, image=latents)
    assert result.isfinite().all()
    visited = [step.timestep for step in (*first_half, *second_half)]
    assert visited == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert len(first_half) > len(second_half) > 0
    assert torch.equal(second_half[0].sample, first_half[-1].result)


@pytest.mark.parametrize("name", ["dpm++", "deis", "unipc"])
def test_one_scheduler_may_serve_two_pipelines_in_turn(name: str) -> None:
    """``from_pipe`` shares the object."""
    text, image = CASES["sd"].build(), CASES["sd-img2img"].build()
    shared = SAMPLERS[name].build(text.scheduler.config)
    text.scheduler = image.scheduler = shared
    first = CASES["sd"].call(text)
    second = CASES["sd-img2img"].call(image)
    assert torch.equal(CASES["sd"].call(text), first)
    assert torch.equal(CASES["sd-img2img"].call(image), second)


@pytest.mark.parametrize("cls", [DPMSolverPPScheduler, UniPCScheduler])
@pytest.mark.parametrize("case", ["sd-img2img", "flux-img2img"])
def test_full_strength_starts_from_almost_pure_noise(case: str, cls: Any) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = cls.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with recorded(pipe.scheduler) as steps:
        chosen.call(pipe, strength=1.0)
    assert len(steps) == len(pipe.scheduler.timesteps)
    assert pipe.scheduler.plan.calls[0].alpha < 0.1
