"""Pipelines that are driven as denoisers: those that cannot be taken apart, and those that can, to compare."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from fewstep.samplers import (
    SAMPLERS,
    BranchedDenoiser,
    Denoiser,
    DrivenDenoiser,
    UniPCScheduler,
    fine_trajectory,
    sample,
)
from pipelines.denoisers import denoiser_images, generators, pipeline_images, pipeline_threads
from pipelines.networks import text_unet, vae
from pipelines.tiny import CASES, STEPS, Case, batched, pndm, recorded, seeded

T = 321


@functools.cache
def pixart_transformer() -> Any:
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )
    return network.eval().requires_grad_(False)


def _pixart_inputs() -> dict[str, Any]:
    masks = {f"{prefix}prompt_attention_mask": torch.ones(1, 7) for prefix in ("", "negative_")}
    embeds = {"prompt_embeds": seeded(1, 7, 32, seed=10), "negative_prompt_embeds": seeded(1, 7, 32, seed=20)}
    return {**embeds, **masks, "negative_prompt": None, "height": 8, "width": 8, "use_resolution_binning": False}


PIXART = Case(
    "PixArtSigmaPipeline",
    lambda: {"transformer": pixart_transformer(), "vae": vae(), "text_encoder": None, "tokenizer": None},
    pndm,
    _pixart_inputs,
    (1, 4, 8, 8),
    "vp",
)
ALL = {**CASES, "pixart": PIXART}
UNKNOWN = ("pixart", "wan", "wan-euler", "sd-img2img", "sdxl-img2img", "sd3-img2img", "flux-img2img", "sd-inpaint9")
KNOWN = ("sd", "sdxl", "sdxl-edm", "sd3", "sd3-dynamic", "flux", "flux-dynamic", "ddpm")


def driven(case: str, pipe: Any = None, **inputs: Any) -> DrivenDenoiser:
    return DrivenDenoiser(pipe or ALL[case].build(), **{**ALL[case].inputs(), **inputs})


def branched(case: str) -> BranchedDenoiser:
    return BranchedDenoiser(ALL[case].build(), **ALL[case].inputs())


def ours(case: str, name: str = "unipc") -> SchedulerMixin:
    return SAMPLERS[name].build(ALL[case].scheduler().config)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name == "pipeline":
            thread.join(timeout=2)
            assert not thread.is_alive()


# --------------------------------------------------------------------------------------- the images of the pipeline


@pytest.mark.parametrize("sampler", ["stock", "unipc"])
@pytest.mark.parametrize("case", [*UNKNOWN, *KNOWN])
def test_our_loop_makes_the_images_of_the_pipeline(case: str, sampler: str) -> None:
    def scheduler() -> SchedulerMixin:
        return ALL[case].scheduler() if sampler == "stock" else ours(case, sampler)

    expected = pipeline_images(ALL[case].build(), scheduler(), ALL[case].inputs())
    assert expected.std() > 0.01
    denoiser: Denoiser = driven(case)
    if case in UNKNOWN:
        denoiser = Denoiser.from_pipeline(ALL[case].build(), **ALL[case].inputs())
        assert isinstance(denoiser, DrivenDenoiser)
    torch.testing.assert_close(denoiser_images(denoiser, scheduler()), expected)


@pytest.mark.parametrize(("case", "each"), [("pixart", 2), ("wan", 1)])
def test_several_prompts_with_several_images_each_and_without_guidance(case: str, each: int) -> None:
    inputs = {**batched(ALL[case].inputs(), 2), "guidance_scale": 1.0}
    inputs = {k: v.expand(2, -1) if k.endswith("mask") else v for k, v in inputs.items()}
    inputs["prompt_embeds"] = seeded(2, 7, 32, seed=5)
    expected = pipeline_images(ALL[case].build(), ours(case), inputs, each=each, samples=2 * each)
    denoiser = DrivenDenoiser(ALL[case].build(), num_images_per_prompt=each, **inputs)
    torch.testing.assert_close(denoiser_images(denoiser, ours(case), samples=2 * each), expected)
    assert denoiser.batch_size == len(expected) == 2 * each


def test_stochastic_samplers_draw_the_same_noise() -> None:
    expected = pipeline_images(PIXART.build(), ours("pixart", "sde-dpm++"), PIXART.inputs())
    torch.testing.assert_close(denoiser_images(driven("pixart"), ours("pixart", "sde-dpm++")), expected)


def test_inputs_that_work_step_by_step_mean_the_same_in_a_loop() -> None:
    inputs = {**CASES["sd3"].inputs(), "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.7}
    expected = pipeline_images(CASES["sd3"].build(), ours("sd3"), inputs)
    denoiser = Denoiser.from_pipeline(CASES["sd3"].build(), **inputs)
    assert isinstance(denoiser, DrivenDenoiser)
    torch.testing.assert_close(denoiser_images(denoiser, ours("sd3")), expected)
    without = pipeline_images(CASES["sd3"].build(), ours("sd3"), CASES["sd3"].inputs())
    assert not torch.allclose(without, expected, atol=1e-3)


def test_a_loop_calls_the_network_once_a_step() -> None:
    pipe = CASES["wan"].build()
    encoded: list[Any] = []
    encode = pipe.encode_prompt
    vars(pipe)["encode_prompt"] = lambda *args, **kwargs: (encoded.append(args), encode(*args, **kwargs))[1]
    denoiser = driven("wan", pipe)
    with torch.no_grad():
        latents = sample(denoiser, ours("wan"), 5, generator=generators(1))
        assert denoiser.calls == denoiser.evaluations == 5
        images = denoiser.decode(latents, "pil")
        assert denoiser.calls == 5
        # From here on the pipeline starts with the samples of the first call.
        denoiser(latents, T)
        assert denoiser.calls == 6
        denoiser(latents, T)
        assert denoiser.calls == 7
    assert len(images[0]) == 9
    assert len(encoded) == 1


# ------------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("case", KNOWN)
def test_predictions_are_those_of_the_pipeline_taken_apart(case: str) -> None:
    """At any samples, in any order of times, before and after a decode."""
    known, asked = branched(case), driven(case)
    with torch.no_grad():
        for k, t in enumerate((999, 20, 500.5, 700, 20)):
            x = seeded(1, *known.shape, seed=k)
            torch.testing.assert_close(asked(x, t), known(x, t), rtol=1e-5, atol=1e-5)
            if k % 2:
                torch.testing.assert_close(asked.decode(x, "pt"), known.decode(x, "pt"))
    assert asked.shape == known.shape
    assert asked.batch_size == 1


@pytest.mark.parametrize("case", ["pixart", "wan", "sd-img2img"])
def test_a_prediction_is_what_the_pipeline_hands_to_its_step(case: str) -> None:
    pipe = ALL[case].build()
    pipe.scheduler = ours(case)
    with recorded(pipe.scheduler) as steps:
        pipe(**ALL[case].inputs(), num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1))
    denoiser = driven(case)
    with torch.no_grad():
        for step in reversed(steps):
            prediction = denoiser(step.sample, step.timestep)
            torch.testing.assert_close(prediction, step.model_output, rtol=1e-5, atol=1e-5)


def test_every_sample_may_have_its_own_time() -> None:
    denoiser = driven("wan", **batched(CASES["wan"].inputs(), 3))
    x = seeded(3, *denoiser.shape)
    with torch.no_grad():
        expected = [denoiser(x, t)[k] for k, t in enumerate((900, 40, 900))]
        before = denoiser.calls
        together = denoiser(x, torch.tensor([900, 40, 900]))
    torch.testing.assert_close(together, torch.stack(expected))
    assert denoiser.calls == before + 2


@pytest.mark.parametrize("case", ["sd", "sd3", "flux-dynamic"])
def test_gradients_are_those_of_the_pipeline_taken_apart(case: str) -> None:
    known, asked = branched(case), driven(case)

    def gradients(denoiser: Denoiser) -> tuple[torch.Tensor, ...]:
        x = seeded(1, *denoiser.shape).requires_grad_()
        (prediction,) = torch.autograd.grad(denoiser(x, T).square().sum(), x)
        (image,) = torch.autograd.grad(denoiser.decode(0.1 * x, "pt").square().sum(), x)
        return prediction, image

    for expected, gradient in zip(gradients(known), gradients(asked), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().sum() > 0


def test_the_modes_of_the_caller_hold_in_the_pipeline() -> None:
    known, asked = branched("sd"), driven("sd")
    x = seeded(1, *known.shape)
    with torch.no_grad():
        full = asked(x, T)
        with torch.autocast("cpu", torch.bfloat16):
            half = asked(x, T)
            torch.testing.assert_close(half, known(x, T), rtol=0.02, atol=0.02)
            assert torch.equal(half, half.bfloat16().float())
        torch.testing.assert_close(asked(x, T), full)
        assert not asked(x.clone().requires_grad_(), T).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(asked(x, T), full)


def test_a_fine_trajectory_through_a_driven_pipeline() -> None:
    known, asked = branched("sd"), driven("sd")
    scheduler = UniPCScheduler.from_config(known.scheduler_config)
    scheduler.set_timesteps(4)
    noise = asked.noise(torch.Generator().manual_seed(0))
    ends = [fine_trajectory(scheduler, denoiser, noise, steps=20).samples[-1] for denoiser in (known, asked)]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


def test_given_latents_start_the_run() -> None:
    denoiser = driven("pixart", num_images_per_prompt=2)
    noise = seeded(2, *denoiser.shape)
    expected = PIXART.call(PIXART.build(), latents=noise, num_images_per_prompt=2)
    torch.testing.assert_close(sample(denoiser, PIXART.scheduler(), STEPS, latents=noise), expected)
    assert denoiser.noise(generators(2)).shape == (2, 4, 8, 8)


def test_the_pipeline_and_torch_stay_as_they_are() -> None:
    pipe = CASES["wan"].build()
    before, config, labels = dict(vars(pipe)), dict(pipe.config), pipe.scheduler.timesteps
    state = torch.get_rng_state()
    denoiser = driven("wan", pipe)
    with torch.no_grad():
        denoiser(seeded(1, *denoiser.shape), T)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(pipe) == before
    assert dict(pipe.config) == config
    assert pipe.scheduler.timesteps is labels
    # Another run of the pipeline while ours is under way.
    expected = pipeline_images(CASES["wan"].build(), ours("wan"), CASES["wan"].inputs())
    torch.testing.assert_close(pipeline_images(pipe, ours("wan"), CASES["wan"].inputs()), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            denoiser(seeded(1, *denoiser.shape), T), driven("wan")(seeded(1, *denoiser.shape), T)
        )


# --------------------------------------------------------------------------------------------- threads and errors


def test_threads_end_with_the_denoiser_the_block_and_the_run() -> None:
    assert pipeline_threads() == 0
    denoiser = driven("sd")
    x = seeded(1, *denoiser.shape)
    assert pipeline_threads() == 1
    other = driven("wan")
    assert other.batch_size == 1
    assert pipeline_threads() == 2
    with other:
        pass
    assert pipeline_threads() == 1
    for steps in (2, 3):
        sample(denoiser, pndm(), steps)
        assert pipeline_threads() == 1
    denoiser.decode(x)
    assert pipeline_threads() == 0
    denoiser.close()
    with torch.no_grad():
        denoiser(x, T)
    assert pipeline_threads() == 1


def test_the_interpreter_ends_while_a_pipeline_waits() -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pipelines.tiny import CASES\n"
        "from fewstep.samplers import DrivenDenoiser\n"
        "denoiser = DrivenDenoiser(CASES['ddpm'].build())\n"
        "print(denoiser.shape)\n"
    )
    root = Path(__file__).resolve().parents[2]
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "(3, 8, 8)\n"), result.stderr
    assert "Traceback" not in result.stderr


class Failing(torch.nn.Module):
    """A network that fails when it is told to."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.fail = network, False
        self.config, self.dtype, self.device = network.config, network.dtype, network.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.fail:
            raise RuntimeError("the network failed")
        return self.network(*args, **kwargs)


