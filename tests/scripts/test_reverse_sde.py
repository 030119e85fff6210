"""The samplers that the MR Sampler is measured against: Gaussian closed forms, and the MR Sampler's own first order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fewstep.samplers import MeanRevertingSchedule, MRSamplerScheduler, RestorationPipeline
from fewstep.scripts.bench.reverse_sde import Step, euler_step, posterior_step, restore
from fewstep.scripts.generation.model import load_model

SIGMA_INF = 0.3
ZERO, ONE = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "following"), [(0.005, 0.3), (0.3, 0.31), (0.5, 0.9), (0.9, 0.999)])
def test_the_posterior_is_the_conditional_of_a_joint_gaussian(alpha: float, following: float) -> None:
    """Of the next sample, given this one and the clean image: by the covariances of the forward process."""
    mu, clean, x = 0.4, 0.9, 0.1
    own = SIGMA_INF**2 * (1 - following**2)
    ratio = alpha / following
    covariance = ratio * own
    total = ratio**2 * own + SIGMA_INF**2 * (1 - ratio**2)
    means = [a * clean + (1 - a) * mu for a in (following, alpha)]
    mean = means[0] + covariance / total * (x - means[1])
    deviation = math.sqrt(own - covariance**2 / total)
    for z in (0.0, 1.0, -2.0):
        found = posterior_step(ONE * x, ONE * clean, ONE * mu, alpha, following, SIGMA_INF, ONE * z)
        assert found.item() == pytest.approx(mean + deviation * z, rel=1e-10)
    assert posterior_step(ONE * x, ONE * clean, ONE * mu, alpha, 1.0, SIGMA_INF, ONE).item() == pytest.approx(clean)


def spread(step: Step, steps: int, mean: float, variance: float, mu: float, sigma_inf: float) -> tuple[float, float]:
    """Mean and variance at the end of a run on clean images from a Gaussian, whose prediction is exact.

    Every step is affine in the sample and the noise, so three evaluations tell all of it.
    """
    schedule = MeanRevertingSchedule()
    alphas = schedule.alpha_sigma(schedule.level(np.linspace(100.0, 0.0, steps + 1)))[0].tolist()
    now, squared = mu, sigma_inf**2
    for alpha, following in itertools.pairwise(alphas):
        noise = sigma_inf**2 * (1 - alpha**2)

        def after(x: float, z: float, alpha: float = alpha, to: float = following, noise: float = noise) -> float:
            gain = alpha * variance / (alpha**2 * variance + noise)
            clean = mean + gain * (x - alpha * mean - (1 - alpha) * mu)
            return step(ONE * x, ONE * clean, ONE * mu, alpha, to, sigma_inf, ONE * z).item()

        base = after(0.0, 0.0)
        slope, strength = after(1.0, 0.0) - base, after(0.0, 1.0) - base
        now, squared = base + slope * now, slope**2 * squared + strength**2
    return now, squared


@pytest.mark.parametrize(("steps", "expected"), [(5, 0.0005), (10, 0.0020), (20, 0.0040), (50, 0.0064), (100, 0.0079)])
def test_the_posterior_of_any_stride_removes_the_noise(steps: int, expected: float) -> None:
    """Of clean residuals with variance 0.01; the coefficients of neighbouring times leave 0.78 after 5 steps."""
    mean, variance = spread(posterior_step, steps, 0.0, 0.01, 0.0, 1.0)
    assert variance == pytest.approx(expected, rel=0.12)
    assert mean == pytest.approx(0.0, abs=1e-12)


def test_euler_converges_with_order_one() -> None:
    """To the distribution of the clean images."""
    errors = []
    for steps in (400, 800, 1600):
        mean, variance = spread(euler_step, steps, 0.7, 0.02, 0.4, SIGMA_INF)
        errors.append((abs(mean - 0.7), abs(variance - 0.02)))
    for coarse, fine in itertools.pairwise(errors):
        for before, after in zip(coarse, fine, strict=True):
            assert before / after == pytest.approx(2.0, abs=0.35)
    assert max(errors[-1]) < 2e-3


def test_euler_takes_steps_of_the_integral_of_theta() -> None:
    """``dx = (theta (mu - x) - 2 theta sigma_inf^2 score) dt + sigma_inf sqrt(2 theta) dw`` with ``theta dt = 0.1``."""
    x, clean, mu, alpha = 0.8, 0.3, 0.5, 0.6
    sigma = SIGMA_INF * math.sqrt(1 - alpha**2)
    noise = (x - alpha * clean - (1 - alpha) * mu) / sigma
    drift = 0.1 * (mu - x) - 2 * 0.1 * SIGMA_INF**2 * (-noise / sigma)
    for z in (0.0, 1.5):
        found = euler_step(ONE * x, ONE * clean, ONE * mu, alpha, alpha * math.exp(0.1), SIGMA_INF, ONE * z)
        assert found.item() == pytest.approx(x - drift + SIGMA_INF * math.sqrt(0.2) * z, rel=1e-10)


def test_a_run_with_the_posterior_is_the_first_order_of_the_mr_sampler() -> None:
    """With the same network and the same noises, up to rounding."""
    pipeline = load_model("digits-restore", "float32", "cpu").pipeline
    assert isinstance(pipeline, RestorationPipeline)
    degraded = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    found = restore(pipeline, posterior_step, degraded, 6, generators())
    pipeline.scheduler = MRSamplerScheduler.from_config(pipeline.scheduler.config, solver="sde-dpm++1")
    expected = pipeline(degraded, 6, generators(), output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(restore(pipeline, euler_step, degraded, 6, generators()), expected, atol=1e-2)


def test_other_predictions_are_refused() -> None:
    pipeline = load_model("digits-restore", "float32", "cpu").pipeline
    pipeline.scheduler = MRSamplerScheduler()
    with pytest.raises(ValueError, match="model predicts epsilon; the reverse SDE is measured on v_prediction"):
        restore(pipeline, euler_step, torch.zeros(1, 1, 32, 32), 1, [torch.Generator()])
