"""Reward tilts, against Gaussians and mixtures whose tilted laws and normalising constants are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from exact_laws import deviation, run, tensor
from fewstep.guidance import FeynmanKacSteering, Potential, Reward, RewardTilt
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, PlanScheduler

DDPM: dict[str, Any] = {"timestep_spacing": "trailing", "beta_start": 1e-4, "beta_end": 0.02}
DATA = GaussianMixture(tensor([[1.0]]), tensor([0.6]), tensor([1.0]))
SCALE, TARGET = 1.5, 2.2


def towards_target(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x[:, 0] - TARGET) ** 2


def ddpm(steps: int = 50) -> PlanScheduler:
    scheduler = SAMPLERS["sde-dpm++1"].build(DDPM)
    scheduler.set_timesteps(steps)
    return scheduler


def law_of_the_sampler(steps: int = 50) -> tuple[float, float]:
    """Mean and variance of what 50 ancestral steps with the exact prediction make of N(1, 0.36): not that itself."""
    bars = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    times = np.arange(999, -1, -1000 // steps)
    mean, variance = 0.0, 1.0
    for k, t in enumerate(times):
        bar, after = bars[t], bars[times[k + 1]] if k + 1 < steps else 1.0
        # E[x0 | x] = m + gain (x - sqrt(bar) m), and the posterior q(x_s | x_t, x0) of DDPM.
        gain = math.sqrt(bar) * 0.36 / (bar * 0.36 + 1 - bar)
        step = 1 - bar / after
        on_clean, on_state = math.sqrt(after) * step / (1 - bar), math.sqrt(bar / after) * (1 - after) / (1 - bar)
        slope = on_state + on_clean * gain
        mean = slope * mean + on_clean * (1 - gain * math.sqrt(bar))
        variance = slope**2 * variance + step * (1 - after) / (1 - bar)
    return mean, variance


def tilted(mean: float, variance: float, scale: float = SCALE) -> tuple[float, float, float]:
    """Mean, variance and log normalising constant of the Gaussian tilted by the reward."""
    precision = 1 / variance + scale
    log_z = -0.5 * math.log1p(scale * variance) - 0.5 * scale * (mean - TARGET) ** 2 / (1 + scale * variance)
    return (mean / variance + scale * TARGET) / precision, 1 / precision, log_z


def test_the_law_of_the_sampler() -> None:
    """The recursion above is that of the sampler."""
    mean, variance = law_of_the_sampler()
    assert (mean, variance) == pytest.approx((1.0, 0.2920), abs=1e-4)
    x = run(ddpm(), DATA, 40000)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 40000))
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 40000))


def steer(steering: FeynmanKacSteering, groups: int = 250, steps: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Results ``(groups, particles)`` and estimates of the normalising constant."""
    particles = steering.population.particles
    x = run(ddpm(steps).guide(steering), DATA, groups * particles, seed=5)
    return x.view(groups, particles), steering.population.log_evidence


@pytest.mark.parametrize("threshold", [1.0, 0.5])
@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("gradient_scale", [0.0, 1.0])
def test_tilted_gaussian(potential: str, threshold: float, gradient_scale: float) -> None:
    """The normalising constant is unbiased; its weighted means are those of the tilted Gaussian."""
    tilt = RewardTilt(towards_target, SCALE, potential=potential, gradient_scale=gradient_scale)
    # Sums over many times are heavy-tailed: their means would need more runs than a test has.
    every = 25 if potential == "sum" else 5
    x, log_evidence = steer(FeynmanKacSteering([tilt], particles=32, threshold=threshold, every=every, seeds=0))
    mean, variance, log_z = tilted(*law_of_the_sampler())
    assert (mean, variance, log_z) == pytest.approx((1.3655, 0.2030, -0.9327), abs=1e-4)
    ratio = (log_evidence - log_z).exp()
    assert deviation(ratio[:, None], [1.0]) < 3.5
    # Z-weighted averages over runs are unbiased where those of a run are not.
    errors = torch.stack([x.mean(1) - mean, ((x - mean) ** 2).mean(1) - variance], dim=1) * ratio[:, None]
    assert deviation(errors, [0.0, 0.0]) < 3.5
    # And it is another law than the sampler's.
    assert deviation(x.mean(1, keepdim=True), [1.0]) > 20


@pytest.mark.parametrize("resampling", ["stratified", "residual", "multinomial"])
def test_every_resampling_scheme_is_unbiased(resampling: str) -> None:
    tilt = RewardTilt(towards_target, SCALE)
    x, log_evidence = steer(FeynmanKacSteering([tilt], particles=16, resampling=resampling, every=10, seeds=0))
    mean, _, log_z = tilted(*law_of_the_sampler())
    ratio = (log_evidence - log_z).exp()
    assert deviation(torch.stack([ratio, ratio * (x.mean(1) - mean)], 1), [1.0, 0.0]) < 3.5


