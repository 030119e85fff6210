"""Same options, same images as diffusers' DEIS and UniPC; schedules and thresholding in all families."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from analytic import STABLE_DIFFUSION, sample
from comparison import (
    BOOL,
    PREDICTIONS,
    SPACINGS,
    STEPS,
    UNIFORM,
    Comparison,
    TheirDEIS,
    TheirDPM,
    TheirSinglestep,
    TheirUniPC,
    noise,
)
from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, UniPCScheduler


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", UNIFORM)
def test_deis(spacing, order):
    comparison = Comparison()
    for kind, lower in product(PREDICTIONS, BOOL):
        options = {**STABLE_DIFFUSION, **SPACINGS[spacing], "prediction_type": kind, "lower_order_final": lower}
        theirs = TheirDEIS(**options, solver_order=order)
        ours = DEISScheduler.from_config(theirs.config)
        for steps in STEPS:
            comparison.images(theirs, ours, (kind, lower), num_inference_steps=steps)
    comparison.report(1)


# With bh1 diffusers cannot go to zero, and respaced runs to sigma_min differ on purpose.
UNIPC = [
    (spacing, order, form)
    for spacing, order, form in product([key for key in SPACINGS if key != "lu"], (1, 2, 3, 4), ("bh1", "bh2"))
    if spacing in UNIFORM or form == "bh2"
]


@pytest.mark.parametrize(("spacing", "order", "form"), UNIPC)
def test_unipc(spacing, order, form):
    comparison = Comparison()
    for kind, data, final, lower, disabled in product(PREDICTIONS, BOOL, ("zero", "sigma_min"), BOOL, ([], [0, 3, 4])):
        if final == "zero" and (form == "bh1" or not data or not lower):
            continue  # NaN or inf in diffusers: see test_unipc_runs_to_zero_that_diffusers_cannot_do
        if final == "sigma_min" and spacing not in UNIFORM:
            continue
        options = {
            **STABLE_DIFFUSION,
            **SPACINGS[spacing],
            "prediction_type": kind,
            "solver_order": order,
            "solver_type": form,
            "predict_x0": data,
            "final_sigmas_type": final,
            "lower_order_final": lower,
            "disable_corrector": disabled,
        }
        theirs = TheirUniPC(**options)
        ours = UniPCScheduler.from_config(theirs.config)
        for steps in STEPS:
            comparison.images(theirs, ours, (kind, data, final, lower, disabled), num_inference_steps=steps)
    comparison.report(1)


PREDICTORS: list[tuple[str, int, str, str]] = [
    ("ddim", 1, "midpoint", "dpmsolver++"),
    ("dpm++", 2, "midpoint", "dpmsolver++"),
    ("dpm++-heun", 2, "heun", "dpmsolver++"),
    ("dpm", 2, "midpoint", "dpmsolver"),
]


@pytest.mark.parametrize("corrector_order", [1, 2, 3])
@pytest.mark.parametrize(("name", "order", "form", "algorithm"), PREDICTORS)
def test_unipc_over_another_predictor(name, order, form, algorithm, corrector_order):
    """Where the other solver's prediction is the network's output; see test_unipc_predictors_share_a_prediction."""
    comparison = Comparison()
    data = algorithm == "dpmsolver++"
    for final, steps in product(("zero", "sigma_min") if data else ("sigma_min",), STEPS):
        options = {
            **STABLE_DIFFUSION,
            "prediction_type": "sample" if data else "epsilon",
            "final_sigmas_type": final,
        }
        predictor = TheirDPM(**options, solver_order=order, solver_type=form, algorithm_type=algorithm)
        theirs = TheirUniPC(**options, solver_order=corrector_order, predict_x0=data, solver_p=predictor)
        ours = UniPCScheduler(**options, solver_order=corrector_order, predict_x0=data, solver_p=name)
        comparison.images(theirs, ours, final, num_inference_steps=steps)
    comparison.report(1)


@pytest.mark.parametrize(
    ("schedule", "total"),
    [
        ({"beta_schedule": "linear"}, 1000),
        ({"beta_schedule": "squaredcos_cap_v2"}, 1000),
        ({"trained_betas": [0.01 + 0.002 * k for k in range(100)]}, 100),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.0085, "beta_end": 0.12}, 120),
    ],
)
def test_noise_schedules(schedule, total):
    comparison = Comparison()
    kinds = ("v_prediction", "sample") if schedule == {"beta_schedule": "squaredcos_cap_v2"} else PREDICTIONS
    for spacing, kind, steps in product(UNIFORM, kinds, STEPS):
        options = {**schedule, **SPACINGS[spacing], "num_train_timesteps": total, "prediction_type": kind}
        for their_class, our_class in (
            (TheirDPM, DPMSolverPPScheduler),
            (TheirUniPC, UniPCScheduler),
            (TheirDEIS, DEISScheduler),
        ):
            theirs = their_class(**options)
            ours = our_class.from_config(theirs.config)
            assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
            comparison.images(theirs, ours, (spacing, kind, our_class.__name__), num_inference_steps=steps)
    comparison.report(1)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "exponential"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr(kind, spacing):
    comparison = Comparison()
    for order, algorithm, steps in product((1, 2, 3), ("dpmsolver++", "sde-dpmsolver++"), STEPS):
        options = {
            **STABLE_DIFFUSION,
            "rescale_betas_zero_snr": True,
            "prediction_type": kind,
            "timestep_spacing": "linspace",
            **SPACINGS[spacing],
            "solver_order": order,
        }
        theirs = TheirDPM(**options, algorithm_type=algorithm)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        comparison.images(theirs, ours, (order, algorithm), num_inference_steps=steps)
        unipc = TheirUniPC(**options)
        comparison.images(unipc, UniPCScheduler.from_config(unipc.config), order, num_inference_steps=steps)
    comparison.report(1)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])
def test_dynamic_thresholding(algorithm):
    comparison = Comparison()
    final = "zero" if "++" in algorithm else "sigma_min"
    for ratio, limit, kind, steps in product((0.995, 0.7), (1.0, 1.2, 10.0), PREDICTIONS, STEPS):
        options = {
            **STABLE_DIFFUSION,
            "prediction_type": kind,
            "thresholding": True,
            "dynamic_thresholding_ratio": ratio,
            "sample_max_value": limit,
        }
        theirs = TheirDPM(**options, algorithm_type=algorithm, final_sigmas_type=final)
        ours = DPMSolverPPScheduler.from_config(theirs.config)
        case = (ratio, limit, kind)
        comparison.images(theirs, ours, case, num_inference_steps=steps)
        if steps == 8:
            plain = DPMSolverPPScheduler.from_config(theirs.config, thresholding=False)
            plain.set_timesteps(steps)
            seed = 3 if "sde" in algorithm else None
            ours.set_timesteps(steps)
            unclipped, clipped = (sample(s, noise(), seed=seed) for s in (plain, ours))
            assert (unclipped - clipped).abs().max() > 0.01, "the thresholds were never reached"
        if algorithm == "dpmsolver++":
            single = TheirSinglestep(**options, lower_order_final=True)
            ours = DPMSolverPPScheduler.from_config(single.config, method="singlestep")
            comparison.images(single, ours, case, num_inference_steps=steps)
            for their_class, our_class in ((TheirUniPC, UniPCScheduler), (TheirDEIS, DEISScheduler)):
                theirs = their_class(**options)
                comparison.images(theirs, our_class.from_config(theirs.config), case, num_inference_steps=steps)
    comparison.report(1)
