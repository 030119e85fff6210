"""Mean-reverting diffusion: the tables and update formulas of the MR Sampler's paper, and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import quad

from fewstep.samplers import SAMPLERS, DCSolverScheduler, fine_trajectory, search_ratios
from fewstep.samplers.mean_reverting import MeanRevertingSchedule
from fewstep.samplers.mr_sampler import MRSamplerScheduler

SIGMA_INF = 50 / 255
RELEASED: dict[str, Any] = {"mr_sampler_tables": True, "final_sigmas_type": "sigma_min"}
FORMS = {
    "ode-d": "dpmsolver++",
    "ode-n": "dpmsolver",
    "sde-d": "sde-dpmsolver++",
    "sde-n": "sde-dpmsolver",
}

Network = Callable[[torch.Tensor, float, float], torch.Tensor]
"""The network's output for a sample, alpha and sigma (with sigma_inf in it)."""


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def mr_sampler(form: str = "ode-d", order: int = 2, **options: Any) -> MRSamplerScheduler:
    own = {"algorithm_type": FORMS[form], "solver_order": order, "lower_order_final": False}
    return MRSamplerScheduler(**{**options, "solver_options": {**own, **options.get("solver_options", {})}})


def nodes(scheduler: MRSamplerScheduler) -> list[tuple[float, float]]:
    """alpha and sigma, with sigma_inf in it, at every call and at the end."""
    plan = scheduler.plan
    ends = [(call.alpha, call.sigma) for call in plan] + [(plan.final_alpha, plan.final_sigma)]
    return [(alpha, scheduler.config.sigma_inf * sigma) for alpha, sigma in ends]


def run(
    scheduler: MRSamplerScheduler,
    network: Network,
    mu: torch.Tensor,
    x: torch.Tensor,
    noises: list[torch.Tensor] | None = None,
    calls: int | None = None,
) -> torch.Tensor:
    scheduler.set_condition(mu)
    for i, (t, (alpha, sigma)) in enumerate(zip(scheduler.timesteps[:calls], nodes(scheduler), strict=False)):
        noise = None if noises is None else noises[i]
        x = scheduler.step(network(x, alpha, sigma), t, x, variance_noise=noise, return_dict=False)[0]
    return x


def gaussian_noise(mu: float, mean: float = 0.7, deviation: float = 0.02) -> Network:
    """The exact noise prediction for clean images from a Gaussian."""

    def network(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        return sigma * (x - alpha * mean - (1 - alpha) * mu) / (alpha**2 * deviation**2 + sigma**2)

    return network


def gaussian_end(start: torch.Tensor, first: tuple[float, float], last: tuple[float, float], mu: float) -> torch.Tensor:
    """The exact probability flow for it."""
    means = [alpha * 0.7 + (1 - alpha) * mu for alpha, _ in (first, last)]
    deviations = [math.hypot(alpha * 0.02, sigma) for alpha, sigma in (first, last)]
    return means[1] + deviations[1] / deviations[0] * (start - means[0])


# ---------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("label", "alpha", "sigma", "trained_alpha"),
    [
        (0, 0.999936, 0.002217, 1.0),
        (1, 0.999760, 0.004298, 0.999824),
        (2, 0.999423, 0.006662, 0.999486),
        (10, 0.985302, 0.033494, 0.985365),
        (20, 0.916171, 0.078586, 0.916229),
        (40, 0.569095, 0.161230, 0.569128),
        (60, 0.195361, 0.192300, 0.195370),
        (80, 0.037446, 0.195941, 0.037447),
        (100, 0.005, 0.196076, 0.005),
    ],
)
def test_the_cosine_tables_of_the_released_codes(label: int, alpha: float, sigma: float, trained_alpha: float) -> None:
    """IR-SDE and DA-CLIP train on one table, the MR Sampler samples from another."""
    released, trained = MeanRevertingSchedule(mr_sampler_tables=True), MeanRevertingSchedule()
    found = released.alpha_sigma(released.level(label))
    assert float(found[0]) == pytest.approx(alpha, abs=6e-7)
    assert SIGMA_INF * float(found[1]) == pytest.approx(sigma, abs=6e-7)
    assert float(trained.alpha_sigma(trained.level(label))[0]) == pytest.approx(trained_alpha, abs=6e-7)