def test_gradients_lower_the_variance() -> None:
    spreads = []
    for gradient_scale in (0.0, 0.5):
        tilt = RewardTilt(towards_target, SCALE, gradient_scale=gradient_scale)
        _, log_evidence = steer(FeynmanKacSteering([tilt], particles=16, threshold=0.5, every=1, seeds=0))
        spreads.append(float(log_evidence.std()))
    assert spreads[1] < 0.5 * spreads[0]


@pytest.mark.parametrize("options", [{"start": 0.4}, {"stop": 0.6}, {"threshold": 0.0}, {"finish": "weights"}])
def test_no_schedule_changes_the_law(options: dict[str, Any]) -> None:
    steering = FeynmanKacSteering([RewardTilt(towards_target, SCALE)], particles=32, seeds=0, **options)
    x, log_evidence = steer(steering)
    mean, _, log_z = tilted(*law_of_the_sampler())
    weights = torch.softmax(steering.population.log_weights, 1)
    assert (weights.std(1).max() > 0.001) == ("finish" in options)
    ratio = (log_evidence - log_z).exp()
    values = torch.stack([ratio, ratio * ((weights * x).sum(1) - mean)], 1)
    assert deviation(values, [1.0, 0.0]) < 3.5


def test_one_particle_is_the_sampler() -> None:
    steering = FeynmanKacSteering([RewardTilt(towards_target, SCALE)], particles=1, threshold=1.0, seeds=0)
    assert torch.equal(run(ddpm().guide(steering), DATA, 64), run(ddpm(), DATA, 64))


@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.3])
def test_two_states(threshold: float) -> None:
    """Half of the samples are at 3, half at -3, and one is worth three of the other: three quarters."""
    data = GaussianMixture(tensor([[-3.0], [3.0]]), tensor([0.1, 0.1]), tensor([1.0, 1.0]))
    steering = FeynmanKacSteering(
        [RewardTilt(lambda x: (x[:, 0] > 0).double(), math.log(3.0))], particles=16, threshold=threshold, seeds=0
    )
    x = run(ddpm(10).guide(steering), data, 800 * 16).view(800, 16)
    evidence = steering.population.log_evidence.exp()
    above = (x > 0).double().mean(1) * evidence
    assert deviation(torch.stack([evidence, above], 1), [2.0, 1.5]) < 3.5


def test_potentials_multiply() -> None:
    """Two rewards in one: the tilt of their sum."""
    tilts = [RewardTilt(towards_target, 0.5), RewardTilt(lambda x: 2.0 * towards_target(x), 0.5, potential="max")]
    x, log_evidence = steer(FeynmanKacSteering(tilts, particles=32, every=5, seeds=0))
    mean, _, log_z = tilted(*law_of_the_sampler())
    ratio = (log_evidence - log_z).exp()
    assert deviation(torch.stack([ratio, ratio * (x.mean(1) - mean)], 1), [1.0, 0.0]) < 3.5


def test_lineage_and_values_belong_to_the_results() -> None:
    reward = Reward(towards_target)
    tilt = RewardTilt(reward, 20.0)
    steering = FeynmanKacSteering([tilt], particles=8, threshold=1.0, every=5, seeds=0)
    x, _ = steer(steering, groups=10)
    torch.testing.assert_close(tilt.values, towards_target(x.view(-1, 1)))
    assert len(steering.population.history) == 11
    assert (steering.population.survivors < 8).any()
    assert reward.evaluations == 80 * 11


def test_the_base_potential_is_one() -> None:
    steering = FeynmanKacSteering([Potential()], particles=4, seeds=0)
    assert torch.equal(run(ddpm(5).guide(steering), DATA, 8), run(ddpm(5), DATA, 8))
    assert (steering.population.log_evidence == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardTilt(towards_target, potential="product"), "potential 'product' is unknown"),
        (lambda: RewardTilt(towards_target, -1.0), "scale -1.0"),
        (lambda: RewardTilt(towards_target, gradient_scale=-1.0), "gradient_scale -1.0"),
        (lambda: FeynmanKacSteering([], particles=2, every=0), "every 0"),
        (lambda: FeynmanKacSteering([], particles=2, start=0.5, stop=0.5), "start 0.5 and stop 0.5"),
        (lambda: FeynmanKacSteering([], particles=2, finish="best"), "finish 'best'"),
        (lambda: FeynmanKacSteering([], particles=0), "particles 0"),
        (lambda: FeynmanKacSteering([], particles=2, resampling="best"), "resampling 'best'"),
        (lambda: run(ddpm(5).guide(FeynmanKacSteering([], particles=3)), DATA, 8), "batch of 8 .* particles=3"),
    ],
)
def test_impossible_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
