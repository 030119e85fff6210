"""What must hold exactly, or in a limit, of every way to steer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from analytic import network_of
from exact_laws import deviation, run, tensor
from fewstep.guidance import SVDD, DiffusionTreeSampling, FeynmanKacSteering, RewardTilt
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, PlanScheduler
from tree_chains import FiniteChain

DDPM: dict[str, Any] = {"timestep_spacing": "trailing", "beta_start": 1e-4, "beta_end": 0.02}
DATA = GaussianMixture(tensor([[1.0]]), tensor([0.6]), tensor([1.0]))
TARGET = 2.2


def towards_target(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x[:, 0] - TARGET) ** 2


def ddpm(steps: int = 50) -> PlanScheduler:
    scheduler = SAMPLERS["sde-dpm++1"].build(DDPM)
    scheduler.set_timesteps(steps)
    return scheduler


# ----------------------------------------------------------------------------------------- twisted proposals


@pytest.mark.parametrize(
    "tilt",
    [
        RewardTilt(towards_target, 0.0, gradient_scale=1.0),
        RewardTilt(lambda x: 0.0 * x[:, 0] + 3.0, 1.5, gradient_scale=1.0),
    ],
    ids=["scale 0", "constant"],
)
def test_twists_that_say_nothing_change_nothing(tilt: RewardTilt) -> None:
    steering = FeynmanKacSteering([tilt], particles=8, threshold=1.0, seeds=0)
    assert torch.equal(run(ddpm(10).guide(steering), DATA, 32), run(ddpm(10), DATA, 32))
    expected = 0.0 if tilt.scale == 0.0 else 1.5 * 3.0
    assert steering.population.log_evidence.tolist() == pytest.approx([expected] * 4)
    assert (steering.population.history[-1] - 8).abs().max() < 1e-9


def test_exact_twists_leave_equal_weights_as_steps_shrink() -> None:
    """Of data of unit variance a linear reward's soft value is that of the predicted sample, up to a constant."""
    data = GaussianMixture(tensor([[1.0]]), tensor([1.0]), tensor([1.0]))
    spreads = []
    for steps in (10, 40, 160):
        tilt = RewardTilt(lambda x: x[:, 0], 1.0, gradient_scale=1.0)
        steering = FeynmanKacSteering([tilt], particles=500, threshold=0.0, finish="weights", seeds=0)
        run(ddpm(steps).guide(steering), data, 2000)
        spreads.append(float(steering.population.log_weights.std(1).mean()))
        # The closed form, lambda mean + lambda^2 variance / 2, of data: the sampler's own variance comes to it.
        error = abs(float(steering.population.log_evidence.exp().mean().log()) - 1.5)
        assert error < (0.3 if steps == 10 else 0.1)
    assert spreads[1] < 0.5 * spreads[0]
    assert spreads[2] < 0.5 * spreads[1]
    assert spreads[2] < 0.15


# ----------------------------------------------------------------------------------------- limits of the scale


def test_the_slope_of_the_evidence_at_scale_zero_is_the_mean_reward() -> None:
    mean, variance = 1.0, 0.2920  # of what these 50 steps sample
    expected = -0.5 * (variance + (mean - TARGET) ** 2)
    for scale in (1e-1, 1e-4):
        steering = FeynmanKacSteering([RewardTilt(towards_target, scale)], particles=32, every=10, seeds=0)
        run(ddpm().guide(steering), DATA, 250 * 32)
        slope = steering.population.log_evidence[:, None] / scale
        if scale < 1e-3:
            assert deviation(slope, [expected]) < 3.5
            assert float(steering.population.log_evidence.abs().max()) < 2e-4
        else:  # and its curvature, half the variance of the reward
            assert float(slope.mean()) > expected


# ----------------------------------------------------------------------------------------- large log-weights


def four_states(x: torch.Tensor) -> torch.Tensor:
    return (3 + 2 * (x[:, 0] > 0) + (x[:, 1] > 0)).double()


@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.0])
def test_large_rewards_keep_their_ratios(threshold: float) -> None:
    """Four corners alike, where ``scale * reward`` is 30, 40, 50 and 60."""
    corners = tensor([[-3.0, -3.0], [-3.0, 3.0], [3.0, -3.0], [3.0, 3.0]])
    data = GaussianMixture(corners, tensor([0.1] * 4), tensor([0.25] * 4))
    finish = "weights" if threshold == 0.0 else "resample"
    steering = FeynmanKacSteering(
        [RewardTilt(four_states, 10.0)], particles=16, threshold=threshold, finish=finish, start=0.9, seeds=0
    )
    x = run(ddpm(20).guide(steering), data, 400 * 16)
    values = 10.0 * four_states(x).view(400, 16)
    log_z = math.log(sum(math.exp(v - 60.0) for v in (30, 40, 50, 60)) / 4) + 60.0
    ratio = (steering.population.log_evidence - log_z).exp()
    assert deviation(ratio[:, None], [1.0]) < 3.5
    if threshold == 0.0:
        torch.testing.assert_close(steering.population.log_weights, values, rtol=1e-12, atol=1e-9)
        assert set(values.unique().tolist()) == {30.0, 40.0, 50.0, 60.0}
    else:
        # By far the most of the weight is at 60.
        top = (values == 60.0).double().mean(1)
        assert deviation(torch.stack([ratio * top], 1), [1.0 / (1.0 + math.exp(-10.0))]) < 3.5
        assert float(top.mean()) > 0.95


# ----------------------------------------------------------------------------------------- order of particles


def test_the_best_candidate_is_the_best_in_any_order() -> None:
    """At temperature 0 a permutation of the noises within a chain changes nothing at all."""
    batch, candidates = 12, 4
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(candidates, generator=generator) + k for k in range(0, batch, candidates)])
    results = []
    for place in (torch.arange(batch), order):
        scheduler = ddpm(8).guide(SVDD(towards_target, candidates=candidates, temperature=0.0, seeds=0))
        network, draws = network_of(scheduler, DATA.clean), torch.Generator().manual_seed(1)
        x = torch.randn(batch, 1, generator=draws, dtype=torch.float64)[place]
        for t in scheduler.timesteps:
            noise = torch.randn(batch, 1, generator=draws, dtype=torch.float64)[place]
            x = scheduler.step(network(x, t), t, x, variance_noise=noise, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=0)


# ----------------------------------------------------------------------------------------- trees


def test_rollouts_from_the_root_are_samples_of_the_base() -> None:
    """However the rewards lead the search below."""
    chain, rewards = FiniteChain.random(), torch.tensor([0.0, 2.0, -1.0, 1.0]).double()
    found = np.zeros(4)
    for seed in range(40):
        tree = DiffusionTreeSampling(
            chain, lambda states: rewards[states], scale=2.0, branching=3, widening=(2.0, 0.6), seed=seed
        )
        tree.run(150)
        assert len(tree.tree.root_rollouts) < len(tree.tree.leaves)
        roots = chain.results(tree.tree.states(tree.tree.root_rollouts)).numpy()
        found += np.bincount(roots, minlength=4)
    low, high = binom.interval(0.9995, int(found.sum()), chain.base_law())
    assert ((low <= found) & (found <= high)).all()
    tilted = chain.base_law() * np.exp(2.0 * rewards.numpy())
    assert abs(tilted / tilted.sum() - chain.base_law()).max() > 0.2
