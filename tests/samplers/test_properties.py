"""Properties of weights, plans and their execution on random grids and random programs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analytic import LinearVPSchedule, rounding
from fewstep.samplers import SAMPLERS, EDMSchedule, FlowSchedule, NoiseSchedule, Plan
from fewstep.samplers.builder import PlanBuilder, Value
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.grid import Grid
from fewstep.samplers.weights import Node, lambda_weights, slope_weights

checked = settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))

# Steps in half log-SNR: shorter than float32 can tell apart, usual ones, and longer than any pipeline's.
widths = st.lists(st.one_of(st.floats(1e-6, 1e-3), st.floats(0.05, 2.0), st.floats(2.0, 12.0)), min_size=1, max_size=8)


@st.composite
def grids(draw: st.DrawFn, *, ends: bool = True) -> Grid:
    """Random nodes; with ``ends`` some begin at ``alpha = 0`` (flow) and some end at ``sigma = 0``."""
    schedule: NoiseSchedule = draw(st.sampled_from([LinearVPSchedule(), FlowSchedule(), EDMSchedule(0.5)]))
    half_logsnr = draw(st.floats(-8.0, 4.0)) + np.concatenate([[0.0], np.cumsum(draw(widths))])
    levels = [schedule.level_of_rho(math.exp(-value)) for value in half_logsnr]
    if ends and schedule.kind == "flow" and draw(st.booleans()):
        levels = [1.0, *levels]
    if ends and draw(st.booleans()):
        levels = [*levels, 0.0]
    # Levels near 1 of a flow may round to the same number.
    distinct = [level for k, level in enumerate(levels) if k == 0 or level < levels[k - 1]]
    if len(distinct) == 1:
        distinct.append(0.5 * distinct[0])
    return Grid.of(schedule, distinct, schedule.timestep(np.array(distinct[:-1])))


class Recorder(PlanBuilder):
    """Remembers which value the run returns."""

    result: Value

    def finish(self, result: Value) -> Plan:
        self.result = result
        return super().finish(result)


def written(name: str, grid: Grid, start: int = 0) -> tuple[Plan, Recorder]:
    """A registered sampler's plan for any grid."""
    sampler = SAMPLERS[name]
    prediction_type = "epsilon" if grid.schedule.kind == "edm" else "sample"
    scheduler = sampler.scheduler(**sampler.options)
    recorder = Recorder(grid, prediction_type, start=start)
    return scheduler._write(recorder, scheduler.config), recorder


def numbers(plan: Plan) -> list[float]:
    return [
        value
        for call in plan
        for value in (
            *(call.timestep, call.level, call.alpha, call.sigma, call.in_scale, *call.prediction, *call.clean),
            *(c for row in call.rows for _, c in row.terms),
        )
    ]


@pytest.mark.parametrize("name", SAMPLERS)
@checked
@given(grid=grids(), data=st.data())
def test_any_grid_gives_finite_weights_that_reproduce_constants(name, grid, data):
    """Tiny and huge steps, from ``alpha = 0``, down to ``sigma = 0``, from any start inside."""
    plan, _ = written(name, grid, data.draw(st.integers(0, grid.steps - 1)))
    assert np.isfinite(numbers(plan)).all()
    assert plan.final_level == grid.levels[-1]
    clean = torch.tensor([[1.0], [-4.0]], dtype=torch.float64)
    noise = torch.tensor([[3.0], [-1.0]], dtype=torch.float64) * (0.0 if plan.is_stochastic else 1.0)
    run, draws = PlanRun(plan), torch.zeros_like(clean)
    x = plan.calls[0].alpha * clean + plan.calls[0].sigma * noise
    for call in plan:
        p, q = call.clean
        x = run.step(x, (clean - p * x) / q, draws)[0]
    # From alpha = 0 every weight is finite, and errors have no scale to be followed on.
    bound = 1e-9 * max(1.0, plan.amplification) ** 2 if plan.calls[0].alpha == 0.0 else rounding(plan, grid)[-1]
    torch.testing.assert_close(x, plan.final_alpha * clean + plan.final_sigma * noise, rtol=0, atol=bound)


