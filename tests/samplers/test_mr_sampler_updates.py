"""The MR Sampler's updates: the formulas of the paper, the released code's coefficients, and their orders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mean_reverting import FORMS, RELEASED, SIGMA_INF, gaussian_end, gaussian_noise, mr_sampler, nodes, run, tensor


def paper_step(
    form: str,
    x: torch.Tensor,
    mu: torch.Tensor,
    s: tuple[float, float],
    t: tuple[float, float],
    outputs: list[tuple[torch.Tensor, float]],
    z: torch.Tensor,
    third: float,
) -> torch.Tensor:
    """The updates of arXiv 2502.07856 as printed, in ``x``: newest output first, each with its lambda."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = s, t
    h = math.log(alpha_t / sigma_t) - math.log(alpha_s / sigma_s)
    q0 = outputs[0][0]
    d1 = d2 = torch.zeros_like(x)
    if len(outputs) > 1:
        r = (outputs[0][1] - outputs[1][1]) / h
        d1 = d1_0 = (q0 - outputs[1][0]) / r
        if len(outputs) > 2:
            r1 = (outputs[1][1] - outputs[2][1]) / h
            d1_1 = (outputs[1][0] - outputs[2][0]) / r1
            d1, d2 = d1_0 + (d1_0 - d1_1) * r / (r + r1), (d1_0 - d1_1) / (r + r1)
    if form == "ode-d":
        p1 = math.exp(-h) - 1
        p2 = p1 / h + 1
        p3 = p2 / h - 0.5
        ratio = sigma_t / sigma_s
        drift = p1 * q0 - p2 * d1 + third * p3 * d2
        return ratio * x + (1 - ratio + ratio * alpha_s - alpha_t) * mu - alpha_t * drift
    if form == "ode-n":
        p1 = math.exp(h) - 1
        p2 = p1 / h - 1
        p3 = p2 / h - 0.5
        ratio = alpha_t / alpha_s
        return ratio * x + (1 - ratio) * mu - sigma_t * (p1 * q0 + p2 * d1 + third * p3 * d2)
    assert len(outputs) < 3
    if form == "sde-d":
        gain = 1 - math.exp(-2 * h)
        decay = alpha_t / alpha_s * math.exp(-2 * h)
        drift = alpha_t * (gain * q0 + (1 - gain / (2 * h)) * d1)
        return decay * x + (1 - decay - alpha_t * gain) * mu + drift + sigma_t * math.sqrt(gain) * z
    ratio, growth = alpha_t / alpha_s, math.exp(h) - 1
    drift = 2 * sigma_t * (growth * q0 + (growth / h - 1) * d1)
    return ratio * x + (1 - ratio) * mu - drift + sigma_t * math.sqrt(math.exp(2 * h) - 1) * z


