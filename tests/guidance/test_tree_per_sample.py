"""Samples at different steps of one batch: each is what its run alone makes of it."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

from analytic import EDM, FLOW, MIXTURE, STABLE_DIFFUSION, ZERO_SNR, network_of
from fewstep.guidance import FeynmanKacSteering, RewardTilt
from fewstep.samplers import SAMPLERS, Denoiser, DrivenDenoiser, PlanScheduler
from fewstep.samplers.per_sample import DenoisingChain
from pipelines.networks import text_unet
from pipelines.tiny import CASES

STEPS = 6
PROCESSES: dict[str, dict[str, Any]] = {
    "vp": STABLE_DIFFUSION,
    "zero snr": ZERO_SNR,
    "flow": FLOW,
    "edm": EDM,
    "thresholding": {**STABLE_DIFFUSION, "thresholding": True, "sample_max_value": 1.2},
}
ALIKE = {"rtol": 1e-11, "atol": 1e-12}


def network_of_every_time(scheduler: PlanScheduler) -> Any:
    """An ideal network that is given a label a sample."""
    network = network_of(scheduler, MIXTURE.clean)

    def every(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert labels.shape == (len(x),)
        return torch.cat([network(row, label) for row, label in zip(x.split(1), labels, strict=True)])

    return every


def alone(scheduler: PlanScheduler, seed: int) -> list[torch.Tensor]:
    """The samples of the scheduler's own run, from the first noise to the result."""
    network = network_of(scheduler, MIXTURE.clean)
    scheduler.set_timesteps(STEPS)
    scheduler.manual_seed(seed)
    noise = torch.randn(1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    samples = [noise * scheduler.init_noise_sigma]
    for t in scheduler.timesteps:
        x = samples[-1]
        samples.append(scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0])
    return samples


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", ["sde-dpm++1", "sde-dpm", "sde-dpm++3m", "unipc", "dpm++2s"])
def test_samples_at_different_times_are_those_of_their_own_runs(sampler: str, process: str) -> None:
    """The histories of multistep samplers, and the stages of others, travel with each sample."""
    scheduler = SAMPLERS[sampler].build(PROCESSES[process])
    chain = DenoisingChain(network_of_every_time(scheduler), scheduler, STEPS, shape=(1,), dtype=torch.float64)
    seeds = [11, 12, 13]
    expected = [alone(SAMPLERS[sampler].build(PROCESSES[process]), seed) for seed in seeds]
    assert chain.steps == len(expected[0]) - 1
    states, positions = chain.start(seeds), [0, 0, 0]
    # Every round moves a part of the samples: they come to stand at different steps, and meet again at the end.
    rounds = [[0], [0, 1], [0, 1, 2], [0, 2]] + [[0, 1, 2]] * chain.steps
    for chosen in rounds:
        moving = [k for k in chosen if positions[k] < chain.steps]
        if not moving:
            continue
        at, own = [positions[k] for k in moving], [seeds[k] for k in moving]
        states[moving] = chain.advance(states[moving], at, own)
        for k in moving:
            positions[k] += 1
            torch.testing.assert_close(states[k : k + 1, 0], expected[k][positions[k]], **ALIKE)
    assert positions == [chain.steps] * 3
    torch.testing.assert_close(chain.results(states), torch.cat([samples[-1] for samples in expected]), **ALIKE)
    assert chain.evaluations == 3 * chain.steps
    assert chain.noisy == tuple(call.is_stochastic for call in scheduler.plan)


