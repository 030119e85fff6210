"""Runs leave nothing behind, keep to themselves, and never wait for the device."""

from __future__ import annotations

import copy

import pytest
import torch

from pipelines.loops import (
    LEVELS,
    STEPS,
    STOCHASTIC,
    build,
    every_kind,
    every_kind_and_edm,
    every_sampler,
    network,
    predict,
    run,
    start,
)
from pipelines.tiny import pndm, seeded


@every_sampler
@every_kind_and_edm
def test_a_copy_made_during_a_run_goes_on_alike(name: str, kind: str) -> None:
    scheduler = build(name, kind)
    half = run(scheduler, start(), end=3)
    twin = copy.deepcopy(scheduler)
    result = run(scheduler, half, begin=3)
    assert torch.equal(run(twin, half, begin=3), result)
    # The copy is a copy: its run did not move the original.
    assert twin.step_index == scheduler.step_index == len(scheduler.timesteps)


@every_sampler
@every_kind_and_edm
def test_nothing_is_left_over_from_an_earlier_run(name: str, kind: str) -> None:
    scheduler = build(name, kind)
    fresh = run(scheduler, start())
    scheduler.set_timesteps(STEPS)
    assert torch.equal(run(scheduler, start()), fresh)
    # Given up half-way, then another batch, another shape and another number of steps.
    scheduler.set_timesteps(STEPS)
    run(scheduler, start(), end=2)
    scheduler.set_timesteps(STEPS + 2)
    run(scheduler, seeded(5, 1, 3, 2, 2))
    scheduler.set_timesteps(STEPS)
    assert torch.equal(run(scheduler, start()), fresh)
    scheduler.set_timesteps(STEPS)
    larger = run(scheduler, torch.cat([start(), start()]))
    if name not in STOCHASTIC:
        assert torch.equal(larger, torch.cat([fresh, fresh]))


@every_sampler
@every_kind_and_edm
def test_the_config_is_not_touched_by_runs(name: str, kind: str) -> None:
    scheduler = build(name, kind, None)
    before = copy.deepcopy(dict(scheduler.config))
    labels = [1.0, -0.5] if kind == "edm" else [500, 20]
    for arguments in (
        {"num_inference_steps": 3},
        {"timesteps": labels},
        {"sigmas": LEVELS[kind], "mu": 1.0},
    ):
        scheduler.set_timesteps(**arguments)
        run(scheduler, start())
    assert dict(scheduler.config) == before


@every_sampler
@every_kind_and_edm
def test_shapes_do_not_matter(name: str, kind: str) -> None:
    """Packed tokens, images and videos: the same numbers give the same numbers."""
    results = []
    for shape in ((2, 64), (2, 16, 4), (2, 4, 4, 4), (2, 2, 2, 4, 4)):
        scheduler = build(name, kind)
        x = start().view(shape)
        for k, t in enumerate(scheduler.timesteps):
            noise = seeded(2, 64, seed=k).view(shape)
            x = scheduler.step(predict(scheduler, x, t), t, x, variance_noise=noise, return_dict=False)[0]
        results.append(x.reshape(2, 64))
    assert all(torch.equal(result, results[0]) for result in results)


@every_sampler
@every_kind_and_edm
def test_a_step_that_is_taken_back_may_be_repeated(name: str, kind: str) -> None:
    """Cosmos reads the clean sample, decrements the index and steps again."""
    plain = build(name, kind)
    expected = run(plain, start())
    scheduler = build(name, kind)
    x = start()
    for k, t in enumerate(scheduler.timesteps):
        noise = seeded(*x.shape, seed=3 + k)
        first = scheduler.step(predict(scheduler, x, t), t, x, variance_noise=noise)
        scheduler._step_index -= 1
        second = scheduler.step(predict(scheduler, x, t), t, x, variance_noise=noise)
        assert torch.equal(first.prev_sample, second.prev_sample)
        assert torch.equal(first.pred_original_sample, second.pred_original_sample)
        x = second.prev_sample
    assert torch.equal(x, expected)


@every_sampler
@every_kind_and_edm
def test_inputs_are_not_written_to_and_outputs_stay_as_they_are(name: str, kind: str) -> None:
    expected = run(build(name, kind), start())
    scheduler = build(name, kind)
    x = start()
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for k, t in enumerate(scheduler.timesteps):
        u, noise = predict(scheduler, x, t), seeded(*x.shape, seed=3 + k)
        before = [tensor.clone() for tensor in (u, x, noise)]
        output = scheduler.step(u, t, x, variance_noise=noise)
        assert all(torch.equal(a, b) for a, b in zip((u, x, noise), before, strict=True))
        following = output.prev_sample.clone()
        outputs += [(output.prev_sample, following), (output.pred_original_sample, output.pred_original_sample.clone())]
        # What the scheduler keeps is its own: the caller may reuse its tensors.
        for tensor in (u, x, noise):
            tensor.fill_(float("nan"))
        x = following.clone()
    assert torch.equal(x, expected)
    assert all(torch.equal(tensor, copied) for tensor, copied in outputs)


@every_sampler
@every_kind_and_edm
@pytest.mark.parametrize("field", ["prev_sample", "pred_original_sample"])
def test_returned_tensors_may_be_overwritten(name: str, kind: str, field: str) -> None:
    expected = run(build(name, kind), start())
    scheduler = build(name, kind)
    x = start()
    for k, t in enumerate(scheduler.timesteps):
        output = scheduler.step(predict(scheduler, x, t), t, x, variance_noise=seeded(*x.shape, seed=3 + k))
        x = output.prev_sample.clone()
        output[field].zero_()
    assert torch.equal(x, expected)