def test_errors_of_the_pipeline_arrive_and_the_next_call_starts_anew() -> None:
    pipe = CASES["sd"].build()
    pipe.unet = Failing(text_unet())
    denoiser = driven("sd", pipe)
    x = seeded(1, *denoiser.shape)
    with torch.no_grad():
        expected = denoiser(x, T)
        pipe.unet.fail = True
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the network failed"):
                denoiser(x, T)
            assert pipeline_threads() == 0
        pipe.unet.fail = False
        torch.testing.assert_close(denoiser(x, T), expected)


def test_what_the_pipeline_refuses_arrives() -> None:
    denoiser = driven("wan", height=17)
    with pytest.raises(ValueError, match="`height` and `width` have to be divisible by 16"):
        denoiser.shape  # noqa: B018
    with pytest.raises(ValueError, match="list of generators of length 2"):
        driven("wan").prepare(ours("wan"), STEPS, generator=generators(2))


def test_an_interrupt_leaves_a_usable_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = driven("sd")
    x = seeded(1, *denoiser.shape)

    class Interrupted:
        def get(self) -> Any:
            raise KeyboardInterrupt

        def put(self, reply: Any) -> None:
            pass

    with torch.no_grad():
        expected = denoiser(x, T)
        assert denoiser._run is not None
        monkeypatch.setattr(denoiser._run, "_replies", Interrupted())
        thread = denoiser._run._thread
        with pytest.raises(KeyboardInterrupt):
            denoiser(x, T)
        thread.join(timeout=10)
        assert not thread.is_alive()
        torch.testing.assert_close(denoiser(x, T), expected)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("case", ["sd-inpaint", "sdxl-inpaint", "sd3-inpaint", "flux-inpaint"])
