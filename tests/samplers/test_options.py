"""Options that have no meaning are refused with words that help; names of other classes are understood."""

from __future__ import annotations

import re

import pytest

from analytic import EDM, STABLE_DIFFUSION
from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, UniPCScheduler


@pytest.mark.parametrize(
    ("scheduler_class", "options", "words"),
    [
        (DPMSolverPPScheduler, {"solver_order": 4}, ["solver_order", "4"]),
        (DPMSolverPPScheduler, {"solver_order": 0}, ["solver_order", "0"]),
        (DPMSolverPPScheduler, {"algorithm_type": "euler"}, ["algorithm_type", "euler", "dpmsolver++"]),
        (DPMSolverPPScheduler, {"solver_type": "rk"}, ["solver_type", "rk", "midpoint"]),
        (DPMSolverPPScheduler, {"method": "adaptive"}, ["method", "adaptive", "multistep"]),
        (
            DPMSolverPPScheduler,
            {"method": "singlestep", "algorithm_type": "sde-dpmsolver"},
            ["sde-dpmsolver", "singlestep", "multistep"],
        ),
        (DPMSolverPPScheduler, {"denoise_to_zero": True}, ["denoise_to_zero", "sigma_min"]),
        (DPMSolverPPScheduler, {"final_sigmas_type": "one"}, ["final_sigmas_type", "one", "zero"]),
        (DPMSolverPPScheduler, {"timestep_spacing": "log"}, ["timestep_spacing", "log", "trailing"]),
        (DPMSolverPPScheduler, {"prediction_type": "score"}, ["prediction_type", "score", "epsilon"]),
        (DPMSolverPPScheduler, {"use_karras_sigmas": True, "use_beta_sigmas": True}, ["karras", "beta", "False"]),
        (DPMSolverPPScheduler, {"use_lu_lambdas": True, "use_beta_sigmas": True}, ["lu", "beta", "False"]),
        (DPMSolverPPScheduler, {"beta_schedule": "cubic"}, ["beta_schedule", "cubic", "linear"]),
        (DPMSolverPPScheduler, {"trained_betas": [0.1, 0.2]}, ["trained_betas", "2", "1000"]),
        (DPMSolverPPScheduler, {"thresholding": True, "sample_max_value": 0.5}, ["sample_max_value", "0.5", "1"]),
        (
            DPMSolverPPScheduler,
            {"thresholding": True, "dynamic_thresholding_ratio": 1.5},
            ["dynamic_thresholding_ratio", "1.5"],
        ),
        (DPMSolverPPScheduler, {**EDM, "prediction_type": "sample"}, ["prediction_type", "sample", "EDM"]),
        (DPMSolverPPScheduler, {"sigma_data": -1.0}, ["sigma_data", "-1"]),
        (DPMSolverPPScheduler, {**EDM, "sigma_schedule": "lu"}, ["sigma_schedule", "lu", "karras"]),
        (DPMSolverPPScheduler, {"preset": "best"}, ["preset", "best", "accurate"]),
        (DEISScheduler, {"solver_order": 5}, ["solver_order", "5"]),
        (DEISScheduler, {"solver_order": 1, "solver_type": "rhork"}, ["solver_order", "1", "rhork", "2"]),
        (DEISScheduler, {"solver_type": "spline"}, ["solver_type", "spline", "tab"]),
        (DEISScheduler, {"algorithm_type": "sde-dpmsolver++"}, ["algorithm_type", "sde-dpmsolver++", "deis"]),
        (UniPCScheduler, {"solver_order": 5}, ["solver_order", "5"]),
        (UniPCScheduler, {"solver_type": "bh3"}, ["solver_type", "bh3", "bh1"]),
        (UniPCScheduler, {"corrector_form": "both"}, ["corrector_form", "both", "delta"]),
        (UniPCScheduler, {"solver_p": "heun"}, ["solver_p", "heun", "dpm++"]),
        (UniPCScheduler, {"solver_p": "dpm++2s"}, ["solver_p", "dpm++2s", "dpm++"]),
        (UniPCScheduler, {"solver_p": "sde-dpm++"}, ["solver_p", "sde-dpm++", "dpm++"]),
    ],
)
def test_impossible_options_are_refused_at_construction(scheduler_class, options, words):
    with pytest.raises(ValueError, match=r".+") as caught:
        scheduler_class(**options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


@pytest.mark.parametrize("scheduler_class", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
def test_foreign_values_are_mapped(scheduler_class):
    for form in ("midpoint", "heun", "logrho", "bh1", "bh2"):
        scheduler_class(solver_type=form).set_timesteps(3)
    if scheduler_class is not UniPCScheduler:
        for algorithm in ("dpmsolver", "dpmsolver++", "deis", "data_prediction", "noise_prediction"):
            scheduler_class(algorithm_type=algorithm).set_timesteps(3)


def test_misspelt_options_are_told() -> None:
    said = "DPMSolverPPScheduler has no option 'algorithm_typ'; did you mean algorithm_type?"
    with pytest.raises(TypeError, match=re.escape(said)):
        DPMSolverPPScheduler(algorithm_typ="sde-dpmsolver++")
    with pytest.raises(TypeError, match=re.escape(said)):
        DPMSolverPPScheduler.from_config(STABLE_DIFFUSION, algorithm_typ="sde-dpmsolver++")
    with pytest.raises(TypeError, match="no option 'steps'; see its docstring"):
        DPMSolverPPScheduler(steps=5)
    # What other schedulers have is left out, as diffusers does.
    assert DPMSolverPPScheduler.from_config(STABLE_DIFFUSION, lambda_min_clipped=-5.1).config.solver_order == 2