def test_constant_and_linear_theta_in_closed_form() -> None:
    labels = np.array([0.0, 1.0, 17.0, 60.5, 100.0])
    constant = MeanRevertingSchedule("constant", final_alpha=0.01)
    np.testing.assert_allclose(constant.alpha_sigma(constant.level(labels))[0], 0.01 ** (labels / 100), rtol=1e-12)
    released = MeanRevertingSchedule("constant", final_alpha=0.01, mr_sampler_tables=True)
    np.testing.assert_allclose(
        released.alpha_sigma(released.level(labels))[0], 0.01 ** ((labels + 1) / 101), rtol=1e-12
    )
    # theta_k = c (1e-4 + k d): its sums over 1..k, at whole labels.
    linear, whole = MeanRevertingSchedule("linear", 50), np.array([0.0, 1.0, 17.0, 50.0])
    integral = whole * 1e-4 + whole * (whole + 1) / 2 * (2e-2 - 1e-4) / 50
    np.testing.assert_allclose(linear.alpha_sigma(linear.level(whole))[0], 0.005 ** (integral / integral[-1]))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_labels_and_levels_are_inverse(name: str, released: bool) -> None:
    schedule = MeanRevertingSchedule(name, mr_sampler_tables=released)
    labels = np.linspace(0.0, 100.0, 333)
    np.testing.assert_allclose(schedule.timestep(schedule.level(labels)), labels, atol=1e-9)
    assert (np.diff(schedule.level(labels)) > 0).all()