def test_pipelines_that_change_the_samples_between_steps_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match="no function of them; a network that takes the mask as input can be driven"):
        sample(driven(case), CASES[case].scheduler(), STEPS)


def test_what_cannot_be_driven() -> None:
    with pytest.raises(ValueError, match="a DiTPipeline steps with doubled samples"):
        DrivenDenoiser(CASES["dit"].build(), class_labels=[1])
    with pytest.raises(ValueError, match="promt is no argument of WanPipeline"):
        DrivenDenoiser(CASES["wan"].build(), promt="a")
    denoiser = driven("wan")
    with pytest.raises(ValueError, match="the branches of a DrivenDenoiser cannot be told apart"):
        denoiser.branches(seeded(1, *denoiser.shape), T)
    with pytest.raises(ValueError, match=r"x has a batch of 2; the pipeline's run has 1"):
        denoiser(seeded(2, *denoiser.shape), T)
    with pytest.raises(ValueError, match=r"x has shape \(1, 4\); it must be \(batch, 16, 3, 2, 2\)"):
        denoiser(seeded(1, 4), T)
    with pytest.raises(ValueError, match=r"latents has shape \(1, 4\)"):
        denoiser.decode(seeded(1, 4))


class Loop(DiffusionPipeline):
    """The smallest pipeline, with a loop to set; it has no latents and no output type to give."""

    loop: Callable[[Any, torch.Tensor], Any]

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 4, generator: Any = None) -> tuple[torch.Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        return (self.loop(self.scheduler, torch.randn(1, 2, generator=generator)),)


def looping(loop: Callable[[Any, torch.Tensor], Any]) -> Loop:
    pipe = Loop(ours("sd"))
    pipe.loop = loop
    return pipe


def plain_loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(x * t, t, x).prev_sample
    return x


def indexing_loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    times = scheduler.timesteps.to(torch.float32)[0:]
    assert times.shape == (len(times),)
    assert (times[:-1] >= times[1:]).all()
    for i, (t, level) in enumerate(zip(times, scheduler.sigmas[:-1], strict=False)):
        assert i < 100 or level > 0
        x = scheduler.step(x * t, t, x, return_dict=False)[0]
    return x


def double_loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        for _ in range(2):
            x = scheduler.step(x, t, x).prev_sample
    return x


def counting_loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    assert len([t for t in scheduler.timesteps if t >= 500]) >= 0
    return plain_loop(scheduler, x)


def short_loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(x * t, t, x).prev_sample
        break
    return x


def endless_loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(x * t, t, x).prev_sample
    return plain_loop(scheduler, x)


def scaled_loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps / 1000:
        x = scheduler.step(x * t, t, x).prev_sample
    return x


def copying_loop(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    return plain_loop(copy.deepcopy(scheduler), x)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (double_loop, "makes other steps than one for each"),
        (counting_loop, "goes on without a step"),
        (short_loop, "ended its loop by itself"),
        (lambda scheduler, x: x, "went through no timesteps"),
        (lambda scheduler, x: scheduler.step(x, 1, x)[0], "makes other steps than one for each"),
        (scaled_loop, "makes other steps than one for each"),
        (copying_loop, "copies its scheduler"),
    ],
)
def test_loops_that_cannot_be_asked_for_single_evaluations(loop: Any, message: str) -> None:
    denoiser = DrivenDenoiser(looping(loop))
    with pytest.raises(ValueError, match=message):
        sample(denoiser, ours("sd"), 4)


