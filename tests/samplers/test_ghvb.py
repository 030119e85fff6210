"""GHVB: published numbers, the paper's recurrence step by step, and integers as PLMS."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from analytic import EDM, FLOW, MIXTURE, STABLE_DIFFUSION, ZERO_SNR, LinearVPSchedule, lambda_grid
from fewstep.samplers import DEISScheduler, Plan, PlanScheduler
from fewstep.samplers.builder import PlanBuilder
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.ghvb import GHVBScheduler, difference_weights, generalized_heavy_ball, order_and_damping
from fewstep.samplers.grid import Grid
from fewstep.samplers.heavy_ball import HeavyBallScheduler

MODELS = {"vp": STABLE_DIFFUSION, "zero_snr": ZERO_SNR, "flow": FLOW, "edm": EDM}
TRAJECTORY = lambda_grid(np.linspace(-2.5, 2.0, 7))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0.8, 0.892362670384),
        (1.8, 1.033451890285),
        (2.8, 1.059240197007),
        (3.8, 1.057995788082),
        (4, 1.059127582676),
        (1, 0.946573210579),
    ],
)
def test_trajectories_of_ghvb(number, expected):
    plan = generalized_heavy_ball(PlanBuilder(TRAJECTORY, "sample"), *order_and_damping(number))
    assert float(samples_of(plan)[-1]) == pytest.approx(expected, abs=2e-11)


PUBLISHED: dict[int, Callable[[float], list[float]]] = {
    1: lambda b: [b],
    2: lambda b: [(2 + b) / 2, -(2 - b) / 2],
    3: lambda b: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
    4: lambda b: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
    5: lambda b: [
        (1650 + 251 * b) / 720,
        -(3420 - 646 * b) / 720,
        (2880 - 264 * b) / 720,
        -(1380 - 106 * b) / 720,
        (270 - 19 * b) / 720,
    ],
}
"""``beta c_k`` of arXiv 2307.11118, newest velocity first."""


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("damping", [0.01, 0.5, 0.8, 1.0])
def test_weights_of_ghvb(order, damping):
    differences = difference_weights(order, damping)
    expanded = [
        sum((-1) ** k * math.comb(j, k) * differences[j] for j in range(k, order)) / damping for k in range(order)
    ]
    published = np.array(PUBLISHED[order](damping)) / damping
    np.testing.assert_allclose(expanded, published, rtol=1e-13)
    assert published.sum() == pytest.approx(1.0, abs=1e-12)


def test_weights_of_ghvb_2_8():
    order, damping = order_and_damping(2.8)
    np.testing.assert_allclose(np.array(PUBLISHED[order](damping)) / damping, np.array([22, -17.6, 5.2]) / 9.6)


def samples_of(plan: Plan) -> list[torch.Tensor]:
    execution, x = PlanRun(plan), torch.ones(1, 1, dtype=torch.float64)
    samples = [x]
    for call in plan:
        x, _ = execution.step(x, MIXTURE.clean(x, call.alpha, call.sigma))
        samples.append(x)
    return samples


@pytest.mark.parametrize("damping", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_ghvb_is_the_recurrence(order, damping):
    """The published form: weights ``c_k`` over velocities, whose number rises to the order."""
    grid = lambda_grid([-2.4, -1.9, -1.0, -0.6, 0.3, 0.5, 1.6, 2.0])
    x = torch.ones(1, 1, dtype=torch.float64)
    expected, velocities = [x], []
    for node, target in zip(grid.nodes, grid.nodes[1:], strict=False):
        noise = (x - node.alpha * MIXTURE.clean(x, node.alpha, node.sigma)) / node.sigma
        velocities.insert(0, (1 - damping) * velocities[0] + damping * noise if velocities else noise)
        used = min(order, len(velocities))
        direction = sum(c / damping * v for c, v in zip(PUBLISHED[used](damping), velocities, strict=False))
        x = target.alpha * (x / node.alpha + (target.rho - node.rho) * direction)
        expected.append(x)
    plan = generalized_heavy_ball(PlanBuilder(grid, "sample"), order, damping)
    for ours, theirs in zip(samples_of(plan), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_ghvb_keeps_one_tensor_less_than_its_order(order):
    grid = lambda_grid(np.linspace(-2.5, 2.0, 13))
    plan = generalized_heavy_ball(PlanBuilder(grid, "epsilon"), order, 0.5)
    kept: set[str] = set()
    for call in plan.calls[:-1]:
        kept |= {row.out for row in call.rows if row.out != "sample"}
        kept |= {name for name in (call.keep_sample, call.keep_prediction) if name}
        kept -= set(call.drop)
        assert len(kept) <= max(order - 1, 1)


def test_below_one_ghvb_is_hb_on_ddim():
    ours = GHVBScheduler(**STABLE_DIFFUSION, momentum_number=0.7, final_sigmas_type="zero")
    theirs = HeavyBallScheduler(
        **STABLE_DIFFUSION, damping=0.7, solver="ipndm", solver_options={"solver_order": 1}, final_sigmas_type="zero"
    )
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(9)
        results.append(sampled(scheduler))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def sampled(scheduler: PlanScheduler) -> torch.Tensor:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_integers_are_plms(order, model):
    ours = GHVBScheduler(**MODELS[model], momentum_number=order)
    theirs = DEISScheduler(**MODELS[model], solver_type="ipndm", solver_order=order, lower_order_final=False)
    for steps in (1, 2, 7):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
        assert ours.plan.calls == theirs.plan.calls
        assert torch.equal(sampled(ours), sampled(theirs))


def test_five_is_adams_bashforth_of_order_five():
    grid = Grid.of(LinearVPSchedule(), np.linspace(8.0, 0.0, 9), np.arange(8, 0, -1.0))
    plan = generalized_heavy_ball(PlanBuilder(grid, "epsilon"), 5, 1.0)
    end = grid.nodes[7].alpha
    weights = sorted(c for slot, c in plan.calls[6].rows[-1].terms if slot != "sample")
    expected = sorted(-end * np.array([1901, -2774, 2616, -1274, 251]) / 720)
    np.testing.assert_allclose(weights, expected, rtol=1e-13)


def test_momentum_numbers():
    assert order_and_damping(2.8) == (3, 0.8)
    assert order_and_damping(3) == (3, 1.0)
    assert order_and_damping(0.25) == (1, 0.25)
    assert order_and_damping(5.0) == (5, 1.0)
    assert order_and_damping(4.000001) == (5, 1e-6)
    assert order_and_damping(2.99999999) == (3, 1.0)
    assert order_and_damping(3.00000001) == (3, 1.0)
    assert order_and_damping(1e-9) == (1, 1e-6)


def test_a_small_damping_multiplies_no_rounding():
    """In the published form the weights of 3.000001 are of the order of a million."""
    grid = lambda_grid(np.linspace(-2.5, 2.0, 13))
    plan = generalized_heavy_ball(PlanBuilder(grid, "epsilon"), *order_and_damping(3.000001))
    integer = generalized_heavy_ball(PlanBuilder(grid, "epsilon"), 4, 1.0)
    assert plan.amplification < integer.amplification
    results = []
    for dtype in (torch.float32, torch.float64):
        execution, x = PlanRun(plan), torch.linspace(-2, 2, 9, dtype=dtype).unsqueeze(1)
        for call in plan:
            clean = MIXTURE.clean(x.double(), call.alpha, call.sigma)
            x, _ = execution.step(x, ((x.double() - call.alpha * clean) / call.sigma).to(dtype))
        results.append(x.double())
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)


def test_the_first_step_has_no_momentum():
    x = torch.full((1, 3), 0.7, dtype=torch.float64)
    first = []
    for number in (0.4, 1.8, 2.8, 3):
        scheduler = GHVBScheduler(**STABLE_DIFFUSION, momentum_number=number)
        scheduler.set_timesteps(6)
        first.append(scheduler.step(torch.tanh(x), scheduler.timesteps[0], x, return_dict=False)[0])
    for other in first[1:]:
        assert torch.equal(other, first[0])


@pytest.mark.parametrize("number", [0, -1.0, 5.1, math.nan, math.inf])
def test_ghvb_refuses_other_numbers(number):
    with pytest.raises(ValueError, match=r"momentum_number .* \(0, 5\]"):
        GHVBScheduler(momentum_number=number)
