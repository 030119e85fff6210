"""Noise streams: a function of seed and step, and of nothing else.

Whole runs with generators and seeds, alone and in pipelines, are in ``tests/pipelines/test_noise.py``.
"""

from __future__ import annotations

import copy

import pytest
import torch

from analytic import STABLE_DIFFUSION
from fewstep.samplers import SAMPLERS
from fewstep.samplers.noise import NoiseStreams

CPU = torch.device("cpu")


def draw(seeds: int | list[int], step: int = 0, batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return NoiseStreams(seeds).draw(step, torch.Size((batch, 4, 50, 50)), CPU, dtype)


def test_standard_normal_and_uncorrelated_between_seeds_and_steps():
    seeds = [0, 1, 2, 2**32, 2**63, -1]
    noise = torch.stack([draw(seeds, step, len(seeds)).flatten(1) for step in range(6)]).flatten(0, 1).double()
    count = noise.shape[1]
    assert noise.mean().abs() < 5 / (count * len(noise)) ** 0.5
    correlation = noise @ noise.T / count
    # Six standard errors, over 666 pairs.
    assert (correlation - torch.eye(len(noise))).abs().max() < 6 * 2**0.5 / count**0.5


def test_the_same_seed_and_step_draw_the_same_noise():
    streams = NoiseStreams([5, 6, 7])
    shape = torch.Size((3, 4, 50, 50))
    later = streams.draw(9, shape, CPU, torch.float32)
    assert torch.equal(streams.draw(9, shape, CPU, torch.float32), later)
    assert torch.equal(copy.deepcopy(streams).draw(9, shape, CPU, torch.float32), later)
    assert torch.equal(draw(5, 9), later)
    assert torch.equal(draw([6], 9, 1), later[1:2])
    assert not torch.equal(draw(5, 8), later)
    assert draw(5, dtype=torch.float64).dtype == torch.float64


def test_a_doubled_batch_has_the_noise_twice():
    assert torch.equal(draw([5, 6], batch=4), draw([5, 6], batch=2).repeat(2, 1, 1, 1))


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 9])
def test_other_batches_are_refused(batch):
    with pytest.raises(ValueError, match=rf"3 seeds .* batch of {batch}"):
        draw([5, 6, 7], batch=batch)


def test_given_noise_is_what_a_step_adds():
    """Its coefficient in the plan, in any dtype, and none where the plan reads none."""
    for name, sampler in SAMPLERS.items():
        scheduler = sampler.build(STABLE_DIFFUSION)
        scheduler.set_timesteps(4)
        x = torch.ones(2, 3, dtype=torch.float64)
        results = []
        for scale in (0.0, 1.0):
            scheduler.set_timesteps(4)
            noise = scale * torch.arange(6.0).view(2, 3)
            results.append(scheduler.step(x, scheduler.timesteps[0], x, variance_noise=noise).prev_sample)
        rows = [row for row in scheduler.plan.calls[0].rows if row.out == "sample"]
        coefficient = dict(rows[0].terms).get("noise", 0.0)
        assert (coefficient > 0) == sampler.stochastic, name
        expected = coefficient * torch.arange(6.0, dtype=torch.float64).view(2, 3)
        torch.testing.assert_close(results[1] - results[0], expected, rtol=0, atol=1e-12)
