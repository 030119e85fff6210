"""Same options, same images as diffusers' classes on rectified flow, up to their integer labels."""

from __future__ import annotations

from itertools import product

import diffusers
import numpy as np
import pytest
import torch

from analytic import FLOW, alpha_sigma, labels
from comparison import BOOL, STEPS, Comparison, TheirDPM, TheirSinglestep, TheirUniPC, noise
from fewstep.samplers import DPMSolverPPScheduler, UniPCScheduler


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_dpm(shift):
    comparison = Comparison()
    for order, algorithm, form, lower, steps in product(
        (1, 2, 3), ("dpmsolver++", "sde-dpmsolver++"), ("midpoint", "heun"), BOOL, STEPS
    ):
        options = {**FLOW, "flow_shift": shift, "solver_order": order, "solver_type": form, "lower_order_final": lower}
        theirs = TheirDPM(**options, algorithm_type=algorithm)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        comparison.images(theirs, ours, ("multi", order, algorithm, form, lower), num_inference_steps=steps)
        single = TheirSinglestep(**options, algorithm_type=algorithm)
        ours = DPMSolverPPScheduler.from_config(single.config, method="singlestep", diffusers_third_order=True)
        comparison.images(single, ours, ("single", order, algorithm, form, lower), num_inference_steps=steps)
    comparison.report(1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_unipc(shift):
    comparison = Comparison()
    for order, terminal, disabled, steps in product((1, 2, 3), (None, 0.1), ([], [0]), STEPS):
        if terminal is not None and steps == 1:
            continue  # diffusers divides 0 by 0
        options = {**FLOW, "flow_shift": shift, "solver_order": order, "shift_terminal": terminal}
        theirs = TheirUniPC(**options, disable_corrector=disabled)
        ours = UniPCScheduler.from_config(theirs.config)
        comparison.images(theirs, ours, (order, terminal, disabled), num_inference_steps=steps)
    comparison.report(1)


@pytest.mark.parametrize("mu", [0.3, 1.15])
def test_flow_dynamic_shift(mu):
    comparison = Comparison()
    options = {**FLOW, "flow_shift": 1.0, "use_dynamic_shifting": True}
    for steps in STEPS:
        for their_class, our_class, own in (
            (TheirDPM, DPMSolverPPScheduler, {}),
            (TheirSinglestep, DPMSolverPPScheduler, {"method": "singlestep"}),
            (TheirUniPC, UniPCScheduler, {}),
        ):
            theirs = their_class(**options)
            ours = our_class.from_config(theirs.config, **own)
            comparison.images(theirs, ours, their_class.__name__, num_inference_steps=steps, mu=mu)
        theirs = TheirUniPC(**{**options, "time_shift_type": "linear"})
        ours = UniPCScheduler.from_config(theirs.config)
        comparison.images(theirs, ours, "linear", num_inference_steps=steps, mu=mu)
    comparison.report(1)


def test_flow_custom_sigmas():
    comparison = Comparison()
    for sigmas, shift in product(([0.9, 0.5, 0.2], [0.99, 0.8, 0.7, 0.35, 0.1, 0.01]), (1.0, 3.0)):
        theirs = TheirUniPC(**{**FLOW, "flow_shift": shift})
        ours = UniPCScheduler.from_config(theirs.config)
        comparison.images(theirs, ours, shift, sigmas=np.array(sigmas))
    comparison.report(1)


def test_flow_karras_in_units_of_sigma_over_alpha():
    comparison = Comparison()
    for order, steps in product((1, 2, 3), STEPS):
        theirs = TheirUniPC(**FLOW, solver_order=order, use_karras_sigmas=True, sigma_min=0.02, sigma_max=50.0)
        ours = UniPCScheduler.from_config(theirs.config)
        comparison.images(theirs, ours, order, num_inference_steps=steps)
    comparison.report(1)


def test_flow_euler_is_diffusers_flow_match_euler():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = DPMSolverPPScheduler.from_config(theirs.config, solver_order=1)
    assert ours.config.use_flow_sigmas
    assert ours.config.prediction_type == "flow_prediction"
    assert ours.config.flow_shift == 3.0
    for sigmas in (np.linspace(1, 1 / 4, 4), np.linspace(1, 1 / 20, 20)):
        theirs.set_timesteps(sigmas=sigmas)
        ours.set_timesteps(sigmas=sigmas)
        np.testing.assert_allclose(labels(ours), labels(theirs), rtol=1e-6)
        x, y = noise(), noise()
        for i, t in enumerate(ours.timesteps):
            alpha, sigma = alpha_sigma("flow", float(ours.sigmas[i]))
            clean = [1.6 * torch.tanh(1.3 * alpha / (alpha**2 + sigma**2) * v + 0.1) for v in (x, y)]
            x = ours.step((x - clean[0]) / sigma, t, x, return_dict=False)[0]
            y = theirs.step((y - clean[1]) / sigma, theirs.timesteps[i], y, return_dict=False)[0]
        torch.testing.assert_close(x, y, rtol=0, atol=5e-5)


@pytest.mark.parametrize("begin", [0, 2, 4])
def test_flow_image_to_image(begin):
    comparison = Comparison()
    for their_class, our_class, order in (
        (TheirDPM, DPMSolverPPScheduler, 2),
        (TheirUniPC, UniPCScheduler, 2),
        (TheirUniPC, UniPCScheduler, 3),
    ):
        theirs = their_class(**FLOW, solver_order=order)
        ours = our_class.from_config(theirs.config)
        comparison.images(theirs, ours, (our_class, order), run={"begin": begin}, num_inference_steps=8)
    comparison.report(1)
