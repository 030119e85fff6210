"""Noise of stochastic samplers: a seed is an image, whatever the batch and whether the pipeline hands it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.samplers import SAMPLERS, PlanScheduler
from pipelines.analytic import GaussianDenoiser, flow_level, vp_level
from pipelines.loops import SHIFTED, STEPS, STOCHASTIC, build, every_kind, every_sampler, network, start
from pipelines.tiny import CASES, Case, batched, seeded

SEEDS = (7, 8, 9)
ALONE = [name for name in STOCHASTIC if name not in SHIFTED]


def pipeline(chosen: Case, name: str, exact: bool = False) -> Any:
    """With a sampler, and a denoiser that computes each sample by itself where results are compared bit by bit."""
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
    if exact:
        flow = chosen.kind == "flow"
        part = "transformer" if flow else "unet"
        level = flow_level if flow else vp_level(pipe.scheduler.alphas_cumprod)
        setattr(pipe, part, GaussianDenoiser(getattr(pipe, part), level, spread=0.5, flow=flow))
    return pipe


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ALONE)
def test_generators_of_the_pipeline_reach_the_noise(name: str) -> None:
    """Stable Diffusion hands its generators to ``step``."""
    chosen = CASES["sd"]
    pipe = pipeline(chosen, name, exact=True)
    batch = chosen.call(pipe, generator=[generator(seed) for seed in SEEDS], **batched(chosen.inputs(), 3))
    for k, seed in enumerate(SEEDS):
        assert torch.equal(chosen.call(pipe, generator=generator(seed)), batch[k : k + 1])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    chosen.call(pipe, generator=generator(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ALONE)
def test_seeds_stand_in_where_the_pipeline_hands_nothing_on(name: str) -> None:
    """Stable Diffusion 3: bit by bit the same image in any batch."""
    chosen = CASES["sd3"]
    pipe = pipeline(chosen, name, exact=True)
    noise = seeded(3, *chosen.shape[1:], seed=4)
    pipe.scheduler.manual_seed(list(SEEDS))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch = chosen.call(pipe, latents=noise, **batched(chosen.inputs(), 3))
    assert torch.equal(torch.get_rng_state(), before)
    for k, seed in enumerate(SEEDS):
        pipe.scheduler.manual_seed(seed)
        assert torch.equal(chosen.call(pipe, latents=noise[k : k + 1]), batch[k : k + 1])
    pipe.scheduler.manual_seed(SEEDS[0] + 100)
    assert not torch.equal(chosen.call(pipe, latents=noise[:1]), batch[:1])


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("case", ["sd3", "flux", "flux-dynamic", "wan", "dit"])
def test_seeds_in_pipelines_with_networks(case: str, name: str) -> None:
    """DiT's doubled batch too."""
    chosen = CASES[case]
    pipe = pipeline(chosen, name)
    pipe.scheduler.manual_seed(list(SEEDS))
    generators = [generator(seed) for seed in SEEDS]
    batch = chosen.call(pipe, generator=generators, **batched(chosen.inputs(), 3))
    singles = []
    for seed in SEEDS:
        pipe.scheduler.manual_seed(seed)
        singles.append(chosen.call(pipe, seed=seed))
    assert batch.shape == (3, *chosen.shape[1:])
    torch.testing.assert_close(batch, torch.cat(singles), rtol=1e-3, atol=1e-3 * float(batch.abs().max()))
    pipe.scheduler.manual_seed(99)
    other = chosen.call(pipe, seed=SEEDS[0])
    assert (other - singles[0]).abs().max() > 1e-2 * singles[0].abs().max()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_both_halves_of_a_doubled_batch_get_the_noise_of_their_sample(name: str) -> None:
    """DiT guides by a batch of conditional and unconditional halves whose samples are equal."""
    chosen = CASES["dit"]
    pipe = pipeline(chosen, name)
    pipe.scheduler.manual_seed(list(SEEDS[:2]))
    results = []
    step = pipe.scheduler.step

    def watching(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        output = step(model_output, timestep, sample, **kwargs)
        results.append(output.prev_sample)
        return output

    pipe.scheduler.step = watching
    pipe(class_labels=[1, 2], num_inference_steps=3, generator=generator(0))
    assert len(results) == 3
    for result in results:
        assert torch.equal(*result.chunk(2))


# ------------------------------------------------------------------------------------------------ in a caller's loop


def loop(scheduler: PlanScheduler, x: torch.Tensor, generator: Any = None) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x), t, x, generator=generator, return_dict=False)[0]
    return x


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@every_sampler
@every_kind
def test_global_randomness_is_left_alone(name: str, kind: str) -> None:
    """Where a generator or seeds are given; deterministic samplers never draw."""
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = loop(build(name, kind), start(), torch.Generator().manual_seed(1))
    second = loop(build(name, kind), start(), torch.Generator().manual_seed(2))
    loop(build(name, kind), start(), generators([1, 2]))
    loop(build(name, kind).manual_seed(5), start())
    if name not in STOCHASTIC:
        loop(build(name, kind), start())
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(first, second) == (name not in STOCHASTIC)


@pytest.mark.parametrize("name", STOCHASTIC)
@every_kind
def test_without_a_generator_noise_comes_from_the_global_state(name: str, kind: str) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(loop(build(name, kind), start()))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", STOCHASTIC)
@every_kind
def test_a_list_of_generators_makes_each_sample_its_own_run(name: str, kind: str) -> None:
    x, seeds = start(3), (11, 12, 13)
    batch = loop(build(name, kind), x, generators(seeds))
    for k, seed in enumerate(seeds):
        single = loop(build(name, kind), x[k : k + 1], generators([seed]))
        assert torch.equal(batch[k : k + 1], single)
        assert torch.equal(loop(build(name, kind), x[k : k + 1], generators([seed])[0]), single)


@pytest.mark.parametrize("name", STOCHASTIC)
@every_kind
def test_seeds_make_each_sample_its_own_run(name: str, kind: str) -> None:
    x, seeds = start(3), [21, 22, 23]
    batch = loop(build(name, kind).manual_seed(seeds), x)
    assert torch.equal(loop(build(name, kind).manual_seed(21), x), batch)
    for k, seed in enumerate(seeds):
        assert torch.equal(loop(build(name, kind).manual_seed(seed), x[k : k + 1]), batch[k : k + 1])
    assert not torch.equal(loop(build(name, kind).manual_seed([22, 21, 23]), x), batch)
    with pytest.raises(ValueError, match="seeds"):
        loop(build(name, kind).manual_seed([1, 2]), x)
    scheduler = build(name, kind).manual_seed(seeds)
    assert torch.equal(loop(scheduler, x), batch)
    scheduler.set_timesteps(STEPS)
    assert torch.equal(loop(scheduler, x), batch)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_of_half_precision_samples_is_drawn_in_single_precision(name: str) -> None:
    single = loop(build(name, "vp"), start(), torch.Generator().manual_seed(4))
    half = loop(build(name, "vp"), start().bfloat16(), torch.Generator().manual_seed(4))
    assert half.dtype == torch.bfloat16
    assert (half.float() - single).abs().max() < 0.1 * max(1.0, float(single.abs().max()))
