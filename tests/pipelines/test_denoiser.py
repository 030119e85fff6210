"""Denoisers of the pipelines that are taken apart, beside the pipelines' own calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline

from fewstep.samplers import (
    SAMPLERS,
    BranchedDenoiser,
    DCSolverScheduler,
    Denoiser,
    DrivenDenoiser,
    StitchedDenoiser,
    UniPCScheduler,
    fine_trajectory,
    sample,
    search_ratios,
)
from fewstep.scripts.generation.model import load_model
from model_folders import save_text_model
from pipelines.analytic import GaussianDenoiser, guided_mean, vp_level
from pipelines.denoisers import denoiser_images, generators, pipeline_images
from pipelines.networks import flux_transformer, sd3_transformer, text_unet
from pipelines.tiny import CASES, STEPS, batched, euler, pndm, recorded, seeded

BRANCHED = ("sd", "sdxl", "sdxl-edm", "sd3", "sd3-dynamic", "flux", "flux-dynamic", "dit", "dit-learned", "ddpm")
GUIDED = [case for case in BRANCHED if case not in ("flux", "ddpm")]
SCALE = {"flux-dynamic": "true_cfg_scale"}
T = 321


def denoiser_of(case: str, **inputs: Any) -> BranchedDenoiser:
    denoiser = Denoiser.from_pipeline(CASES[case].build(), **{**CASES[case].inputs(), **inputs})
    assert isinstance(denoiser, BranchedDenoiser)
    return denoiser


def ours(case: str, name: str) -> SchedulerMixin:
    return SAMPLERS[name].build(CASES[case].scheduler().config)


# --------------------------------------------------------------------------------------- the images of the pipeline


@pytest.mark.parametrize("sampler", ["stock", "unipc"])
@pytest.mark.parametrize("case", BRANCHED)
def test_our_loop_makes_the_images_of_the_pipeline(case: str, sampler: str) -> None:
    def scheduler() -> SchedulerMixin:
        return CASES[case].scheduler() if sampler == "stock" else ours(case, sampler)

    expected = pipeline_images(CASES[case].build(), scheduler(), CASES[case].inputs())
    assert expected.std() > 0.01
    torch.testing.assert_close(denoiser_images(denoiser_of(case), scheduler()), expected)


@pytest.mark.parametrize("case", GUIDED)
def test_without_guidance_too(case: str) -> None:
    inputs = {**CASES[case].inputs(), SCALE.get(case, "guidance_scale"): 1.0}
    expected = pipeline_images(CASES[case].build(), ours(case, "unipc"), inputs)
    denoiser = Denoiser.from_pipeline(CASES[case].build(), **inputs)
    torch.testing.assert_close(denoiser_images(denoiser, ours(case, "unipc")), expected)
    guided = denoiser_images(denoiser_of(case), ours(case, "unipc"))
    assert not torch.allclose(guided, expected, atol=1e-3)


@pytest.mark.parametrize("case", BRANCHED)
def test_several_prompts_with_several_images_each(case: str) -> None:
    inputs = batched(CASES[case].inputs(), 2)
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[key] = torch.cat([value[:1], value[1:] * -0.5])
        elif key == "class_labels":
            inputs[key] = [1, 7]
    prompts = 1 if case == "ddpm" else 2
    expected = pipeline_images(CASES[case].build(), ours(case, "dpm++"), inputs, each=2, samples=2 * prompts)
    denoiser = Denoiser.from_pipeline(CASES[case].build(), num_images_per_prompt=2, **inputs)
    assert denoiser.batch_size == len(expected) == 2 * prompts
    assert denoiser.shape == CASES[case].shape[1:]
    torch.testing.assert_close(denoiser_images(denoiser, ours(case, "dpm++"), samples=2 * prompts), expected)


@pytest.mark.parametrize(
    ("case", "scheduler"),
    [
        ("sd", lambda: diffusers.DDIMScheduler.from_config(pndm().config)),
        ("sd", lambda: ours("sd", "sde-dpm++")),
        ("sdxl", lambda: diffusers.DPMSolverMultistepScheduler.from_config(euler().config, use_karras_sigmas=True)),
        ("sdxl", lambda: diffusers.HeunDiscreteScheduler.from_config(euler().config)),
        ("ddpm", lambda: ours("ddpm", "sde-dpm++")),
        ("sd3-dynamic", lambda: ours("sd3-dynamic", "dc-solver")),
    ],
)
def test_other_schedulers(case: str, scheduler: Callable[[], SchedulerMixin]) -> None:
    """Stochastic ones draw the same noise from the same generators."""
    expected = pipeline_images(CASES[case].build(), scheduler(), CASES[case].inputs())
    torch.testing.assert_close(denoiser_images(denoiser_of(case), scheduler()), expected)


@pytest.mark.parametrize("case", ["sd3-dynamic", "flux-dynamic"])
def test_dynamic_shifting_is_computed_as_in_the_pipeline(case: str) -> None:
    inputs = {**CASES[case].inputs(), "height": 32, "width": 32}
    with_pipeline, with_denoiser = CASES[case].scheduler(), CASES[case].scheduler()
    pipeline_images(CASES[case].build(), with_pipeline, inputs)
    denoiser = Denoiser.from_pipeline(CASES[case].build(), **inputs)
    denoiser.prepare(with_denoiser, STEPS)
    assert torch.equal(with_denoiser.timesteps, with_pipeline.timesteps)
    small = CASES[case].scheduler()
    denoiser_of(case).prepare(small, STEPS)
    assert not torch.equal(small.timesteps, with_pipeline.timesteps)


@pytest.mark.parametrize("case", ["sd", "sdxl"])
def test_guidance_rescale(case: str) -> None:
    inputs = {**CASES[case].inputs(), "guidance_scale": 30.0, "guidance_rescale": 0.7}
    expected = pipeline_images(CASES[case].build(), ours(case, "unipc"), inputs)
    denoiser = denoiser_of(case, guidance_scale=30.0, guidance_rescale=0.7)
    torch.testing.assert_close(denoiser_images(denoiser, ours(case, "unipc")), expected)
    denoiser.guidance_rescale = 0.0
    assert not torch.allclose(denoiser_images(denoiser, ours(case, "unipc")), expected, atol=1e-3)


def test_prompts_in_words_are_encoded_once(tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(save_text_model(tmp_path), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    inputs = {"prompt": ["a cat", "no dog"], "negative_prompt": ["ugly", "bad"], "height": 8, "width": 8}
    expected = pipeline_images(pipe, ours("sd", "unipc"), inputs, each=2, samples=4)
    encoded = []
    handle = pipe.text_encoder.register_forward_hook(lambda *call: encoded.append(call))
    denoiser = Denoiser.from_pipeline(pipe, num_images_per_prompt=2, **inputs)
    assert len(encoded) == 2
    for _ in range(2):
        torch.testing.assert_close(denoiser_images(denoiser, ours("sd", "unipc"), samples=4), expected)
    assert len(encoded) == 2
    handle.remove()


def test_lower_precision() -> None:
    pipe = CASES["sd"].build(unet=copy.deepcopy(text_unet()).to(torch.bfloat16))
    pipe.vae = copy.deepcopy(pipe.vae).to(torch.bfloat16)
    inputs = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) else value
        for key, value in CASES["sd"].inputs().items()
    }
    expected = pipeline_images(pipe, ours("sd", "unipc"), inputs)
    denoiser = Denoiser.from_pipeline(pipe, **inputs)
    torch.testing.assert_close(denoiser_images(denoiser, ours("sd", "unipc")), expected)
    x = seeded(2, 4, 8, 8)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        with torch.no_grad():
            assert denoiser(x.to(dtype), T).dtype == dtype


def test_the_bundled_models() -> None:
    pipe = load_model("digits-small", "float32", "cpu").pipeline
    config = pipe.scheduler.config
    labels = [3, 8]
    expected = pipeline_images(pipe, UniPCScheduler.from_config(config), {"class_labels": labels}, samples=2)
    denoiser = Denoiser.from_pipeline(pipe, class_labels=labels)
    images = denoiser_images(denoiser, UniPCScheduler.from_config(denoiser.scheduler_config), samples=2)
    torch.testing.assert_close(images, expected)
    assert denoiser.shape == (4, 8, 8)


# ------------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("case", BRANCHED)
def test_a_prediction_is_what_the_pipeline_hands_to_its_step(case: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    with recorded(pipe.scheduler) as steps:
        pipe(**chosen.inputs(), num_inference_steps=3, generator=torch.Generator().manual_seed(1))
    denoiser = denoiser_of(case)
    for k, step in enumerate(steps):
        x, t = step.sample[:1], step.timestep
        scheduler = chosen.scheduler()
        if hasattr(scheduler, "scale_model_input"):
            scheduler.set_timesteps(3)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(k)
            x = scheduler.scale_model_input(x, torch.tensor(t))
        with torch.no_grad():
            torch.testing.assert_close(denoiser(x, t), step.model_output[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", GUIDED)
def test_the_branches_are_the_prompt_and_the_negative_prompt_by_themselves(case: str) -> None:
    denoiser = denoiser_of(case)
    inputs = CASES[case].inputs()
    negative = {key.removeprefix("negative_"): value for key, value in inputs.items() if key.startswith("negative_")}
    if "class_labels" in inputs:
        negative = {"class_labels": [1000]}
    alone = {SCALE.get(case, "guidance_scale"): 1.0}
    x = seeded(3, *denoiser.shape)
    with torch.no_grad():
        conditional, unconditional = denoiser.branches(x, T)
        torch.testing.assert_close(denoiser_of(case, **alone)(x, T), conditional)
        torch.testing.assert_close(denoiser_of(case, **negative, **alone)(x, T), unconditional)
        torch.testing.assert_close(denoiser.conditional(x, T), conditional)
        torch.testing.assert_close(denoiser.unconditional(x, T), unconditional)
        assert not torch.allclose(conditional, unconditional, atol=1e-4)
        denoiser.guidance_scale = 3.0
        torch.testing.assert_close(denoiser(x, T), 3.0 * conditional - 2.0 * unconditional, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", BRANCHED)
def test_every_sample_may_have_its_own_time(case: str) -> None:
    denoiser = denoiser_of(case)
    x = seeded(3, *denoiser.shape)
    times = [17, 500, 999]
    with torch.no_grad():
        together = denoiser(x, torch.tensor(times))
        alone = torch.cat([denoiser(x[k : k + 1], t) for k, t in enumerate(times)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[:1], denoiser(x[:1], 500), atol=1e-4)
        torch.testing.assert_close(denoiser(x, 500), denoiser(x, torch.full((3,), 500)))


def test_batches_keep_the_prompts_as_groups_of_neighbours() -> None:
    inputs = batched(CASES["sd"].inputs(), 2)
    inputs["prompt_embeds"] = seeded(2, 7, 8, seed=1)
    denoiser = Denoiser.from_pipeline(CASES["sd"].build(), **inputs)
    x = seeded(6, *denoiser.shape)
    with torch.no_grad():
        for rows, k in ((x[:3], 0), (x[3:], 1)):
            single = denoiser_of("sd", prompt_embeds=inputs["prompt_embeds"][k : k + 1])
            torch.testing.assert_close(denoiser(x, T)[3 * k : 3 * k + 3], single(rows, T), rtol=1e-4, atol=1e-5)


def test_calls_are_counted() -> None:
    denoiser = denoiser_of("flux-dynamic", num_images_per_prompt=2)
    with torch.no_grad():
        sample(denoiser, ours("flux-dynamic", "unipc"), 5)
        assert (denoiser.calls, denoiser.evaluations) == (5, 10)
        denoiser.branches(denoiser.noise(), T)
        denoiser.conditional(denoiser.noise()[:1], T)
    assert (denoiser.calls, denoiser.evaluations) == (7, 13)


def test_gradients_are_those_of_differences() -> None:
    double = copy.deepcopy(text_unet()).double()
    inputs = {
        key: value.double() if isinstance(value, torch.Tensor) else value for key, value in CASES["sd"].inputs().items()
    }
    with torch.inference_mode():  # what is made here must be of use later
        denoiser = Denoiser.from_pipeline(CASES["sd"].build(unet=double), **inputs)
        denoiser(denoiser.noise(), T)
    x = seeded(1, *denoiser.shape, dtype=torch.float64).requires_grad_()
    direction = seeded(1, *denoiser.shape, seed=3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(denoiser(x, T).square().sum(), x)
    with torch.no_grad():
        ends = [denoiser(x + sign * 1e-5 * direction, T).square().sum() for sign in (1, -1)]
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ searches and loops


def test_a_fine_trajectory_through_a_pipeline_is_the_exact_flow() -> None:
    """Gaussian data with guidance: the answer is known."""
    pipe = CASES["sd"].build()
    scheduler = UniPCScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    gaussian = GaussianDenoiser(pipe.unet, vp_level(scheduler.alphas_cumprod), spread=0.7, flow=False)
    pipe.unet = gaussian
    inputs = CASES["sd"].inputs()
    denoiser = Denoiser.from_pipeline(pipe, guidance_scale=5.0, **inputs)
    noise = seeded(3, *denoiser.shape)
    trajectory = fine_trajectory(scheduler, denoiser, noise, steps=400)
    plan = scheduler.plan
    first, last = (plan.calls[0].alpha, plan.calls[0].sigma), (plan.final_alpha, plan.final_sigma)
    exact = gaussian.solution(noise, guided_mean(inputs, 5.0), first, last)
    torch.testing.assert_close(trajectory.samples[-1].double(), exact, rtol=1e-2, atol=1e-2)


def test_ratios_are_searched_on_a_pipeline() -> None:
    pipe = CASES["sd3"].build()
    denoiser = Denoiser.from_pipeline(pipe, **CASES["sd3"].inputs())
    scheduler = DCSolverScheduler.from_config(denoiser.scheduler_config)
    denoiser.prepare(scheduler, 4)
    noise = denoiser.noise(torch.Generator().manual_seed(0))
    truth = fine_trajectory(scheduler, denoiser, noise, steps=100)
    found = search_ratios(scheduler, denoiser, noise, truth=truth)
    tuned = DCSolverScheduler.from_config(scheduler.config, ratios=found.ratios)
    errors = [
        float((sample(denoiser, s, 4, latents=noise) - truth.samples[-1]).square().mean()) for s in (scheduler, tuned)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("case", ["sd", "sdxl-edm", "sd3", "flux", "dit", "ddpm"])
def test_given_latents_start_the_run(case: str) -> None:
    denoiser, scheduler = denoiser_of(case, num_images_per_prompt=2), ours(case, "unipc")
    noise = denoiser.noise(generators(2))
    with torch.no_grad():
        expected = sample(denoiser, scheduler, STEPS, generator=generators(2))
        torch.testing.assert_close(sample(denoiser, scheduler, STEPS, latents=noise), expected)
        torch.testing.assert_close(
            sample(denoiser, scheduler, STEPS, latents=noise[1:]), expected[1:], rtol=1e-3, atol=1e-3
        )
    assert noise.std() == pytest.approx(1.0, abs=0.15)


def test_every_sample_has_its_own_generator() -> None:
    denoiser = denoiser_of("sd3", num_images_per_prompt=3)
    scheduler = ours("sd3", "sde-dpm++")
    together = sample(denoiser, scheduler, STEPS, generator=generators(3))
    single = sample(denoiser_of("sd3"), scheduler, STEPS, generator=generators(1, seed=8))
    torch.testing.assert_close(together[1:2], single, rtol=1e-4, atol=1e-4)


def test_the_pipeline_and_torch_stay_as_they_are() -> None:
    pipe = CASES["sdxl"].build()
    before, config = dict(vars(pipe)), dict(pipe.config)
    labels, state = pipe.scheduler.timesteps, torch.get_rng_state()
    denoiser = Denoiser.from_pipeline(pipe, **CASES["sdxl"].inputs())
    with torch.no_grad():
        denoiser(seeded(1, *denoiser.shape), T)
        denoiser.decode(seeded(1, *denoiser.shape), "np")
    assert vars(pipe) == before
    assert dict(pipe.config) == config
    assert pipe.scheduler.timesteps is labels
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


# -------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("case", BRANCHED)
def test_images_can_be_differentiated_through(case: str) -> None:
    denoiser = denoiser_of(case)
    latents = (0.1 * seeded(2, *denoiser.shape)).requires_grad_()
    images = denoiser.decode(latents, "pt")
    assert images.shape[:2] == (2, 3)
    inside = (images > 0) & (images < 1)
    (gradient,) = torch.autograd.grad(images[inside].sum(), latents)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not denoiser.decode(latents, "pt").requires_grad


def test_output_types() -> None:
    denoiser = denoiser_of("sd3")
    latents = seeded(2, *denoiser.shape)
    images = denoiser.decode(latents)
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    assert denoiser.decode(latents, "latent") is latents
    assert denoiser.decode(latents, "np").shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match="output_type 'png' is unknown; use pil, np, pt or latent"):
        denoiser.decode(latents, "png")


@pytest.mark.parametrize("case", ["sd", "dit", "ddpm"])
def test_pictures_of_networks_that_are_trained(case: str) -> None:
    """Weights want gradients unless they are told not to; a picture has none."""
    pipe = CASES[case].build()
    for name in ("unet", "transformer", "vae"):
        if hasattr(pipe, name):
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).requires_grad_(True))
    kinds = [BranchedDenoiser] if case == "dit" else [BranchedDenoiser, DrivenDenoiser]
    for kind in kinds:
        denoiser: Denoiser = kind(pipe, **CASES[case].inputs())
        latents = seeded(1, *denoiser.shape).requires_grad_()
        assert denoiser(latents, T).requires_grad
        assert denoiser.decode(latents)[0].size == (8, 8)
        assert denoiser.decode(latents, "pt").requires_grad


class Censor(torch.nn.Module):
    """A safety checker that objects to the first image."""

    device = torch.device("cpu")

    def forward(self, images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
        images[0] = 0.0
        return images, [k == 0 for k in range(len(images))]


class Features:
    """What the safety checker is shown."""

    pixel_values = torch.zeros(1, 3, 2, 2)

    def __init__(self, images: Any, return_tensors: str) -> None:
        pass

    def to(self, device: Any) -> Features:
        return self


def test_the_safety_checker_is_asked() -> None:
    pipe = CASES["sd"].build()
    pipe.safety_checker, pipe.feature_extractor = Censor(), Features
    inputs = batched(CASES["sd"].inputs(), 2)
    expected = pipeline_images(pipe, ours("sd", "unipc"), inputs, samples=2)
    images = denoiser_images(Denoiser.from_pipeline(pipe, **inputs), ours("sd", "unipc"), samples=2)
    torch.testing.assert_close(images, expected)
    assert len(images[0].unique()) == 1
    assert images[1].std() > 0.01


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("case", "inputs", "message"),
    [
        ("sd", {"promt": "a"}, "promt is no argument of StableDiffusionPipeline; it takes prompt, "),
        ("sd", {"class_labels": [1]}, "class_labels is no argument of StableDiffusionPipeline"),
        ("dit", {"class_labels": [1001]}, r"class_labels=\[1001\] must be whole numbers from 0 to 999"),
        ("dit", {"class_labels": []}, r"class_labels=\[\]"),
        ("dit", {"class_labels": [0.5]}, r"class_labels=\[0.5\]"),
        ("ddpm", {"batch_size": 2}, "batch_size is called num_images_per_prompt here"),
        ("sd", {"generator": None}, "generator is an argument of prepare and sample"),
        ("sd", {"output_type": "pt"}, "output_type is an argument of decode"),
        ("sdxl", {"denoising_end": 0.8}, "denoising_end ends a run of the pipeline"),
        ("sd", {"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be a whole number of at least 1"),
        ("sd", {"num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5"),
    ],
)
def test_inputs_that_are_refused(case: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoiser.from_pipeline(CASES[case].build(), **{**CASES[case].inputs(), **inputs})


def test_pipelines_that_are_refused() -> None:
    with pytest.raises(ValueError, match="pipeline is a Tensor; give a DiffusionPipeline"):
        Denoiser.from_pipeline(torch.ones(1))
    with pytest.raises(ValueError, match="DiTPipeline needs class_labels"):
        Denoiser.from_pipeline(CASES["dit"].build())
    pipe = CASES["ddpm"].build()
    pipe.scheduler = None
    with pytest.raises(ValueError, match="DDPMPipeline has no scheduler"):
        Denoiser.from_pipeline(pipe)
    with pytest.raises(ValueError, match=r"a WanPipeline cannot be taken apart; use DrivenDenoiser"):
        BranchedDenoiser(CASES["wan"].build(), **CASES["wan"].inputs())
    with pytest.raises(ValueError, match=r"StableDiffusion3Pipeline with skip_guidance_layers cannot be taken apart"):
        BranchedDenoiser(CASES["sd3"].build(), **CASES["sd3"].inputs(), skip_guidance_layers=[0])
    stitched = CASES["sd"].build()
    stitched.unet = StitchedDenoiser([text_unet(), text_unet()], [0.5, 0.5], by="step").follow(stitched)
    with pytest.raises(ValueError, match='use by="timestep"'):
        Denoiser.from_pipeline(stitched, **CASES["sd"].inputs())


def test_a_network_that_reuses_steps_is_refused() -> None:
    pipe = CASES["flux"].build(transformer=copy.deepcopy(flux_transformer()))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"the transformer of FluxPipeline reuses .* call its disable_cache"):
        Denoiser.from_pipeline(pipe, **CASES["flux"].inputs())


def test_a_network_stitched_by_time_is_taken() -> None:
    pipe = CASES["sd"].build()
    pipe.unet = StitchedDenoiser([text_unet(), text_unet()], [0.5, 0.5])
    x = seeded(1, 4, 8, 8)
    with torch.no_grad():
        stitched = Denoiser.from_pipeline(pipe, **CASES["sd"].inputs())
        torch.testing.assert_close(stitched(x, T), denoiser_of("sd")(x, T))


def test_samples_that_are_refused() -> None:
    denoiser = Denoiser.from_pipeline(CASES["sd"].build(), **batched(CASES["sd"].inputs(), 2))
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 8\); it must be \(batch, 4, 8, 8\)"):
        denoiser(torch.zeros(2, 4, 8), T)
    with pytest.raises(ValueError, match="x has a batch of 3 for 2 prompts"):
        denoiser(torch.zeros(3, 4, 8, 8), T)
    with pytest.raises(ValueError, match=r"latents has shape \(0, 4, 8, 8\)"):
        denoiser.decode(torch.zeros(0, 4, 8, 8))
    with pytest.raises(ValueError, match="latents has a batch of 1 for 2 prompts"):
        denoiser.prepare(pndm(), STEPS, latents=torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"t has shape \(3,\) for a batch of 2; give one label, or one a sample"):
        denoiser(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="list of generators of length 3"):
        denoiser.prepare(pndm(), STEPS, generator=generators(3))


@pytest.mark.parametrize("case", ["flux", "ddpm"])
def test_a_missing_branch_is_named(case: str) -> None:
    denoiser = denoiser_of(case)
    for ask in (denoiser.branches, denoiser.unconditional):
        with pytest.raises(ValueError, match="there is no unconditional branch"):
            ask(seeded(1, *denoiser.shape), T)
    assert not denoiser.is_guided
    assert denoiser.calls == 0


def test_subclasses_are_taken_apart_if_their_call_is_the_same() -> None:
    class Same(StableDiffusionPipeline):
        pass

    class Other(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    assert BranchedDenoiser.takes(Same(**CASES["sd"].build().components), {})
    assert not BranchedDenoiser.takes(Other(**CASES["sd"].build().components), {})
    driven = Denoiser.from_pipeline(
        CASES["sd3"].build(transformer=sd3_transformer()), **CASES["sd3"].inputs(), skip_guidance_layers=[0]
    )
    assert isinstance(driven, DrivenDenoiser)
