"""Any solver on mean-reverting diffusion: closed forms, diffusers' schedulers on the residual, and searches."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fewstep.samplers import SAMPLERS, DCSolverScheduler, fine_trajectory, search_ratios
from fewstep.samplers.mean_reverting import MeanRevertingSchedule
from fewstep.samplers.mr_sampler import MRSamplerScheduler
from mean_reverting import SIGMA_INF, gaussian_end, gaussian_noise, mr_sampler, nodes, run, tensor


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