@pytest.mark.parametrize("released", [False, True])
def test_integrals_over_time_are_exact_for_polynomials(released: bool) -> None:
    """By parts: int t^k d rho = [t^k rho] - k int t^(k-1) rho dt, whose integrand has no pole at the clean end."""
    schedule = MeanRevertingSchedule(mr_sampler_tables=released)
    lowest = float(schedule.time(0.0))
    for lower, upper in ((60.0, 41.5), (20.0, lowest)):
        t, weights, total = schedule.rho_of_time(lower, upper)
        ends = [float(schedule.level(time)) for time in (lower, upper)]
        assert float(total) == pytest.approx(ends[1] - ends[0], rel=1e-12)
        edges = [upper, *range(math.floor(upper) + 1, math.ceil(lower)), lower]
        for degree in range(1, 5):

            def integrand(v: float, low: float, degree: int = degree) -> float:
                time = low + v * v  # rho begins like this root
                return 2 * v * degree * time ** (degree - 1) * float(schedule.level(time))

            inner = sum(
                quad(integrand, 0.0, math.sqrt(high - low), args=(low,), epsabs=1e-13)[0]
                for low, high in itertools.pairwise(edges)
            )
            expected = upper**degree * ends[1] - lower**degree * ends[0] + inner
            assert float(weights @ t**degree) == pytest.approx(expected, rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------------------------------------- the paper's updates


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


# ---------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("steps", [5, 17, 100])
def test_the_first_order_sde_is_the_strided_posterior(steps: int) -> None:
    """``p(x_t | x_s, x_0)`` of arXiv 2301.11699, with ``A`` over the whole stride rather than one timestep."""
    scheduler = mr_sampler("sde-d", 1, prediction_type="sample")
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    mu, x, clean, z = torch.randn(4, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    scheduler.set_condition(mu)
    ends = nodes(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        (b, _), (c, _) = ends[i], ends[i + 1]
        a = b / c
        mean = mu + a * (1 - c**2) / (1 - b**2) * (x - mu) + c * (1 - a**2) / (1 - b**2) * (clean - mu)
        deviation = SIGMA_INF * math.sqrt((1 - a**2) * (1 - c**2) / (1 - b**2))
        x = scheduler.step(clean, t, x, variance_noise=z, return_dict=False)[0]
        torch.testing.assert_close(x, mean + deviation * z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_at_the_clean_image_that_the_network_knows(name: str) -> None:
    scheduler = MRSamplerScheduler(solver=name, prediction_type="sample", sigma_inf=0.3)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(2)
    mu, clean, noise = torch.rand(3, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    start = scheduler.set_condition(mu).prior_sample(noise)
    noises = [torch.zeros_like(mu)] * len(scheduler.timesteps)
    torch.testing.assert_close(
        run(scheduler, lambda x, alpha, sigma: clean, mu, start, noises), clean, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.stochastic])
def test_every_sampler_follows_the_straight_flow_to_a_known_image(name: str) -> None:
    """``x_t - m_t = sigma_t / sigma_s (x_s - m_s)`` with ``m = alpha x_0 + (1 - alpha) mu``, in any number of steps."""
    scheduler = MRSamplerScheduler(solver=name, prediction_type="sample", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(3)
    mu, clean, start = torch.rand(3, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    found = run(scheduler, lambda x, alpha, sigma: clean, mu, start)
    (alpha_s, sigma_s), *_, (alpha_t, sigma_t) = nodes(scheduler)
    middle = [alpha * clean + (1 - alpha) * mu for alpha in (alpha_s, alpha_t)]
    expected = middle[1] + sigma_t / sigma_s * (start - middle[0])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["unipc3", "dc-solver", "deis-tab3", "dpm++2s", "hb-unipc", "sde-dpm++3m"])
def test_a_constant_added_to_all_images_is_added_to_the_result(name: str) -> None:
    def network(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        return 0.5 * torch.tanh(x - x.mean()) + x.mean()

    generator = torch.Generator().manual_seed(4)
    mu, start, noise = torch.rand(3, 1, 1, 4, 4, generator=generator, dtype=torch.float64)
    results = []
    for shift in (0.0, 5.0):
        scheduler = MRSamplerScheduler(solver=name, prediction_type="sample")
        scheduler.set_timesteps(6)
        noises = [noise] * len(scheduler.timesteps)
        results.append(run(scheduler, network, mu + shift, start + shift, noises) - shift)
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["unipc", "deis", "dpm++3m", "ipndm"])
def test_the_prediction_types_agree(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    mu, start = torch.rand(2, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    results = {}
    for prediction_type in ("epsilon", "sample", "v_prediction"):

        def network(x: torch.Tensor, alpha: float, sigma: float, kind: str = prediction_type) -> torch.Tensor:
            clean = torch.sin(x) + 0.3 * mu
            eps = (x - mu - alpha * (clean - mu)) / sigma
            velocity = SIGMA_INF * alpha * eps - sigma / SIGMA_INF * (clean - mu)
            return {"epsilon": eps, "sample": clean, "v_prediction": velocity}[kind]

        scheduler = MRSamplerScheduler(solver=name, prediction_type=prediction_type)
        scheduler.set_timesteps(8)
        results[prediction_type] = run(scheduler, network, mu, start)
    torch.testing.assert_close(results["sample"], results["epsilon"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(results["v_prediction"], results["epsilon"], rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("unipc", diffusers.UniPCMultistepScheduler, {"final_sigmas_type": "zero"}),
        ("dpm++", diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
        ("dpm++-heun", diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "zero", "solver_type": "heun"}),
        ("deis", diffusers.DEISMultistepScheduler, {}),
    ],
)
def test_the_schedulers_of_diffusers_on_the_residual_give_the_same(name: str, theirs: Any, options: Any) -> None:
    """Their labels 0 to 99 are 1 to 100 here."""
    integral = -np.log(MeanRevertingSchedule().alpha_sigma(MeanRevertingSchedule().level(np.arange(101)))[0])
    betas = 1.0 - np.exp(-2.0 * np.diff(integral))
    reference = theirs(num_train_timesteps=100, trained_betas=betas.tolist(), solver_order=2, **options)
    reference.set_timesteps(10)
    scheduler = MRSamplerScheduler(solver=name, final_sigmas_type=options.get("final_sigmas_type", "sigma_min"))
    scheduler.set_timesteps(sigmas=reference.sigmas[:-1], timesteps=reference.timesteps + 1)
    generator = torch.Generator().manual_seed(6)
    mu, noise = torch.rand(2, 2, 1, 4, 4, generator=generator)
    scheduler.set_condition(mu)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(4 * (x - mu)) * 0.5 + 0.01 * t * (x - mu)

    y, x = noise, scheduler.prior_sample(noise)
    for theirs_t, t in zip(reference.timesteps, scheduler.timesteps, strict=True):
        y = reference.step(network(mu + SIGMA_INF * y, t), theirs_t, y).prev_sample
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, mu + SIGMA_INF * y, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------------------------------------- searches


def test_a_fine_trajectory_of_the_residual_is_the_exact_flow() -> None:
    scheduler = MRSamplerScheduler(final_sigmas_type="sigma_min")
    mu, noise = tensor(0.4, 0.4, 0.4), tensor(-1.0, 0.5, 2.0)
    scheduler.set_timesteps(5)
    start = scheduler.set_condition(mu).prior_sample(noise)
    network, ends = gaussian_noise(0.4), nodes(scheduler)

    def of_label(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = scheduler.schedule.alpha_sigma(scheduler.schedule.level(float(t)))
        return network(x, float(alpha), SIGMA_INF * float(sigma))

    truth = fine_trajectory(*scheduler.on_residual(of_label), noise, steps=800)
    found = mu + SIGMA_INF * truth.at(float(scheduler.sigmas[-1]))
    torch.testing.assert_close(found, gaussian_end(start, ends[0], ends[-1], 0.4), rtol=0, atol=2e-5)


def test_searched_ratios_of_dc_solver_serve_the_images() -> None:
    """The errors that the search states are those of a run over images, in units of ``sigma_inf``."""
    generator = torch.Generator().manual_seed(9)
    mu, noise = torch.rand(2, 6, 1, 2, 2, generator=generator, dtype=torch.float64)

    def network(x: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        return 0.1 * torch.tanh(4 * (x - mu)) + 0.5 * mu

    scheduler = MRSamplerScheduler(solver="dc-dpm++", prediction_type="sample", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(6)
    start = scheduler.set_condition(mu).prior_sample(noise)
    solver, on_residual = scheduler.on_residual(network)
    assert isinstance(solver, DCSolverScheduler)
    truth = fine_trajectory(solver, on_residual, noise)
    found = search_ratios(solver, on_residual, noise, truth=truth)
    exact = mu + SIGMA_INF * truth.samples[-1]
    errors = {}
    for name, ratios in (("plain", None), ("searched", found.ratios)):
        scheduler = MRSamplerScheduler(
            solver="dc-dpm++",
            solver_options={"ratios": ratios},
            prediction_type="sample",
            final_sigmas_type="sigma_min",
        )
        scheduler.set_timesteps(6)
        end = run(scheduler, lambda x, alpha, sigma: network(x, 0.0), mu, start)
        errors[name] = float((end - exact).square().mean().sqrt()) / SIGMA_INF
    assert errors["searched"] == pytest.approx(found.errors[-1], rel=1e-6)
    assert errors["searched"] < 0.5 * errors["plain"]


# ---------------------------------------------------------------------------------------------- the scheduler


def test_the_forward_process_and_its_velocity() -> None:
    scheduler = MRSamplerScheduler()
    generator = torch.Generator().manual_seed(7)
    clean, mu, noise = torch.rand(3, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    scheduler.set_condition(mu)
    alpha = torch.tensor([0.985365, 0.195370], dtype=torch.float64).view(2, 1, 1, 1)
    w = (1 - alpha**2).sqrt()
    labels = torch.tensor([10, 60])
    noised = alpha * clean + (1 - alpha) * mu + SIGMA_INF * w * noise
    torch.testing.assert_close(scheduler.add_noise(clean, noise, labels), noised, rtol=0, atol=3e-6)
    velocity = alpha * SIGMA_INF * noise - w * (clean - mu)
    torch.testing.assert_close(scheduler.get_velocity(clean, noise, labels), velocity, rtol=0, atol=3e-6)
    torch.testing.assert_close(scheduler.prior_sample(noise), mu + SIGMA_INF * noise)


def test_the_times_of_a_run_are_fractions_of_all_labels() -> None:
    scheduler = MRSamplerScheduler()
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == [100.0, 87.5, 75.0, 62.5, 50.0, 37.5, 25.0, 12.5]
    assert scheduler.sigmas[-1] == 0.0
    assert scheduler.sigmas[0] == pytest.approx(math.sqrt(1 - 0.005**2) / 0.005, rel=1e-6)


def test_levels_below_the_released_tables_get_their_first_label() -> None:
    scheduler = MRSamplerScheduler(mr_sampler_tables=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.005, 0.0])
    assert scheduler.timesteps[-1] == 0.0
    assert 0.0 < scheduler.timesteps[0] < 100.0


def test_a_run_begins_at_the_first_call_of_a_step() -> None:
    scheduler = MRSamplerScheduler(solver="deis-rk4")
    assert scheduler.order == 4
    scheduler.set_timesteps(5)
    scheduler.set_condition(tensor(0.4))
    scheduler.set_begin_index(4)
    assert len(scheduler.plan) == len(scheduler.timesteps) - 4
    scheduler.set_begin_index(5)
    with pytest.raises(ValueError, match="begin_index 5 lies inside a step; use the first of its 4 calls"):
        scheduler.step(tensor(0.0), scheduler.timesteps[5], tensor(0.5))


def test_half_precision_comes_back_and_is_computed_in_float32() -> None:
    scheduler = MRSamplerScheduler(prediction_type="sample")
    mu = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(8)).half()
    scheduler.set_condition(mu)
    scheduler.set_timesteps(1)
    result = scheduler.step(mu * 0.5, 100, mu + 0.1)
    assert not isinstance(result, tuple)
    assert result.prev_sample.dtype is result.pred_original_sample.dtype is torch.float16
    torch.testing.assert_close(result.prev_sample, mu * 0.5, rtol=0, atol=6e-4)


def test_a_saved_scheduler_makes_the_same_plan(tmp_path: Any) -> None:
    options = {"solver_order": 3, "solver_type": "bh1"}
    scheduler = MRSamplerScheduler(solver="unipc", solver_options=options, theta_schedule="linear", sigma_inf=0.1)
    scheduler.save_pretrained(tmp_path)
    loaded = MRSamplerScheduler.from_pretrained(tmp_path)
    for each in (scheduler, loaded):
        each.set_timesteps(5)
    assert loaded.plan == scheduler.plan
    assert loaded.config.sigma_inf == 0.1
    plain = MRSamplerScheduler(solver="unipc", theta_schedule="linear", sigma_inf=0.1)
    plain.set_timesteps(5)
    assert plain.plan != scheduler.plan


def test_a_run_without_a_fitting_condition_says_what_to_do() -> None:
    scheduler = MRSamplerScheduler()
    scheduler.set_timesteps(4)
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"mu is missing: .* set_condition\(mu\)"):
        scheduler.step(x, 100, x)
    with pytest.raises(ValueError, match="mu is missing"):
        scheduler.prior_sample(x)
    scheduler.set_condition(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"mu has shape \(1, 1, 4, 4\) and the sample \(2, 1, 4, 4\)"):
        scheduler.step(x, 100, x)
    with pytest.raises(ValueError, match=r"mu is a tensor of torch.uint8; .* scaled to \[0, 1\]"):
        scheduler.set_condition(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="mu is ndarray; pass a floating point tensor"):
        scheduler.set_condition(np.zeros((2, 1, 4, 4)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta_schedule": "quadratic"}, "theta_schedule 'quadratic' is unknown; use one of constant, linear, cosine"),
        ({"sigma_inf": 0.0}, "sigma_inf 0.0 must be positive"),
        ({"final_alpha": 1.0}, "final_alpha 1.0 must lie between 0 and 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0 must be a whole number of at least 2"),
        ({"solver": "heun"}, "solver 'heun' is unknown; use one of unipc"),
        ({"solver_options": {"damping": 0.5}}, "solver_options 'damping' is no option of solver 'dpm\\+\\+-heun'"),
        ({"solver_options": {"solver_order": 4}}, "solver_order 4 must be 1, 2 or 3"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' has no meaning"),
        ({"thresholding": True}, "thresholding True has no meaning"),
        ({"trained_betas": [0.1] * 100}, "trained_betas .*theta_schedule and sigma_inf describe the model"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True has no meaning"),
        ({"preset": "accurate"}, "preset 'accurate' was not measured for MRSamplerScheduler"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MRSamplerScheduler(**options)


def test_the_config_of_another_process_is_refused() -> None:
    config = diffusers.DDIMScheduler(beta_schedule="scaled_linear").config
    with pytest.raises(
        ValueError, match="describes no mean-reverting diffusion; make the scheduler from theta_schedule"
    ):
        MRSamplerScheduler.from_config(config)
    with pytest.raises(ValueError, match="config of UniPCScheduler describes no mean-reverting"):
        MRSamplerScheduler.from_config({"_class_name": "UniPCScheduler", "num_train_timesteps": 1000})
    with pytest.raises(ValueError, match="beta_schedule 'scaled_linear' has no meaning in mean-reverting diffusion"):
        MRSamplerScheduler.from_config({"beta_schedule": "scaled_linear"})
    again = MRSamplerScheduler.from_config(MRSamplerScheduler(theta_schedule="constant").config, sigma_inf=0.2)
    assert (again.config.theta_schedule, again.config.sigma_inf) == ("constant", 0.2)