@pytest.mark.parametrize("case", ["sd", "sd3", "flux-dynamic", "ddpm", "sd-img2img"])
def test_denoisers_of_pipelines(case: str) -> None:
    """The loop of a pipeline, sample by sample; of pipelines that are driven as they are, too."""
    denoiser = Denoiser.from_pipeline(CASES[case].build(), **CASES[case].inputs())
    chain = DenoisingChain(denoiser, SAMPLERS["sde-dpm++"].build(denoiser.scheduler_config), 5)
    seeds = [3, 4]
    states = chain.start(seeds)
    spent = denoiser.evaluations
    states[:1] = chain.advance(states[:1], [0], seeds[:1])
    for k in range(1, chain.steps):
        states = chain.advance(states, [k, k - 1], seeds)
    states[1:] = chain.advance(states[1:], [chain.steps - 1], seeds[1:])
    assert denoiser.evaluations - spent == 2 * chain.steps == chain.evaluations
    for seed, result in zip(seeds, chain.results(states), strict=True):
        scheduler = SAMPLERS["sde-dpm++"].build(denoiser.scheduler_config)
        start, timesteps = denoiser.prepare(scheduler, 5, generator=torch.Generator().manual_seed(seed))
        x = start
        with torch.no_grad():
            for t in timesteps:
                scheduler.manual_seed(seed)
                x = scheduler.step(denoiser(x, t), t, x, return_dict=False)[0]
        torch.testing.assert_close(result[None], x, rtol=1e-4, atol=1e-4)
    if isinstance(denoiser, DrivenDenoiser):
        denoiser.close()


def test_half_precision_is_kept_wide_between_the_steps() -> None:
    pipe = CASES["sd"].build(unet=copy.deepcopy(text_unet()).to(torch.bfloat16))
    pipe.vae = copy.deepcopy(pipe.vae).to(torch.bfloat16)
    inputs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in CASES["sd"].inputs().items()}
    denoiser = Denoiser.from_pipeline(pipe, **inputs)
    chain = DenoisingChain(denoiser, SAMPLERS["sde-dpm++1"].build(denoiser.scheduler_config), 4)
    states = chain.start([0])
    for k in range(chain.steps):
        states = chain.advance(states, [k], [0])
    assert states.dtype == torch.float32
    scheduler = SAMPLERS["sde-dpm++1"].build(denoiser.scheduler_config).manual_seed(0)
    x, timesteps = denoiser.prepare(scheduler, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in timesteps:
            x = scheduler.step(denoiser(x, t), t, x, return_dict=False)[0]
    torch.testing.assert_close(chain.results(states), x)


def test_the_law_does_not_depend_on_the_batch() -> None:
    scheduler = SAMPLERS["sde-dpm++"].build(STABLE_DIFFUSION)
    chain = DenoisingChain(network_of_every_time(scheduler), scheduler, STEPS, shape=(1,), dtype=torch.float64)
    together, single = chain.start([5, 6]), chain.start([6])
    for k in range(chain.steps):
        together = chain.advance(together, [k, k], [5, 6])
        single = chain.advance(single, [k], [6])
    assert torch.equal(together[1:], single)


def test_what_cannot_be_stepped_sample_by_sample_is_refused() -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x

    with pytest.raises(ValueError, match="shape is missing"):
        DenoisingChain(network, SAMPLERS["sde-dpm++1"].build({}), 4)
    with pytest.raises(ValueError, match="scheduler is a DDIMScheduler; use one of ours"):
        DenoisingChain(network, diffusers.DDIMScheduler(), 4, shape=(1,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TimeShiftScheduler does more in a step"):
        DenoisingChain(network, SAMPLERS["ts-ddpm"].build({}), 4, shape=(1,))
    guided = SAMPLERS["sde-dpm++1"].build({}).guide(FeynmanKacSteering([RewardTilt(network_reward)], particles=2))
    with pytest.raises(ValueError, match="has guidance"):
        DenoisingChain(network, guided, 4, shape=(1,))
    denoiser = Denoiser.from_pipeline(CASES["ddpm"].build(), num_images_per_prompt=2)
    with pytest.raises(ValueError, match="model makes 2 samples"):
        DenoisingChain(denoiser, SAMPLERS["sde-dpm++1"].build({}), 4)
    one = Denoiser.from_pipeline(CASES["ddpm"].build())
    with pytest.raises(ValueError, match="a denoiser knows its own"):
        DenoisingChain(one, SAMPLERS["sde-dpm++1"].build({}), 4, shape=(1,))


def network_reward(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)
