"""Times that cannot be run are refused, and the error names the argument, the value and what to do."""

from __future__ import annotations

import math

import pytest
import torch

from analytic import EDM, FLOW, STABLE_DIFFUSION
from fewstep.samplers import DPMSolverPPScheduler, UniPCScheduler


@pytest.mark.parametrize(
    ("options", "times", "words"),
    [
        ({}, {}, ["num_inference_steps", "timesteps", "sigmas"]),
        ({}, {"num_inference_steps": 0}, ["num_inference_steps", "0"]),
        ({}, {"num_inference_steps": -3}, ["num_inference_steps", "-3"]),
        ({}, {"num_inference_steps": 1001}, ["1001", "fewer"]),
        ({"timestep_spacing": "leading"}, {"num_inference_steps": 1000}, ["num_inference_steps", "1000", "leading"]),
        ({"timestep_spacing": "leading", "steps_offset": 900}, {"num_inference_steps": 5}, ["steps_offset", "900"]),
        ({"timestep_spacing": "trailing"}, {"num_inference_steps": 1001}, ["num_inference_steps", "1001", "1000"]),
        ({"lambda_min_clipped": 9.0}, {"num_inference_steps": 5}, ["lambda_min_clipped", "9"]),
        ({"use_karras_sigmas": True, "sigma_min": 5.0, "sigma_max": 1.0}, {"num_inference_steps": 5}, ["sigma_min"]),
        ({"use_karras_sigmas": True}, {"timesteps": [900, 100]}, ["timesteps", "use_karras_sigmas"]),
        ({}, {"timesteps": []}, ["timesteps", "at least one"]),
        ({}, {"timesteps": [[900, 100]]}, ["timesteps"]),
        ({}, {"timesteps": ["late"]}, ["timesteps", "late"]),
        ({}, {"timesteps": [1000, 10]}, ["timesteps", "999", "1000"]),
        ({}, {"timesteps": [10, -1]}, ["timesteps", "-1"]),
        ({}, {"timesteps": [900, float("nan")]}, ["timesteps", "nan"]),
        ({}, {"timesteps": [100, 900]}, ["decrease", "timesteps"]),
        ({}, {"timesteps": [900, 900, 100]}, ["decrease"]),
        ({}, {"sigmas": []}, ["sigmas", "at least one"]),
        ({}, {"sigmas": [1.0, 5.0]}, ["sigmas", "decrease"]),
        ({}, {"sigmas": [5.0, -1.0]}, ["sigmas", "negative"]),
        ({}, {"sigmas": [float("inf"), 1.0]}, ["sigmas", "finite"]),
        ({}, {"sigmas": [5.0, float("nan")]}, ["sigmas", "finite"]),
        ({}, {"sigmas": [5.0, 0.0, 0.0]}, ["sigmas", "decrease"]),
        ({}, {"sigmas": [0.0]}, ["sigmas"]),
        (FLOW, {"sigmas": [1.5, 0.5]}, ["sigmas", "[0, 1]", "1.5"]),
        (FLOW, {"timesteps": [1001, 5]}, ["timesteps", "1000", "1001"]),
        ({**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 5}, ["mu", "use_dynamic_shifting"]),
        ({**FLOW, "flow_shift": -1.0}, {"num_inference_steps": 5}, ["shift", "-1"]),
        (
            {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear"},
            {"num_inference_steps": 5, "mu": -2.0},
            ["shift", "-2"],
        ),
        (
            {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "cubic"},
            {"num_inference_steps": 5, "mu": 1.0},
            ["time_shift_type", "cubic", "exponential"],
        ),
        (
            {**FLOW, "use_dynamic_shifting": True},
            {"num_inference_steps": 5, "mu": 1e9},
            ["mu", "1000000000"],
        ),
        ({**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 5, "mu": math.nan}, ["shift", "nan"]),
        ({"use_karras_sigmas": True, "rho": 0.0}, {"num_inference_steps": 5}, ["rho", "0.0"]),
        ({**EDM, "rho": -1.0}, {"num_inference_steps": 5}, ["rho", "-1"]),
        ({"final_sigmas_type": "sigma_min"}, {"timesteps": [10, 0]}, ["timesteps", "0", "final_sigmas_type"]),
        ({**FLOW, "shift_terminal": 1.5}, {"num_inference_steps": 5}, ["shift_terminal", "1.5"]),
        ({"num_train_timesteps": 1000}, {"num_inference_steps": 2.5}, ["num_inference_steps", "2.5"]),
    ],
)
@pytest.mark.parametrize("scheduler_class", [DPMSolverPPScheduler, UniPCScheduler])
def test_impossible_times_are_refused(scheduler_class, options, times, words):
    with pytest.raises(ValueError, match=r".+") as caught:
        scheduler_class(**options).set_timesteps(**times)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


def test_a_refusal_leaves_no_old_run():
    """A caller who catches the error does not go on with the times of before."""
    scheduler = DPMSolverPPScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(0)
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(5)
    scheduler.step(x, scheduler.timesteps[0], x)