def converted(
    prediction_type: str, output: torch.Tensor, x: torch.Tensor, mu: torch.Tensor, alpha: float, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean image and noise of a network's output, as the paper converts them."""
    w = sigma / SIGMA_INF
    if prediction_type == "epsilon":
        return (x - mu - sigma * output) / alpha + mu, output
    if prediction_type == "sample":
        return output, (x - mu - alpha * (output - mu)) / sigma
    clean = alpha * x - w * output + (1 - alpha) * mu
    return clean, (alpha * output + w * (x - mu)) / SIGMA_INF


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("form", "order", "third"),
    [
        *((form, order, 2.0) for form in FORMS for order in (1, 2)),
        ("ode-d", 3, 2.0),
        ("ode-n", 3, 2.0),
        ("ode-d", 3, 1.0),
        ("ode-n", 3, 1.0),
    ],
)
def test_the_update_formulas_of_the_paper(form: str, order: int, third: float, prediction_type: str) -> None:
    """Every step of a run. A factor of 1 before the second derivative is the released code's third order."""
    options = {"diffusers_third_order": third == 1.0}
    scheduler = mr_sampler(form, order, prediction_type=prediction_type, solver_options=options, **RELEASED)
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(0)
    mu, x, *noises = torch.randn(14, 2, 3, 4, generator=generator, dtype=torch.float64)
    scheduler.set_condition(mu)
    ends, history = nodes(scheduler), list[tuple[torch.Tensor, float]]()
    for i, (t, z) in enumerate(zip(scheduler.timesteps, noises, strict=True)):
        alpha, sigma = ends[i]
        output = torch.sin(3 * x) * 0.3 + mu / 2
        clean, eps = converted(prediction_type, output, x, mu, alpha, sigma)
        history.insert(0, (clean if form.endswith("d") else eps, math.log(alpha / sigma)))
        expected = paper_step(form, x, mu, ends[i], ends[i + 1], history[:order], z, third)
        result = scheduler.step(output, t, x, variance_noise=z)
        assert not isinstance(result, tuple)
        torch.testing.assert_close(result.prev_sample, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(result.pred_original_sample, clean, rtol=1e-9, atol=1e-9)
        x = expected


COEFFICIENTS = [
    # h; ODE-d: x, q0, D1, mu; SDE-d: x, q0, D1, z, mu
    (2.01415, (0.999311, 0.032450, 0.021335, -0.031761), (0.133341, 0.036779, 0.028316, 0.194189, 0.829879)),
    (1.67070, (0.981420, 0.158611, 0.100425, -0.140031), (0.184620, 0.188448, 0.138963, 0.188867, 0.626933)),
    (1.24543, (0.838427, 0.405299, 0.243665, -0.243726), (0.241315, 0.521952, 0.359548, 0.154407, 0.236734)),
    (1.19480, (0.487414, 0.638786, 0.381531, -0.126200), (0.147572, 0.832189, 0.567916, 0.074897, 0.020239)),
    (3.65542, (0.028214, 0.974087, 0.733459, -0.002301), (0.000729, 0.999268, 0.863253, 0.002216, 0.000003)),
]


@pytest.mark.parametrize("i", range(5))
def test_the_coefficients_of_a_released_run_of_five_steps(i: int) -> None:
    for form, (x, q0, d1, *z, mu) in (("ode-d", COEFFICIENTS[i][1]), ("sde-d", COEFFICIENTS[i][2])):
        scheduler = mr_sampler(form, prediction_type="sample", **RELEASED)
        scheduler.set_timesteps(5)
        # Three samples hold the unit vectors of sample, output and condition; the fourth the noise alone.
        sample, output, condition, noise = torch.eye(4, dtype=torch.float64).view(4, 4, 1, 1, 1)
        scheduler.set_condition(condition)
        scheduler.set_begin_index(i)
        t = scheduler.timesteps[i]
        found = scheduler.step(output, t, sample, variance_noise=noise, return_dict=False)[0].flatten()
        assert found.tolist() == pytest.approx([x, q0, mu, *(z or [0.0])], abs=1.5e-6)
        if i == 0:
            continue
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(i - 1)
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        scheduler.set_condition(zero)
        scheduler.step(zero + 1.0, scheduler.timesteps[i - 1], zero, variance_noise=zero)
        older = scheduler.step(zero, t, zero, variance_noise=zero, return_dict=False)[0].item()
        assert -older * COEFFICIENTS[i - 1][0] / COEFFICIENTS[i][0] == pytest.approx(d1, abs=1e-5)


@pytest.mark.parametrize(
    ("form", "order", "expected"),
    [
        ("ode-d", 1, (0.703234, 0.705601, 0.707615, 0.708926, 0.709396)),
        ("ode-n", 1, (0.703234, 0.705601, 0.707615, 0.708926, 0.709396)),
        ("ode-d", 2, (0.706668, 0.710938, 0.712064, 0.710644, 0.710082)),
        ("ode-n", 2, (0.704271, 0.707578, 0.709580, 0.709935, 0.709912)),
    ],
)
def test_the_golden_runs_on_a_gaussian(form: str, order: int, expected: tuple[float, ...]) -> None:
    """Clean images from N(0.7, 0.02^2), a condition of 0.4; the exact end is 0.709888."""
    for steps, value in zip((5, 10, 20, 50, 100), expected, strict=True):
        scheduler = mr_sampler(form, order, **RELEASED)
        scheduler.set_timesteps(steps)
        start = scheduler.set_condition(tensor(0.4)).prior_sample(tensor(0.5))
        found = run(scheduler, gaussian_noise(0.4), tensor(0.4), start)
        assert found.item() == pytest.approx(value, abs=2e-6)
    ends = nodes(scheduler)
    assert gaussian_end(start, ends[0], ends[-1], 0.4).item() == pytest.approx(0.709888, abs=2e-6)


@pytest.mark.parametrize(
    ("form", "halved", "expected"),
    [("ode-d", False, 3.0), ("ode-n", False, 3.0), ("ode-d", True, 2.0), ("ode-n", True, 2.0)],
)
def test_the_third_order_is_one(form: str, halved: bool, expected: float) -> None:
    """The released code halves the second derivative, which costs an order."""
    errors = []
    for steps in (160, 320):
        scheduler = mr_sampler(form, 3, solver_options={"diffusers_third_order": halved})
        levels = np.geomspace(20.0, 0.1, steps + 1)
        # The last call, from 0.1 to clean, is left out.
        scheduler.set_timesteps(sigmas=[*levels, 0.0])
        found = run(scheduler, gaussian_noise(0.4), tensor(0.4), tensor(0.5), calls=steps)
        ends = nodes(scheduler)
        errors.append(abs((found - gaussian_end(tensor(0.5), ends[0], ends[steps], 0.4)).item()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.3)
