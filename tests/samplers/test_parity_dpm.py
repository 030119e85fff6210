"""Same options, same images as diffusers' DPM-Solver classes."""

from __future__ import annotations

from itertools import product

import pytest

from analytic import EDM, STABLE_DIFFUSION
from comparison import (
    BOOL,
    PREDICTIONS,
    SPACINGS,
    STEPS,
    UNIFORM,
    Comparison,
    TheirDPM,
    TheirEDM,
    TheirSinglestep,
)
from fewstep.samplers import DPMSolverPPScheduler

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
COSINE = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}


# Respaced runs to sigma_min are compared in test_respaced_runs_to_sigma_min_save_a_call, and the noise forms do not
# go to zero in diffusers; it has no third order of the noise form of the SDE.
MULTISTEP = [
    (algorithm, order, spacing)
    for algorithm, order, spacing in product(ALGORITHMS, (1, 2, 3), SPACINGS)
    if (spacing in UNIFORM or "++" in algorithm) and (algorithm, order) != ("sde-dpmsolver", 3)
]
SINGLESTEP = [
    (algorithm, order, spacing)
    for algorithm, order, spacing in product(ALGORITHMS[:3], (1, 2, 3), ("linspace", "karras", "exponential", "beta"))
    if spacing in UNIFORM or "++" in algorithm
]


def endings(algorithm: str, spacing: str) -> list[str]:
    """Values of ``final_sigmas_type`` that diffusers and we have in common."""
    return (["zero"] if "++" in algorithm else []) + (["sigma_min"] if spacing in UNIFORM else [])


@pytest.mark.parametrize(("algorithm", "order", "spacing"), MULTISTEP)
def test_dpm_multistep(algorithm, order, spacing):
    comparison = Comparison()
    for forms, kind, lower, euler, final in product(
        ("midpoint", "heun") if order == 2 else ("midpoint",), PREDICTIONS, BOOL, BOOL, endings(algorithm, spacing)
    ):
        options = {
            **STABLE_DIFFUSION,
            **SPACINGS[spacing],
            "prediction_type": kind,
            "solver_order": order,
            "solver_type": forms,
            "algorithm_type": algorithm,
            "lower_order_final": lower,
            "euler_at_final": euler,
            "final_sigmas_type": final,
        }
        theirs = TheirDPM(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        for steps in STEPS:
            comparison.images(theirs, ours, (forms, kind, lower, euler, final), num_inference_steps=steps)
    comparison.report(1)


@pytest.mark.parametrize(("algorithm", "order", "spacing"), SINGLESTEP)
def test_dpm_singlestep(algorithm, order, spacing):
    comparison = Comparison()
    for form, kind, lower, final, steps in product(
        ("midpoint", "heun"), PREDICTIONS, BOOL, endings(algorithm, spacing), STEPS
    ):
        options = {
            **STABLE_DIFFUSION,
            **SPACINGS[spacing],
            "prediction_type": kind,
            "solver_order": order,
            "solver_type": form,
            "algorithm_type": algorithm,
            "lower_order_final": lower,
            "final_sigmas_type": final,
        }
        # A new one each time: set_timesteps changes the config of diffusers' class.
        theirs = TheirSinglestep(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, method="singlestep", diffusers_third_order=True)
        comparison.images(theirs, ours, (form, kind, lower, final), num_inference_steps=steps)
    comparison.report(1)


@pytest.mark.parametrize("method", ["multistep", "singlestep"])
def test_dpm_cosine_with_clipped_lambda(method):
    comparison = Comparison()
    spacings = ("linspace",) if method == "singlestep" else UNIFORM
    for spacing, order, kind, bound, steps in product(
        spacings, (1, 2), ("epsilon", "v_prediction"), (-5.1, -2.0, 0.5), STEPS
    ):
        options = {
            **COSINE,
            **SPACINGS[spacing],
            "lambda_min_clipped": bound,
            "solver_order": order,
            "prediction_type": kind,
            "lower_order_final": True,
        }
        theirs = (TheirSinglestep if method == "singlestep" else TheirDPM)(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, method=method)
        theirs.set_timesteps(steps)
        if len(theirs.timesteps) < steps:
            continue  # see test_trailing_with_clipped_lambda_takes_all_steps
        comparison.images(theirs, ours, (spacing, order, kind, bound), num_inference_steps=steps)
    comparison.report(1)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("algorithm", "order"),
    # diffusers' EDM class has no third order of the SDE.
    [("dpmsolver++", 1), ("dpmsolver++", 2), ("dpmsolver++", 3), ("sde-dpmsolver++", 1), ("sde-dpmsolver++", 2)],
)
def test_edm(algorithm, order, spacing):
    comparison = Comparison()
    for form, kind, lower, euler, rho in product(
        ("midpoint", "heun") if order == 2 else ("midpoint",), ("epsilon", "v_prediction"), BOOL, BOOL, (7.0, 5.0)
    ):
        options = {
            **EDM,
            "sigma_schedule": spacing,
            "rho": rho,
            "prediction_type": kind,
            "solver_order": order,
            "solver_type": form,
            "algorithm_type": algorithm,
            "lower_order_final": lower,
            "euler_at_final": euler,
        }
        theirs = TheirEDM(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        # One step of its exponential levels begins at sigma_min: see test_edm_exponential_single_step.
        for steps in STEPS[spacing == "exponential" :]:
            comparison.images(theirs, ours, (form, kind, lower, euler, rho), num_inference_steps=steps)
    comparison.report(1)


def test_edm_thresholding():
    comparison = Comparison()
    for limit, ratio, steps in product((1.0, 1.2), (0.995, 0.7), STEPS):
        theirs = TheirEDM(**EDM, thresholding=True, sample_max_value=limit, dynamic_thresholding_ratio=ratio)
        ours = DPMSolverPPScheduler.from_config(theirs.config)
        comparison.images(theirs, ours, (limit, ratio), num_inference_steps=steps)
    comparison.report(20)
