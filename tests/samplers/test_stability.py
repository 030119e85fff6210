"""Where momentum keeps runs stable: the published stiff problem, and limits seen from both sides."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from analytic import LinearVPSchedule
from fewstep.samplers import Plan, deis
from fewstep.samplers.builder import PlanBuilder
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.ghvb import generalized_heavy_ball
from fewstep.samplers.grid import Grid
from fewstep.samplers.heavy_ball import heavy_ball
from fewstep.samplers.multistep import Predictor
from fewstep.samplers.stability import stability_limit


def plms(grid: Grid, order: int) -> Predictor:
    return deis.predictor(grid, order=order, form="ipndm", lower_order_final=False)


def equal_steps(width: float, steps: int) -> Grid:
    """Equal steps in ``sigma / alpha``, down to 0: time is ``width - sigma / alpha``."""
    return Grid.of(LinearVPSchedule(), np.linspace(width, 0.0, steps + 1), np.arange(steps, 0, -1.0))


def solve(plan: Plan, y: torch.Tensor, slope: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``dy / dt = slope(y)`` by a plan: ``y`` is ``x / alpha``, and the noise prediction its negative slope."""
    execution, x = PlanRun(plan), y * plan.calls[0].alpha
    for call in plan:
        x, _ = execution.step(x, -slope(x / call.alpha))
    return x / plan.final_alpha


@pytest.mark.parametrize(
    ("generalized", "order", "damping", "expected", "digits"),
    [
        (False, 1, 1.0, 0.00958, 5e-6),
        (False, 2, 1.0, 1.429, 5e-4),
        (False, 2, 0.9, 0.00228, 5e-6),
        (False, 2, 0.8, 0.00447, 5e-6),
        (True, 2, 0.9, 0.0470, 5e-5),
        (True, 2, 0.8, 0.000664, 5e-7),
        (True, 2, 0.5, 0.00141, 5e-6),
    ],
)
def test_stiff_toy_problem(generalized, order, damping, expected, digits):
    """y'' = -10 y' - 9 y in 26 steps, beyond the limit of the second order without momentum."""
    grid = equal_steps(3.0, 26)
    builder = PlanBuilder(grid, "epsilon")
    plan = (
        generalized_heavy_ball(builder, order, damping)
        if generalized
        else heavy_ball(builder, plms(grid, order), damping)
    )
    matrix = torch.tensor([[0.0, 1.0], [-9.0, -10.0]], dtype=torch.float64)
    y = solve(plan, torch.tensor([[-1.0, 0.0]], dtype=torch.float64), lambda y: y @ matrix.T)
    # y = -9/8 exp(-t) + 1/8 exp(-9 t)
    exact = [-9 / 8 * math.exp(-3) + math.exp(-27) / 8, 9 / 8 * math.exp(-3) - 9 / 8 * math.exp(-27)]
    assert float((y[0] - torch.tensor(exact, dtype=torch.float64)).abs().max()) == pytest.approx(
        expected, abs=1.01 * digits
    )


def test_limits_of_stability_in_closed_form():
    for order, limit in {1: -2, 2: -1, 3: -6 / 11, 4: -3 / 10, 5: -90 / 551}.items():
        for generalized in (False, True):
            assert stability_limit(order, generalized=generalized) == pytest.approx(limit, rel=1e-14)
        for beta in (0.2, 0.5, 0.8):
            assert stability_limit(order, beta) == pytest.approx(limit * (2 - beta) / beta, rel=1e-14)
    for b in (0.2, 0.5, 0.8):
        expected = [-2 * (2 - b) / b, -(2 - b), -6 * (2 - b) / (12 - b), -3 * (2 - b) / (11 - b)]
        ours = [stability_limit(order, b, generalized=True) for order in (1, 2, 3, 4)]
        np.testing.assert_allclose(ours, expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("generalized", "order"), [*((False, k) for k in (1, 2, 3, 4)), *((True, k) for k in (1, 2, 3, 4, 5))]
)
@pytest.mark.parametrize("damping", [0.3, 0.8, 1.0])
def test_runs_decay_within_the_limit_and_grow_beyond(order, damping, generalized):
    sizes = []
    for share in (0.9, 1.1):
        steps = 400
        eigenvalue = share * stability_limit(order, damping, generalized=generalized)
        grid = equal_steps(float(steps), steps)
        builder = PlanBuilder(grid, "epsilon")
        if generalized:
            plan = generalized_heavy_ball(builder, order, damping)
        else:
            plan = heavy_ball(builder, plms(grid, order), damping)
        y = solve(plan, torch.ones(1, 1, dtype=torch.float64), lambda y, rate=eigenvalue: rate * y)
        sizes.append(abs(float(y)))
    assert sizes[0] < 1e-3
    assert sizes[1] > 1e3


@pytest.mark.parametrize(("arguments", "word"), [((6,), "6"), ((0,), "0"), ((2, 0.0), "damping"), ((2, 1.5), "1.5")])
def test_limits_of_what_does_not_exist(arguments, word):
    with pytest.raises(ValueError, match=word):
        stability_limit(*arguments)
