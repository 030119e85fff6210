"""Solver schedules as plans: published coefficients and runs, our registered samplers, and any schedule at all."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from analytic import EDM, FLOW, MIXTURE, STABLE_DIFFUSION, ZERO_SNR, lambda_grid, rounding, run, sample
from fewstep.samplers import SAMPLERS
from fewstep.samplers.builder import PlanBuilder
from fewstep.samplers.searched import SearchedScheduler
from fewstep.samplers.usf.decisions import Correction, Derivative, SolverSchedule, SolverStep, newest
from fewstep.samplers.usf.known import KNOWN_SOLVERS, known_schedule
from fewstep.samplers.usf.rows import relaxation_factor, taylor_weights, write_schedule
from fewstep.samplers.weights import Node

MODELS = {"vp": STABLE_DIFFUSION, "zero_snr": ZERO_SNR, "flow": FLOW, "edm": EDM}
NODES = lambda_grid([-1.5, -0.9, -0.2, 0.6]).nodes


def step_weights(start: int, known: int, measure: str, derivatives: tuple[Derivative, ...]) -> tuple:
    """Weights to the last of ``NODES`` from ``known`` nodes, all of them used, in the published order: newest first."""
    h = 0.6 - NODES[known + start].half_logsnr
    others = [known + p for p in range(-1, -known - 1, -1) if p != start]
    estimates = [
        ([others.index(known + p) for p in derivative.active_points], relaxation_factor(derivative, measure, h))
        for derivative in derivatives
    ]
    nodes = [NODES[k] for k in others]
    return taylor_weights(NODES[known + start], NODES[3], estimates, nodes, measure=measure)


DATA, NOISE = 0.621801973527, 1.383845741502
ROWS = {
    "DPM++1": ("data", newest(1), DATA, [0.482748766486, 0, 0]),
    "2M midpoint": ("data", newest(2, "dpmsolver-2"), DATA, [0.758605204478, -0.275856437992, 0]),
    "UniP-2 bh2": ("data", newest(2, "unipc-bh2"), DATA, [0.758605204478, -0.275856437992, 0]),
    "2M heun": ("data", newest(2), DATA, [0.794999617938, -0.312250851452, 0]),
    "3M exact": ("data", newest(3), DATA, [1.099297656598, -0.971563268549, 0.355014378437]),
    "DDIM": ("noise", newest(1), NOISE, [-0.589630674885, 0, 0]),
    "noise 2M midpoint": ("noise", newest(2, "dpmsolver-2"), NOISE, [-0.926562489105, 0.336931814220, 0]),
    "DEIS logrho 2": ("noise", newest(2), NOISE, [-0.882110252124, 0.292479577239, 0]),
    "DEIS logrho 3": ("noise", newest(3), NOISE, [-1.151198630505, 0.875504397066, -0.313936441445]),
}


@pytest.mark.parametrize("name", ROWS)
def test_published_coefficients_of_predictors(name):
    measure, derivatives, state, predictions = ROWS[name]
    weights = step_weights(-1, 3, measure, derivatives)
    assert weights.state == pytest.approx(state, abs=2e-12)
    np.testing.assert_allclose(weights.predictions, predictions, atol=3e-12)


CORRECTORS = {
    "UniC-1 bh1": (SolverStep(), "unipc-bh1", [0.132086585235, 0.350662181251, 0, 0]),
    "UniC-1 bh2": (SolverStep(), "unipc-bh2", [0.241374383243, 0.241374383243, 0, 0]),
    "AM-2": (SolverStep(), "none", [0.209529271466, 0.273219495020, 0, 0]),
    "UniC-2": (SolverStep("data", -1, newest(2)), "none", [0.300515305115, 0.230759345984, -0.048525884613, 0]),
    "UniC-3": (
        SolverStep("data", -1, newest(3)),
        "none",
        [0.379732977468, 0.207874240638, -0.140066305999, 0.035207854379],
    ),
}


@pytest.mark.parametrize("name", CORRECTORS)
def test_published_coefficients_of_correctors(name):
    step, relaxation, predictions = CORRECTORS[name]
    first, *others = step.own_correction().derivatives
    weights = step_weights(-2, 4, "data", (dataclasses.replace(first, relaxation=relaxation), *others))
    assert weights.state == pytest.approx(DATA, abs=2e-12)
    np.testing.assert_allclose(weights.predictions, predictions, atol=3e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("measure", ["data", "noise"])
def test_full_order_is_exact_on_polynomials_in_half_logsnr(measure, order):
    """Against numerical quadrature of the exact solution."""
    lambdas = [-2.3, -1.5, -0.9, -0.2, 0.6]
    nodes = lambda_grid(lambdas).nodes
    others = [nodes[3 - k] for k in range(1, order)]
    estimates = [(range(order - 1), 1.0)] * (order - 1)
    weights = taylor_weights(nodes[3], nodes[4], estimates, others, measure=measure)
    h, target = 0.8, nodes[4]
    for degree in range(order):
        if measure == "data":
            expected = target.alpha * quad(lambda tau, j: math.exp(tau - h) * tau**j, 0, h, (degree,), epsabs=1e-13)[0]
        else:
            expected = -target.sigma * quad(lambda tau, j: math.exp(h - tau) * tau**j, 0, h, (degree,), epsabs=1e-13)[0]
        values = [0.0**degree, *((lambdas[3 - k] - lambdas[3]) ** degree for k in range(1, order))]
        assert np.dot(weights.predictions, values) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("z", [-2.0, -1e-6, 1e-6, 0.7])
def test_relaxations(z):
    """As the paper writes them, where that does not cancel; and their limits in short steps."""
    measure, h = ("data", -z) if z < 0 else ("noise", z)
    factors = {
        "none": 1.0,
        "0.5exp": 1 + 0.5 * math.expm1(z),
        "-0.5exp": 1 - 0.5 * math.expm1(z),
        "dpmsolver-2": 0.5 * z * math.expm1(z) / (math.expm1(z) - z),
        "unipc-bh2": 0.5 * z * math.expm1(z) / (math.expm1(z) - z),
        "unipc-bh1": 0.5 * z * z / (math.expm1(z) - z),
    }
    for name, expected in factors.items():
        found = relaxation_factor(Derivative((-2,), name), measure, h)
        assert found == pytest.approx(expected if abs(z) > 1e-3 else 1.0, rel=1e-12 if abs(z) > 1e-3 else 1e-5)
    assert relaxation_factor(Derivative((-2,), "linear", 0.4), measure, h) == pytest.approx(1 + 0.4 * h)


# ------------------------------------------------------------------------------------------------------ known solvers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("solver", KNOWN_SOLVERS)
def test_known_solvers_are_our_samplers(solver, model):
    """The same images to rounding, and no more tensors kept."""
    for steps in (1, 2, 3, 5, 8, 20):
        sampler = SAMPLERS[solver].build(MODELS[model])
        sampler.set_timesteps(steps)
        searched = SearchedScheduler.from_config(MODELS[model], decisions=known_schedule(solver, sampler._grid))
        searched.set_timesteps(steps)
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x * float(sampler.init_noise_sigma)
        expected = sample(sampler, x)
        assert searched.plan.slots == sampler.plan.slots
        assert [call.timestep for call in searched.plan] == [call.timestep for call in sampler.plan]
        torch.testing.assert_close(sample(searched, x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def trajectory(steps: list[SolverStep] | str, lambdas: np.ndarray | None = None) -> float:
    """Where the run from x = 1 over six steps ends, on the mixture of the published values."""
    grid = lambda_grid(np.linspace(-2.5, 2.0, 7) if lambdas is None else lambdas)
    if isinstance(steps, str):
        schedule = known_schedule(steps, grid, lower_order_final=False)
    else:
        schedule = SolverSchedule("vp", tuple(grid.levels.tolist()), tuple(steps))
    plan = write_schedule(PlanBuilder(grid, "sample"), schedule)
    return float(run(plan, torch.ones(1, 1, dtype=torch.float64)))


def unipc(order: int, measure: str, relaxation: str) -> list[SolverStep]:
    steps = []
    for i in range(6):
        used = min(order, i + 1)
        step = SolverStep(measure, -1, newest(used, relaxation if used == 2 else "none"))
        correction = step.own_correction()
        if used == 1:
            correction = Correction(-2, (Derivative((-1,), relaxation),))
        steps.append(dataclasses.replace(step, correction=correction if i < 5 else None))
    return steps


def singlestep(*group: SolverStep) -> list[SolverStep]:
    return list(group) * 6


THIRDS = np.linspace(-2.5, 2.0, 19)
INNER = Derivative((-1,))
TRAJECTORIES = {
    "DDIM": (lambda: trajectory("ddim"), 0.946573210579),
    "DPM++2M midpoint": (lambda: trajectory("dpm++"), 1.076815086012),
    "DPM++2M heun": (lambda: trajectory("dpm++-heun"), 1.095861010993),
    "DPM++3M exact": (lambda: trajectory("dpm++3m"), 1.072606715397),
    "2S dpmsolver": (lambda: trajectory("dpm++2s", np.linspace(-2.5, 2.0, 13)), 1.039337493034),
    "2S taylor": (
        lambda: trajectory(singlestep(SolverStep(), SolverStep("data", -2, (INNER,))), np.linspace(-2.5, 2.0, 13)),
        1.051537687658,
    ),
    "3S taylor": (lambda: trajectory("dpm++3s", THIRDS), 1.053590482874),
    "3S dpmsolver": (
        lambda: trajectory(
            singlestep(SolverStep(), SolverStep("data", -2, (INNER,)), SolverStep("data", -3, (INNER,))), THIRDS
        ),
        1.054001706856,
    ),
    "DEIS logrho 2": (lambda: trajectory("deis"), 1.030245025927),
    "DEIS logrho 3": (lambda: trajectory("deis3"), 1.047907445330),
    "UniPC-1 bh1": (lambda: trajectory(unipc(1, "data", "unipc-bh1")), 1.029539989077),
    "UniPC-1 bh2": (lambda: trajectory(unipc(1, "data", "unipc-bh2")), 1.003098740540),
    "UniPC-2 bh1": (lambda: trajectory("unipc-bh1"), 1.111956160321),
    "UniPC-2 bh2": (lambda: trajectory("unipc"), 1.077876762826),
    "UniPC-3 bh1": (lambda: trajectory(unipc(3, "data", "unipc-bh1")), 1.047268903369),
    "UniPC-3 bh2": (lambda: trajectory("unipc3"), 1.046310742035),
    "UniPC-3 bh2 noise": (lambda: trajectory(unipc(3, "noise", "unipc-bh2")), 1.068530148130),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_published_trajectories(name):
    compute, expected = TRAJECTORIES[name]
    assert compute() == pytest.approx(expected, abs=2e-11)


# ------------------------------------------------------------------------------------------------------ any schedule


@st.composite
def derivatives_of(draw, known: int, start: int, latest_needed: bool) -> tuple[Derivative, ...]:
    others = [p for p in range(-1, -known - 1, -1) if p != start]
    count = draw(st.integers(1 if latest_needed else 0, min(3, len(others))))
    found = []
    for j in range(1, count + 1):
        size = draw(st.integers(j, min(len(others), j + 1)))
        points = tuple(draw(st.permutations(others))[:size])
        if latest_needed and -1 not in points:
            points = (-1, *points[1:])
        relaxation = draw(st.sampled_from(["none", "dpmsolver-2", "unipc-bh1", "0.5exp", "-0.5exp", "linear"]))
        coefficient = draw(st.floats(-1, 1)) if relaxation == "linear" and j == 1 else 0.0
        found.append(Derivative(points, relaxation if j == 1 else "none", coefficient))
    return tuple(found)


@st.composite
def schedules(draw, afs: str = "none") -> SolverSchedule:
    count = draw(st.integers(2, 6))
    gaps = draw(st.lists(st.floats(0.2, 1.5), min_size=count, max_size=count))
    first = draw(st.floats(-4.5, -2.0))
    levels = np.exp(-(first + np.concatenate([[0.0], np.cumsum(gaps)])))
    kind = draw(st.sampled_from(["vp", "flow", "edm"]))
    if kind == "flow":
        levels = levels / (1 + levels)
    if draw(st.booleans()):
        levels[-1] = 0.0
    steps = []
    for i in range(count):
        # A last step from an analytic node would give 0.
        oldest = min(i + 1, 3) if afs == "none" else min(max(i, 1), 3)
        start = draw(st.integers(-oldest, -1))
        step = SolverStep(draw(st.sampled_from(["data", "noise"])), start, draw(derivatives_of(i + 1, start, False)))
        if i < count - 1 and draw(st.booleans()):
            again = draw(st.integers(-min(i + 2, 3), -2))
            correction = Correction(again, draw(derivatives_of(i + 2, again, True)), draw(st.booleans()))
            step = dataclasses.replace(step, correction=correction)
        steps.append(step)
    return SolverSchedule(kind, tuple(levels.tolist()), tuple(steps), afs=afs)


OF_KIND = {"vp": STABLE_DIFFUSION, "flow": FLOW, "edm": EDM}


def build(schedule: SolverSchedule, prediction_type: str = "epsilon") -> SearchedScheduler:
    config = OF_KIND[schedule.kind]
    if schedule.kind != "edm":
        config = {**config, "prediction_type": prediction_type}
    scheduler = SearchedScheduler.from_config(config, decisions=schedule)
    scheduler.set_timesteps(schedule.calls)
    return scheduler


@settings(max_examples=150, deadline=None)
@given(schedules(), st.sampled_from(["epsilon", "sample", "v_prediction", "flow_prediction"]))
def test_every_schedule_is_exact_on_straight_lines(schedule, prediction_type):
    """A constant clean prediction c maps alpha_i c + sigma_i e to alpha_{i+1} c + sigma_{i+1} e at every call."""
    scheduler = build(schedule, prediction_type)
    plan = scheduler.plan
    assert len(plan) == schedule.calls == len(scheduler.timesteps)
    clean, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-4, 4)
    bounds = rounding(plan, scheduler._grid)
    # Tight enough to show something; estimates from points that lie far apart in order multiply what is rounded.
    scale = max(1.0, plan.amplification)
    x = plan.calls[0].alpha * clean + plan.calls[0].sigma * noise
    for k, call in enumerate(plan):
        truth = call.alpha * clean + call.sigma * noise
        torch.testing.assert_close(x, truth, rtol=0, atol=max(bounds[k], 1e-12 * scale * float(truth.abs().max())))
        p, q = call.clean
        x = scheduler.step((clean - p * x) / q, scheduler.timesteps[k], x, return_dict=False)[0]
    truth = plan.final_alpha * clean + plan.final_sigma * noise
    torch.testing.assert_close(x, truth, rtol=0, atol=max(bounds[-1], 1e-12 * scale))


def by_hand(schedule: SolverSchedule, nodes: list[Node], x: torch.Tensor) -> torch.Tensor:
    """The run as the paper describes it, with tensors and without plans; on a grid of finite half log-SNRs."""

    def predict(value: torch.Tensor, node: Node) -> dict[str, torch.Tensor]:
        clean = MIXTURE.clean(value, node.alpha, node.sigma)
        return {"data": clean, "noise": (value - node.alpha * clean) / node.sigma}

    def update(step, start: int, derivatives, target: Node, past: list) -> torch.Tensor:
        origin, state, predictions = past[start]
        h = math.log(target.alpha / target.sigma) - math.log(origin.alpha / origin.sigma)
        data = step.measure == "data"
        scale = target.sigma / origin.sigma if data else target.alpha / origin.alpha
        factor = target.alpha if data else -target.sigma
        kernel = (lambda tau: math.exp(tau - h)) if data else (lambda tau: math.exp(h - tau))
        result = scale * state
        terms = [predictions[step.measure]]
        for j, derivative in enumerate(derivatives, 1):
            distances = [
                math.log(past[p][0].alpha / past[p][0].sigma) - math.log(origin.alpha / origin.sigma)
                for p in derivative.active_points
            ]
            size = len(distances)
            matrix = np.array([[d**n / math.factorial(n) for d in distances] for n in range(1, size + 1)])
            weights = np.linalg.solve(matrix, np.eye(size)[j - 1])
            found = sum(
                w * (past[p][2][step.measure] - predictions[step.measure])
                for w, p in zip(weights, derivative.active_points, strict=True)
            )
            relaxed = 1.0 + derivative.coefficient * h if derivative.relaxation == "linear" else 1.0
            if derivative.relaxation == "dpmsolver-2":
                z = -h if data else h
                relaxed = 0.5 * z * math.expm1(z) / (math.expm1(z) - z)
            terms.append(relaxed * found)
        for j, term in enumerate(terms):
            integral = quad(lambda tau, j: kernel(tau) * tau**j / math.factorial(j), 0, h, (j,), epsabs=1e-14)[0]
            result = result + factor * integral * term
        return result

    first = predict(x, nodes[0])
    if schedule.afs == "zero_x0":
        first = {"data": torch.zeros_like(x), "noise": x / nodes[0].sigma}
    past = [(nodes[0], x, first)]
    for i, step in enumerate(schedule.steps):
        target = nodes[i + 1]
        x = update(step, step.start, step.derivatives, target, past)
        if i == len(schedule.steps) - 1:
            return x
        past.append((target, x, predict(x, target)))
        if step.correction is not None:
            x = update(step, step.correction.start, step.correction.derivatives, target, past)
            kept = predict(x, target) if step.correction.implicit else past[-1][2]
            past[-1] = (target, x, kept)
    raise AssertionError


FULL = SolverSchedule(
    "vp",
    tuple(np.exp(-np.array([-2.0, -1.4, -0.9, -0.1, 0.4, 1.1])).tolist()),
    (
        SolverStep("noise", correction=SolverStep("noise").own_correction(implicit=True)),
        SolverStep("data", -1, newest(2, "dpmsolver-2"), SolverStep("data", -1, newest(2)).own_correction()),
        SolverStep("noise", -2, (Derivative((-1, -3), "linear", -0.3), Derivative((-1, -3)))),
        SolverStep(
            "data",
            -1,
            (Derivative((-2,)), Derivative((-3, -2)), Derivative((-2, -4, -3))),
            Correction(-3, (Derivative((-1,), "linear", 0.2), Derivative((-2, -1))), implicit=True),
        ),
        SolverStep("noise", -1, newest(4, "linear", 0.1)),
    ),
)


@pytest.mark.parametrize("afs", ["none", "zero_x0"])
def test_a_schedule_of_every_decision_is_what_the_paper_describes(afs):
    """Type switches, older starts, low-order estimates, both correctors and the analytic step, against tensors."""
    schedule = dataclasses.replace(FULL, afs=afs)
    grid = lambda_grid([-2.0, -1.4, -0.9, -0.1, 0.4, 1.1])
    plan = write_schedule(PlanBuilder(grid, "sample"), schedule)
    assert len(plan) == schedule.calls == (7 if afs == "none" else 6)
    x = torch.randn(6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = by_hand(schedule, list(grid.nodes), x)

    def clean(value: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        # What the network sees is the scaled sample.
        scale = plan.calls[0].in_scale if value is x else 1.0
        return MIXTURE.clean(value * scale, alpha, sigma)

    torch.testing.assert_close(run(plan, x, clean), expected, rtol=0, atol=1e-10)
    plain = by_hand(dataclasses.replace(schedule, afs="none"), list(grid.nodes), x)
    assert (expected - plain).abs().max() > 1e-3 or afs == "none"


@settings(max_examples=40, deadline=None)
@given(schedules(afs="zero_x0"), st.sampled_from(["epsilon", "v_prediction"]))
def test_analytic_first_steps_are_exact_where_the_clean_sample_is_zero(schedule, prediction_type):
    if schedule.kind == "flow":
        prediction_type = "flow_prediction"
    scheduler = build(schedule, prediction_type)
    plan = scheduler.plan
    assert len(plan) == schedule.calls
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = scheduler._grid.nodes[0].sigma * noise
    for k, call in enumerate(plan):
        seen = scheduler.scale_model_input(x, scheduler.timesteps[k])
        inner = 1.0 if schedule.kind != "edm" else scheduler.schedule.in_scale(call.level)
        torch.testing.assert_close(seen, inner * call.sigma * noise, rtol=1e-9, atol=1e-12)
        p, q = call.clean
        x = scheduler.step(-p * x / q, scheduler.timesteps[k], x, return_dict=False)[0]
    torch.testing.assert_close(x, plan.final_sigma * noise, rtol=0, atol=1e-9)


def test_runs_that_begin_in_the_middle_lose_what_they_do_not_know():
    """From the third node the four-point step has two points, and the start before the run becomes the newest."""
    grid = lambda_grid([-2.0, -1.4, -0.9, -0.1, 0.4, 1.1])
    x = torch.randn(6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = run(write_schedule(PlanBuilder(grid, "sample", start=2), FULL), x)
    cut = (
        SolverStep("noise"),
        SolverStep("data", -1, (Derivative((-2,)),), FULL.steps[3].correction),
        SolverStep("noise", -1, (Derivative((-2, -3), "linear", 0.1), Derivative((-2, -3)))),
    )
    shorter = SolverSchedule("vp", FULL.levels[2:], cut)
    torch.testing.assert_close(found, by_hand(shorter, list(grid.nodes[2:]), x), rtol=0, atol=1e-10)


def test_infinite_ends_are_of_first_order():
    """From alpha = 0 and to sigma = 0 a step of any order is the first-order one, and stays finite."""
    levels = (1.0, 0.8, 0.5, 0.2, 0.0)
    steps = [SolverStep("noise", -1, newest(min(i + 1, 3))) for i in range(4)]
    rich = SolverSchedule("flow", levels, tuple(steps))
    plain = SolverSchedule("flow", levels, (SolverStep(), SolverStep("noise"), steps[1], SolverStep()))
    results = []
    for schedule in (rich, plain):
        scheduler = build(schedule, "flow_prediction")
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        results.append(sample(scheduler, x))
    assert results[0].isfinite().all()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_mixed_predictions_converge_with_their_order():
    """Second-order steps that switch the prediction at every node, on the mixture."""

    def error(count: int) -> float:
        lambdas = np.linspace(-2.5, 2.0, count + 1) + 0.1 * np.sin(np.linspace(0, math.pi, count + 1))
        grid = lambda_grid(lambdas)
        steps = [SolverStep("data" if i % 2 else "noise", -1, newest(min(2, i + 1))) for i in range(count)]
        schedule = SolverSchedule("vp", tuple(grid.levels.tolist()), tuple(steps))
        plan = write_schedule(PlanBuilder(grid, "sample"), schedule)
        ends = [(node.alpha, node.sigma) for node in (grid.nodes[0], grid.nodes[-1])]
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
        return float((run(plan, x) - MIXTURE.solve(x, *ends)).abs().mean())

    errors = [error(count) for count in (40, 80, 160)]
    assert [math.log2(errors[k] / errors[k + 1]) for k in (0, 1)] == pytest.approx([2.0, 2.0], abs=0.25)
