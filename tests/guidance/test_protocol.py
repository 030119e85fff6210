"""Guidance in a scheduler: the identity changes no bit, and all that a sampler keeps follows its particle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fewstep.guidance import SVDD, FeynmanKacScheduler, FeynmanKacSteering, RewardTilt
from fewstep.samplers import SAMPLERS, Denoiser, MRSamplerScheduler, sample
from fewstep.samplers.guided import Guidance, GuidedRun, GuidedStep
from pipelines.loops import SHIFTED, STEPS, build, every_kind_and_edm, every_sampler, predict, run, start
from pipelines.tiny import CASES, batched, seeded


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)


class Scripted(Guidance):
    """Ancestors that were written beforehand, ``(calls, batch)``."""

    def __init__(self, ancestors: torch.Tensor) -> None:
        self.ancestors, self.starts, self.ends = ancestors, 0, 0

    def start(self, run: GuidedRun) -> None:
        self.starts += 1

    def act(self, step: GuidedStep) -> None:
        step.follow(self.ancestors[step.index])

    def finish(self, samples: torch.Tensor) -> torch.Tensor | None:
        self.ends += 1
        return None


@pytest.mark.filterwarnings("ignore:resampled particles become equal:RuntimeWarning")
@every_sampler
@every_kind_and_edm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_leaves_every_sampler_bit_identical(name: str, kind: str, dtype: torch.dtype) -> None:
    x = start(4, dtype)
    expected = run(build(name, kind), x)
    steering = FeynmanKacSteering([RewardTilt(mean, 0.0)], particles=2, threshold=1.0)
    for guidance in (Guidance(), steering):
        assert torch.equal(run(build(name, kind).guide(guidance), x), expected)
    assert torch.equal(run(build(name, kind).guide(steering).guide(None), x), expected)
    assert (steering.population.log_evidence == 0).all()


@pytest.mark.parametrize(
    "guidance", [FeynmanKacSteering([RewardTilt(mean, 1.0)], particles=2), SVDD(mean, candidates=2, temperature=1.0)]
)
def test_copies_that_never_part_are_warned_of(guidance: Guidance) -> None:
    x = start(4, torch.float32)
    with pytest.warns(
        RuntimeWarning, match="become equal and stay so: 'UniPCScheduler, .* draws no noise; use a sched"
    ):
        run(build("unipc", "vp").guide(guidance), x)
    run(build("sde-dpm++", "vp").guide(guidance), x)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in SHIFTED])
@every_kind_and_edm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resampled_runs_are_the_runs_of_the_chosen_histories(name: str, kind: str, dtype: torch.dtype) -> None:
    """Bit by bit, whatever the sampler keeps: traced back from each result, its noises give it again."""
    batch, scheduler = 5, build(name, kind)
    x, calls = start(batch, dtype), len(scheduler.plan)
    ancestors = torch.randint(batch, (calls, batch), generator=torch.Generator().manual_seed(2))
    noises = [seeded(*x.shape, seed=50 + k).to(dtype) for k in range(calls)]
    guidance = Scripted(ancestors)
    scheduler.guide(guidance)
    steered = _run(scheduler, x, noises)
    assert (guidance.starts, guidance.ends) == (1, 1)

    place, traced = torch.arange(batch), []
    for k in reversed(range(calls)):
        traced.append(noises[k][place])
        place = ancestors[k][place]
    assert torch.equal(_run(build(name, kind), x[place], traced[::-1]), steered)
    assert not torch.equal(_run(build(name, kind), x, noises), steered)


def _run(scheduler: Any, x: torch.Tensor, noises: list[torch.Tensor]) -> torch.Tensor:
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        x = scheduler.step(predict(scheduler, x, t), t, x, variance_noise=noise, return_dict=False)[0]
    return x


def test_a_changed_prediction_is_what_the_step_reads() -> None:
    """A guidance that always says zero: the run of a model that does."""

    class Zero(Guidance):
        def act(self, step: GuidedStep) -> None:
            step.predict(torch.zeros_like(step.sample))

    for kind in ("vp", "flow", "edm"):
        scheduler = build("dpm++", kind).guide(Zero())
        x = start()
        output = None
        for t in scheduler.timesteps:
            output = scheduler.step(predict(scheduler, x, t), t, x)
            assert output.pred_original_sample.abs().max() < 1e-5
            x = output.prev_sample
        assert x.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["dpm++", "deis", "sde-dpm++1", "unipc"])
@pytest.mark.parametrize("thresholding", [False, True])
def test_guidance_sees_the_clean_sample_that_the_step_returns(name: str, thresholding: bool) -> None:
    class Look(Guidance):
        def act(self, step: GuidedStep) -> None:
            self.clean = step.clean.clone()

    guidance = Look()
    scheduler = build(name, "vp", thresholding=thresholding, sample_max_value=2.0).guide(guidance)
    x = start()
    for k, t in enumerate(scheduler.timesteps):
        output = scheduler.step(predict(scheduler, x, t), t, x, variance_noise=seeded(*x.shape, seed=k))
        torch.testing.assert_close(guidance.clean, output.pred_original_sample, rtol=1e-4, atol=1e-5)
        assert not thresholding or guidance.clean.abs().max() <= 1.0
        x = output.prev_sample


def test_shifted_noise_moves_the_next_sample_by_its_scale() -> None:
    shift = seeded(2, 4, 4, 4, seed=9)

    class Shift(Guidance):
        def act(self, step: GuidedStep) -> None:
            if step.noise is not None:
                self.scale = step.noise_scale
                step.shift_noise(shift)

    for name in ("sde-dpm++1", "sde-dpm++3m", "sde-dpm"):
        plain, shifted, guidance = build(name, "vp"), build(name, "vp"), Shift()
        shifted.guide(guidance)
        x, noise = start(), seeded(2, 4, 4, 4, seed=3)
        results = [
            s.step(predict(s, x, s.timesteps[0]), s.timesteps[0], x, variance_noise=noise)[0] for s in (plain, shifted)
        ]
        torch.testing.assert_close(results[1] - results[0], guidance.scale * shift, rtol=1e-4, atol=1e-5)
        assert guidance.scale > 0
    with pytest.raises(ValueError, match="adds no noise"):
        run(build("dpm++", "vp").guide(_ShiftAlways()), start())


class _ShiftAlways(Guidance):
    def act(self, step: GuidedStep) -> None:
        step.shift_noise(torch.ones_like(step.sample))


def test_runs_begin_anew_and_copies_are_copies() -> None:
    guidance = FeynmanKacSteering([RewardTilt(mean, 3.0)], particles=2, threshold=1.0, seeds=4)
    scheduler = build("sde-dpm++", "vp").guide(guidance)
    first = run(scheduler, start(4))
    evidence = guidance.population.log_evidence
    scheduler.set_timesteps(STEPS)
    run(scheduler, start(4), end=3)
    scheduler.set_timesteps(STEPS)
    assert torch.equal(run(scheduler, start(4)), first)
    assert torch.equal(guidance.population.log_evidence, evidence)
    scheduler.set_timesteps(STEPS)
    half = run(scheduler, start(4), end=3)
    twin = copy.deepcopy(scheduler)
    assert torch.equal(run(scheduler, half, begin=3), first)
    assert torch.equal(run(twin, half, begin=3), first)


def test_what_cannot_be_guided_is_refused() -> None:
    with pytest.raises(ValueError, match="is no Guidance"):
        build("dpm++", "vp").guide("reward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps residuals"):
        MRSamplerScheduler().guide(Guidance())
    scheduler = build("sde-dpm++", "vp").guide(Guidance())
    x, t = start(), scheduler.timesteps[0]
    scheduler.step(predict(scheduler, x, t), t, x)
    scheduler._step_index -= 1  # as some pipelines do to repeat a step
    with pytest.raises(ValueError, match="was taken back"):
        scheduler.step(predict(scheduler, x, t), t, x)


# ----------------------------------------------------------------------------------------- in unmodified pipelines

PIPELINES = ["sd", "sdxl", "sdxl-edm", "sd3", "flux", "flux-dynamic", "dit", "dit-learned", "ddpm", "wan"]
PIPELINES += ["sd-img2img", "flux-img2img", "sd-inpaint"]


def call(case: str, pipe: Any, images: int = 4, **overrides: Any) -> torch.Tensor:
    chosen = CASES[case]
    inputs = {"batch_size": images} if case == "ddpm" else batched(chosen.inputs(), images)
    return chosen.call(pipe, **{**inputs, **overrides})


@pytest.mark.parametrize("case", PIPELINES)
def test_rewards_rise_in_every_pipeline(case: str) -> None:
    pipe = CASES[case].build()
    pipe.scheduler = SAMPLERS["sde-dpm++"].build(pipe.scheduler.config).manual_seed(3)
    base = call(case, pipe)
    steering = FeynmanKacSteering([RewardTilt(mean, 100.0)], particles=4, threshold=1.0, seeds=1)
    pipe.scheduler.guide(steering)
    steered = call(case, pipe)
    assert steered.shape == base.shape
    assert mean(steered).mean() > mean(base).mean()
    groups = 2 if case.startswith("dit") else 1
    assert steering.population.log_weights.shape == (groups, 4)
    # Both halves of a doubled batch are the same particles, and stay apart.
    assert groups == 1 or mean(steered).min() > mean(base).min()
    pipe.scheduler.guide(None)
    assert torch.equal(call(case, pipe), base)


@pytest.mark.parametrize("case", ["sd", "sd3", "dit"])
def test_prompts_keep_to_themselves(case: str) -> None:
    """Another prompt with huge rewards beside it changes nothing."""
    pipe = CASES[case].build()
    results = []
    for offset in (0.0, 1000.0):
        pipe.scheduler = SAMPLERS["sde-dpm++"].build(CASES[case].scheduler().config).manual_seed(3)

        def reward(x: torch.Tensor, offset: float = offset) -> torch.Tensor:
            group = torch.arange(len(x)) // 2 % 2
            return 30.0 * mean(x) + offset * group * torch.arange(len(x))

        pipe.scheduler.guide(FeynmanKacSteering([RewardTilt(reward)], particles=2, threshold=1.0, seeds=1))
        results.append(call(case, pipe))
    assert torch.equal(results[0][:2], results[1][:2])
    assert not torch.equal(results[0][2:], results[1][2:])


@pytest.mark.parametrize("case", ["sd", "sd3", "dit", "flux"])
def test_the_loop_outside_a_pipeline_steers_alike(case: str) -> None:
    pipe = CASES[case].build()
    denoiser = Denoiser.from_pipeline(pipe, **batched(CASES[case].inputs(), 4))
    pipe.scheduler = SAMPLERS["sde-dpm++"].build(pipe.scheduler.config).manual_seed([1, 2, 3, 4])
    pipe.scheduler.guide(FeynmanKacSteering([RewardTilt(mean, 20.0)], particles=4, threshold=1.0, seeds=1))
    noise = denoiser.noise(torch.Generator().manual_seed(7))
    given = {} if case == "dit" else {"latents": noise}
    inside = call(case, pipe, generator=torch.Generator().manual_seed(7), **given)
    # Of the four, Stable Diffusion alone hands its generator to the steps.
    generator = torch.Generator().manual_seed(7) if case == "sd" else None
    outside = sample(denoiser, pipe.scheduler, 4, generator=generator, latents=noise)
    torch.testing.assert_close(outside, inside, rtol=1e-3, atol=1e-3 * float(inside.abs().max()))


def test_groups_do_not_depend_on_the_batch() -> None:
    """Two processes with two groups each, or one with four."""
    x = start(8)

    def steered(part: slice) -> torch.Tensor:
        first = part.start
        steering = FeynmanKacSteering([RewardTilt(mean, 9.0)], particles=2, threshold=1.0, seeds=10 + first // 2)
        scheduler = build("sde-dpm++", "vp").manual_seed(100 + first).guide(steering)
        y = x[part]
        for t in scheduler.timesteps:
            y = scheduler.step(predict(scheduler, y, t), t, y, return_dict=False)[0]
        return y

    assert torch.equal(torch.cat([steered(slice(0, 4)), steered(slice(4, 8))]), steered(slice(0, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correctors_read_nothing_back_from_the_device(dtype: torch.dtype) -> None:
    """On the meta device whatever reads a value raises; the end of a run reads once, whether weights are numbers."""
    scheduler = FeynmanKacScheduler(exponents=[2.0], particles=2, seeds=0)
    scheduler.set_timesteps(STEPS, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(4, 4, 4, 4, device="meta", dtype=dtype)
    noise = torch.empty_like(x)
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(torch.empty_like(x), t, x, variance_noise=noise, return_dict=False)[0]
    assert x.device.type == "meta"
    assert scheduler.population.log_weights.device.type == "meta"