@every_sampler
@every_kind_and_edm
def test_results_have_the_dtype_of_the_sample(name: str, kind: str) -> None:
    exact = run(build(name, kind), start(dtype=torch.float64))
    # A flow run starts at alpha = 0.001, by which high orders on the noise prediction divide what float32 rounds off.
    single = 2e-3 if kind == "flow" and name in ("deis-tab3", "deis-heun", "deis-kutta3", "deis-rk4") else 2e-5
    for dtype, tolerance in ((torch.float32, single), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)):
        scheduler = build(name, kind)
        x = start(dtype=dtype)
        for other in (dtype, torch.float32):
            twin = copy.deepcopy(scheduler)
            output = twin.step(
                network(x).to(other), twin.timesteps[0], x, variance_noise=seeded(*x.shape, seed=3).to(dtype)
            )
            assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
        result = run(scheduler, x)
        assert result.dtype == dtype
        assert (result.double() - exact).abs().max() < tolerance * exact.abs().max()
    scheduler = build(name, kind)
    output = scheduler.step(network(start()).half(), scheduler.timesteps[0], start(), variance_noise=start())
    assert output.prev_sample.dtype == torch.float32


@every_sampler
@every_kind_and_edm
@pytest.mark.parametrize("begin", [None, 0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_nothing_back_from_the_device(name: str, kind: str, begin: int | None, dtype: torch.dtype) -> None:
    """On the meta device whatever reads a value raises."""
    scheduler = build(name, kind, None)
    scheduler.set_timesteps(STEPS, device="meta")
    index = (begin or 0) * scheduler.order
    if begin is not None:
        scheduler.set_begin_index(index)
    assert scheduler.timesteps.device.type == "meta"
    x = torch.empty(2, 4, 4, 4, device="meta", dtype=dtype)
    clean, noise = torch.empty_like(x), torch.empty_like(x)
    if begin is not None:
        latent_timestep = scheduler.timesteps[index : index + 1].repeat(2)
        assert scheduler.add_noise(clean, noise, latent_timestep).device.type == "meta"
        assert scheduler.scale_noise(clean, latent_timestep, noise).shape == x.shape
    for t in scheduler.timesteps[index:]:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(scaled, t, x, variance_noise=noise, return_dict=False)[0]
        if begin is not None:
            mixed = scheduler.add_noise(clean, noise, t[None])
            assert mixed.dtype == x.dtype
    assert x.device.type == "meta"
    assert x.dtype == dtype
    assert scheduler.step_index == len(scheduler.timesteps)


@every_sampler
@every_kind_and_edm
def test_add_noise_follows_the_run(name: str, kind: str) -> None:
    """Before the first step the level of the start, after step k that of call k + 1: inpainting mixes there."""
    scheduler = build(name, kind, None)
    scheduler.set_timesteps(STEPS)
    begin = 2 * scheduler.order
    scheduler.set_begin_index(begin)
    calls = scheduler.plan.calls
    clean, noise = start(), seeded(2, 4, 4, 4, seed=77)
    x = scheduler.add_noise(clean, noise, scheduler.timesteps[begin : begin + 1].repeat(2))
    torch.testing.assert_close(x, calls[0].alpha * clean + calls[0].sigma * noise)
    levels = [(call.alpha, call.sigma) for call in calls] + [(scheduler.plan.final_alpha, scheduler.plan.final_sigma)]
    for k, t in enumerate(scheduler.timesteps[begin:]):
        x = scheduler.step(predict(scheduler, x, t), t, x, variance_noise=noise).prev_sample
        alpha, sigma = levels[k + 1]
        following = scheduler.timesteps[min(begin + k + 1, len(scheduler.timesteps) - 1)]
        mixed = scheduler.add_noise(clean, noise, following[None])
        torch.testing.assert_close(mixed, alpha * clean + sigma * noise)


@pytest.mark.parametrize("name", ["dpm++", "deis", "unipc"])
@every_kind
def test_add_noise_by_timestep_before_any_run(name: str, kind: str) -> None:
    """Training: every sample at a time of its own."""
    scheduler = build(name, kind, None)
    clean, noise = start(3), seeded(3, 4, 4, 4, seed=77)
    labels = torch.tensor([999, 500, 1])
    if kind == "vp":
        alpha = pndm().alphas_cumprod[labels].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - pndm().alphas_cumprod[labels]).sqrt().view(-1, 1, 1, 1)
        velocity = alpha * noise - sigma * clean
    else:
        sigma = (labels / 1000).view(-1, 1, 1, 1)
        alpha, velocity = 1 - sigma, noise - clean
    expected = alpha * clean + sigma * noise
    torch.testing.assert_close(scheduler.add_noise(clean, noise, labels), expected)
    torch.testing.assert_close(scheduler.scale_noise(clean, labels, noise), expected)
    torch.testing.assert_close(scheduler.get_velocity(clean, noise, labels), velocity)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.add_noise(clean, noise, labels), expected)
    half = scheduler.add_noise(clean.bfloat16(), noise.bfloat16(), labels)
    assert half.dtype == torch.bfloat16


def test_scale_noise_needs_noise_and_takes_it_last() -> None:
    scheduler = build("dpm++", "flow")
    clean, noise = start(), seeded(2, 4, 4, 4, seed=77)
    label = scheduler.timesteps[2:3].repeat(2)
    torch.testing.assert_close(
        scheduler.scale_noise(clean, label, noise), scheduler.add_noise(clean, noise, label), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="noise"):
        scheduler.scale_noise(clean, label)
