"""Orders of convergence of every registered sampler, in float64, where the exact trajectory is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fewstep.samplers import SAMPLERS, PlanScheduler
from fewstep.scripts.bench import convergence, orders

STEPS = (96, 192, 384)
"""Multiples of 6: singlestep samplers of order 2 and 3 have whole groups."""

EXACT: dict[bool, convergence.Problem] = {False: convergence.MixtureFlow(), True: convergence.SineDrift()}
"""The probability flow of a Gaussian mixture, and for stochastic samplers the drift of the reverse SDE."""

# Flow levels, so that the run begins and ends at a finite half log-SNR; at equal steps some errors cancel.
CONFIG: dict[str, Any] = {
    "num_train_timesteps": 8,
    "use_flow_sigmas": True,
    "prediction_type": "sample",
    "final_sigmas_type": "sigma_min",
}


def built(name: str, ramp: int) -> PlanScheduler:
    """A sampler without final steps of lower order and without correctors of what the test puts in exactly."""
    sampler = SAMPLERS[name]
    scheduler = sampler.build(CONFIG)
    own = {"lower_order_final": False, "disable_corrector": list(range(ramp))}
    return sampler.build(CONFIG, **{key: value for key, value in own.items() if key in scheduler.config})


def error(name: str, steps: int) -> float:
    """The largest error over all start points; results of the first steps are the exact ones from order 3 on."""
    sampler = SAMPLERS[name]
    problem = EXACT[sampler.stochastic]
    one_step = built(name, 0).order > 1 or sampler.options.get("method") == "singlestep"
    ramp = sampler.order - 1 if sampler.order > 2 and not one_step else 0
    scheduler = built(name, ramp)
    scheduler.set_timesteps(sigmas=convergence.grid(steps))
    x = problem.start
    for k, call in enumerate(scheduler.plan):
        u = problem.clean(x, call.alpha, call.sigma)
        x = scheduler.step(u, scheduler.timesteps[k], x, variance_noise=torch.zeros_like(x), return_dict=False)[0]
        if k < ramp:
            x = problem.exact(steps, k + 1)
    return float((x - problem.exact(steps, steps)).abs().max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_order(name):
    """Within a quarter of what the registry states, over the last two doublings."""
    errors = [error(name, steps) for steps in STEPS]
    measured = math.log2(errors[0] / errors[-1]) / 2
    assert measured == pytest.approx(SAMPLERS[name].order, abs=0.25), errors


def test_the_exact_solution_solves_the_probability_flow():
    """``d (x / alpha) / d (sigma / alpha)`` is the noise prediction: the reference by central differences."""
    problem = EXACT[False]
    levels = convergence.grid(768)
    for k in (100, 400, 700):
        (before, x, after), s = (problem.exact(768, i) for i in (k - 1, k, k + 1)), levels[k - 1 : k + 2]
        alpha, sigma = 1.0 - s, s
        rho = sigma / alpha
        noise = (x - alpha[1] * problem.clean(x, alpha[1], sigma[1])) / sigma[1]
        # Of second order on uneven nodes: the slopes of both sides, weighted with the other side's width.
        left, right = rho[1] - rho[0], rho[2] - rho[1]
        slopes = [(x / alpha[1] - before / alpha[0]) / left, (after / alpha[2] - x / alpha[1]) / right]
        slope = (right * slopes[0] + left * slopes[1]) / (left + right)
        torch.testing.assert_close(slope, noise, rtol=0, atol=1e-4)


def test_without_exact_starting_values_the_first_step_limits_the_order():
    """Euler's first step adds an error of second order: what the exact values above are for."""
    ours = dict(orders.measured_orders("dpm++3m", steps=STEPS).errors)
    started = dict(orders.measured_orders("dpm++3m", steps=STEPS, exact_start=False).errors)
    added = [started[steps] - ours[steps] for steps in STEPS]
    assert math.log2(added[0] / added[-1]) / 2 == pytest.approx(2.0, abs=0.25)
