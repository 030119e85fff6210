"""Where our weights differ from diffusers' on purpose: which of the two is right."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from analytic import MIXTURE, STABLE_DIFFUSION, lambda_grid, sample
from comparison import PREDICTIONS, TRUTH, TheirDPM, TheirUniPC, error_of
from fewstep.samplers import UniPCScheduler, dpm_solver


def one_step_error(h: float, *, diffusers_third_order: bool, order: int = 3) -> float:
    """Of one third-order step of length ``h`` from exact predictions."""
    nodes = lambda_grid([-2 * h, -h, 0.0, h])
    rule = dpm_solver.predictor(
        nodes,
        order=order,
        measure="data",
        stochastic=False,
        form="heun",
        lower_order_final=False,
        euler_at_final=False,
        diffusers_third_order=diffusers_third_order,
    ).rule
    points = [(node.alpha, node.sigma) for node in nodes.nodes]
    x = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    states = [MIXTURE.solve(x, points[2], end) for end in points]
    weights = rule(2, 3)
    result = weights.state * states[2]
    for k, weight in enumerate(weights.predictions):
        result = result + weight * MIXTURE.clean(states[2 - k], *points[2 - k])
    return float((result - states[3]).square().mean().sqrt())


def test_third_order_multistep_is_of_third_order():
    ours = [one_step_error(h, diffusers_third_order=False) for h in (0.05, 0.025)]
    theirs = [one_step_error(h, diffusers_third_order=True) for h in (0.05, 0.025)]
    # One step of a method of order p is wrong by O(h^(p+1)).
    assert ours[0] / ours[1] > 12
    assert 6 < theirs[0] / theirs[1] < 10
    assert ours[0] < theirs[0]


@pytest.mark.parametrize("method", ["multistep", "singlestep"])
def test_third_order_of_the_sde_integrates_its_drift(method):
    """The drift of a known smooth prediction over one step: ours of third order, diffusers' worse than its second."""

    def error(h: float, order: int, diffusers_third_order: bool) -> float:
        grid = lambda_grid([-2 * h, -h, 0.0, h] if method == "multistep" else [0.0, h / 3, 2 * h / 3, h])
        common = {"measure": "data", "stochastic": True, "form": "heun", "diffusers_third_order": diffusers_third_order}
        if method == "multistep":
            predictor = dpm_solver.predictor(grid, order=order, lower_order_final=False, euler_at_final=False, **common)
            weights, nodes, start = predictor.rule(2, order), [grid.nodes[2 - k] for k in range(order)], grid.nodes[2]
        else:
            nodes, start = [grid.nodes[0], *reversed(grid.nodes[1:order])], grid.nodes[0]
            group = list(range(order))
            weights = dpm_solver._group_weights(grid.nodes, group, 3, "data", True, "heun")
            if order == 3 and diffusers_third_order:
                weights = dpm_solver._diffusers_third_order_of_group(grid.nodes, group, 3, weights)
        end = grid.nodes[3]
        length = end.half_logsnr - start.half_logsnr
        exact = quad(
            lambda tau: end.alpha * 2 * np.exp(-2 * (length - tau)) * np.sin(1.0 + start.half_logsnr + tau), 0, length
        )[0]
        found = sum(w * np.sin(1.0 + node.half_logsnr) for w, node in zip(weights.predictions, nodes, strict=True))
        return abs(found - exact)

    assert error(0.2, 3, False) / error(0.1, 3, False) > 12
    assert error(0.1, 3, True) > error(0.1, 2, False)
    assert error(0.1, 3, False) < 0.1 * error(0.1, 2, False)


@pytest.mark.parametrize(
    "options",
    [
        {"solver_type": "bh1"},
        {"solver_type": "bh1", "solver_order": 3},
        {"lower_order_final": False},
        {"lower_order_final": False, "solver_order": 3},
        {"predict_x0": False},
    ],
)
def test_unipc_runs_to_zero_that_diffusers_cannot_do(options):
    """NaN, inf or an error there; here about as accurate as what works there."""
    theirs = TheirUniPC(**STABLE_DIFFUSION, **options)
    with contextlib.suppress(RuntimeError, np.linalg.LinAlgError):
        assert not np.isfinite(error_of(theirs, 20))
    working = TheirUniPC(**STABLE_DIFFUSION)
    # The noise form needs smaller steps.
    for steps in (1, 2, 3, 8, 20, 60) if "predict_x0" not in options else (1, 8, 20, 60):
        ours = UniPCScheduler.from_config(theirs.config)
        assert error_of(ours, steps) < 1.6 * error_of(working, steps) + 1e-3, steps


@pytest.mark.parametrize("corrector_order", [1, 2])
def test_unipc_predictors_share_a_prediction(corrector_order):
    """With solver_p diffusers converts the network's output a second time, at the corrected sample.

    Its image then depends on what the network predicts; ours does not.
    """
    ours, theirs = [], []
    for kind in PREDICTIONS:
        options = {**STABLE_DIFFUSION, "prediction_type": kind}
        predictor = TheirDPM(**options)
        pair = (
            UniPCScheduler(**options, solver_order=corrector_order, solver_p="dpm++"),
            TheirUniPC(**options, solver_order=corrector_order, solver_p=predictor),
        )
        for scheduler, results in zip(pair, (ours, theirs), strict=True):
            scheduler.set_timesteps(10)
            results.append(sample(scheduler, TRUTH.start("vp", float(scheduler.sigmas[0])), TRUTH.mixture.clean))
    for k in (1, 2):
        torch.testing.assert_close(ours[k], ours[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=5e-5)
    assert (theirs[0] - theirs[2]).abs().max() > 1e-3