def test_a_loop_that_goes_on_after_its_timesteps_cannot_decode() -> None:
    denoiser = DrivenDenoiser(looping(endless_loop))
    with torch.no_grad():
        assert float(denoiser(torch.ones(1, 2), 3)[0, 0]) == 3.0
        with pytest.raises(ValueError, match="did not end with its timesteps"):
            denoiser.decode(torch.ones(1, 2))


@pytest.mark.parametrize("loop", [plain_loop, indexing_loop])
def test_a_pipeline_of_ones_own(loop: Any) -> None:
    pipe = looping(loop)
    denoiser = Denoiser.from_pipeline(pipe)
    with torch.no_grad():
        for t in (7, 3, 999):
            assert torch.equal(denoiser(torch.ones(1, 2), t), torch.full((1, 2), float(t)))
        assert torch.equal(denoiser.decode(torch.full((1, 2), 4.0)), torch.full((1, 2), 4.0))
        expected = pipe(num_inference_steps=5, generator=generators(1)[0])[0]
        torch.testing.assert_close(sample(denoiser, ours("sd"), 5, generator=generators(1)[0]), expected)
    with pytest.raises(ValueError, match="num_images_per_prompt=2: a Loop makes one sample of its inputs"):
        Denoiser.from_pipeline(pipe, num_images_per_prompt=2)
    with pytest.raises(ValueError, match="latents is nothing that a Loop takes"):
        denoiser.prepare(ours("sd"), 5, latents=torch.ones(1, 2))