@checked
@given(
    half_logsnr=st.lists(st.floats(-20.0, 20.0), min_size=2, max_size=5, unique_by=lambda v: round(v, 5)),
    ends=st.tuples(st.booleans(), st.booleans()),
    measure=st.sampled_from(["data", "noise"]),
    stochastic=st.booleans(),
)
def test_weights_sum_to_the_exact_integral(half_logsnr, ends, measure, stochastic):
    """Constants are integrated exactly by every rule, also from and to infinite half log-SNR."""
    values = sorted(half_logsnr)
    nodes = [Node(1.0 / math.hypot(1.0, math.exp(-v)), 1.0 / math.hypot(1.0, math.exp(v))) for v in values]
    if ends[0] and measure == "data":
        nodes[-2] = Node(0.0, 1.0)
    if ends[1]:
        nodes[-1] = Node(1.0, 0.0)
    *past, start, target = nodes
    rules = [lambda_weights(start, target, past[::-1], measure=measure, stochastic=stochastic)]
    rules += [slope_weights(start, target, o, 0.5, measure=measure, stochastic=stochastic) for o in past[-1:]]
    for weights in rules:
        assert np.isfinite([weights.state, *weights.predictions, weights.noise]).all()
        total = math.fsum(weights.predictions)
        # A clean prediction of 1 takes the mean alpha to alpha; a noise prediction of 1, the noise sigma to sigma.
        if measure == "data":
            wanted = target.alpha - weights.state * start.alpha
        elif stochastic and target.sigma > 0:
            wanted = 2 * (target.sigma - weights.state * start.sigma)
        else:
            wanted = target.sigma - weights.state * start.sigma
        scale = max(1.0, abs(weights.state), *map(abs, weights.predictions))
        assert total == pytest.approx(wanted, abs=1e-12 * scale)


@pytest.mark.parametrize("name", SAMPLERS)
@checked
@given(grid=grids())
def test_json_brings_back_every_bit(name, grid):
    plan, _ = written(name, grid)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert [value.hex() for value in numbers(again)] == [value.hex() for value in numbers(plan)]


def network(x: torch.Tensor, k: int) -> torch.Tensor:
    return torch.tanh(x + 0.1 * k)


def with_all_values_kept(recorder: Recorder, x: torch.Tensor, draws: list[torch.Tensor]) -> torch.Tensor:
    """What the solver wrote, line by line: no slots, no substitution."""
    values = {0: x}
    for k, segment in enumerate(recorder._segments):
        clean, x = network(values[segment.sample], k), values[segment.sample]
        alpha, sigma = segment.node.alpha, segment.node.sigma
        values[segment.prediction] = clean if segment.measure == "data" else (x - alpha * clean) / sigma
        for value, terms, noise in segment.combinations:
            total = noise * draws[k]
            for term, coefficient in terms.items():
                total = total + coefficient * values[term]
            values[value] = total
    return values[recorder.result.index]


def compare_with_slots(plan: Plan, recorder: Recorder, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *draws = torch.randn(1 + len(plan), 2, 3, generator=generator, dtype=torch.float64)
    expected = with_all_values_kept(recorder, x, draws)
    run = PlanRun(plan)
    for k in range(len(plan)):
        x = run.step(x, network(x, k), draws[k])[0]
    torch.testing.assert_close(x, expected, rtol=0, atol=bound * max(1.0, float(expected.abs().max())))
    assert all(value is None for value in run._values), "a slot outlives the run"


@pytest.mark.parametrize("name", SAMPLERS)
@checked
@given(start=st.floats(-2.5, 0.0), widths=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=9), flow=st.booleans())
def test_slots_hold_what_the_solver_wrote(name, start, widths, flow):
    """Execution with reused slots equals execution with all values kept."""
    schedule = FlowSchedule() if flow else LinearVPSchedule()
    half_logsnr = start + np.concatenate([[0.0], np.cumsum(widths)])
    levels = np.array([schedule.level_of_rho(math.exp(-value)) for value in half_logsnr])
    plan, recorder = written(name, Grid.of(schedule, levels, schedule.timestep(levels[:-1])))
    compare_with_slots(plan, recorder, 1e-9)


@settings(checked, max_examples=100)
@given(data=st.data(), count=st.integers(1, 6))
def test_slots_of_any_program(data, count):
    """Random programs: any earlier value may be read at any time, or never."""
    grid = Grid.of(FlowSchedule(), np.linspace(0.9, 0.3, count + 1), np.linspace(900, 400, count))
    recorder = Recorder(grid, "sample")
    values = [recorder.initial]
    coefficients = st.sampled_from([0.25, 0.5, 1.0])
    following = recorder.initial
    for k in range(count):
        measure = data.draw(st.sampled_from(["data", "noise"]))
        values.append(recorder.evaluate(following, k, measure))
        for _ in range(data.draw(st.integers(1, 4))):
            terms = data.draw(st.lists(st.tuples(st.sampled_from(values), coefficients), min_size=1, max_size=4))
            values.append(recorder.combine(terms, noise=data.draw(st.sampled_from([0.0, 0.0, 0.3]))))
        following = values[-1]
    plan = recorder.finish(following)
    assert len(plan) == count
    compare_with_slots(plan, recorder, 1e-8)


def test_a_value_that_is_always_zero_is_refused():
    recorder = Recorder(Grid.of(FlowSchedule(), [0.9, 0.5], [900.0]), "sample")
    recorder.evaluate(recorder.initial, 0, "data")
    result = recorder.combine([(recorder.initial, 0.5), (recorder.initial, -0.5)])
    with pytest.raises(ValueError, match=r"sample after call 0 .* cancel"):
        recorder.finish(result)
