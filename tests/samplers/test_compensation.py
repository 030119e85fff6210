"""Fine trajectories, the search for compensation ratios, and the regression over searched ratios."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import analytic
from analytic import EDM, FLOW, STABLE_DIFFUSION, ZERO_SNR
from fewstep.metrics import GaussianMixture
from fewstep.metrics.mixture import GuidedPair
from fewstep.samplers import DPMSolverPPScheduler, unipc
from fewstep.samplers.cascade import CascadeRegression
from fewstep.samplers.compensation import search_ratios, search_ratios_over
from fewstep.samplers.dc_solver import DCSolverScheduler
from fewstep.samplers.grid import Grid
from fewstep.samplers.trajectory import Trajectory, fine_trajectory

MODELS: dict[str, dict[str, Any]] = {"vp": STABLE_DIFFUSION, "zero_snr": ZERO_SNR, "flow": FLOW, "edm": EDM}
DATA = GaussianMixture.random(6, 16, seed=5)
PREDICTOR = {"solver_p": "dpm++", "corrector": False}
BASES: dict[str, dict[str, Any]] = {
    "unipc": {},
    "unipc3": {"solver_order": 3, "solver_type": "bh1"},
    "delta": {"corrector_form": "delta", "disable_corrector": [2]},
    "ddim": {"solver_p": "ddim", "corrector": False},
    "dpm++": PREDICTOR,
    "deis": {"solver_p": "deis", "corrector": False},
    "noise": {"predict_x0": False},
}


def noises(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network_of(scheduler: Any, data: Any = DATA) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """An ideal network, which is told times as pipelines tell them."""
    ideal = analytic.network_of(scheduler, data.clean)

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert timestep.dtype == scheduler.timesteps.dtype
        return ideal(x, timestep)

    return network


def drawn(scheduler: Any, noise: torch.Tensor, data: Any = DATA) -> torch.Tensor:
    scheduler.set_timesteps(scheduler.num_inference_steps)
    network, x = network_of(scheduler, data), noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def made(model: str, steps: int, **options: Any) -> DCSolverScheduler:
    scheduler = DCSolverScheduler(**{**MODELS[model], **options})
    scheduler.set_timesteps(steps)
    return scheduler


# ------------------------------------------------------------------------------------------------ trajectories


@pytest.mark.parametrize("model", MODELS)
def test_trajectories_follow_the_probability_flow(model):
    """At their nodes, and between them where no node is: within a hundredth of what a run of 10 steps is off."""
    scheduler = made(model, 10, **({"use_karras_sigmas": True} if model == "vp" else {}))
    noise = noises(4, 1)
    trajectory = fine_trajectory(scheduler, network_of(scheduler), noise, steps=400)
    assert set(scheduler._grid.levels) <= set(trajectory.grid.levels)
    first = scheduler._grid.nodes[0]
    schedule = scheduler.schedule
    between = math.exp(np.log(scheduler._grid.levels[3:5]).mean())
    for level in (between, float(scheduler._grid.levels[6]), float(scheduler._grid.levels[-1])):
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(level))
        exact = DATA.solve(trajectory.samples[0], (max(first.alpha, 1e-9), first.sigma), (alpha, sigma))
        assert rms(trajectory.at(level) - exact) < 0.01 * rms(exact), level
    for level in (0.99 * trajectory.grid.levels[-1] - 0.01, 1.01 * trajectory.grid.levels[0]):
        with pytest.raises(ValueError, match="lies outside the trajectory, which goes from"):
            trajectory.at(level)


def test_interpolation_is_of_fourth_order():
    """Nodes twice as dense: a sixteenth of the error, on the flow of one Gaussian, whose solutions are known."""
    schedule = made("flow", 4).schedule

    # Data of standard deviation 1/2 around 0 scale like the marginal.
    def size(s: Any) -> Any:
        return np.sqrt((1 - s) ** 2 / 4 + s**2)

    errors = []
    for count in (12, 24):
        levels = np.linspace(0.95, 0.0, count + 1)
        grid = Grid.of(schedule, levels, schedule.timestep(levels[:-1]))
        trajectory = Trajectory(grid, tuple(torch.tensor([[v]]) for v in size(levels)))
        points = np.linspace(0.02, 0.93, 301)
        errors.append(max(abs(float(trajectory.at(s)) - size(s)) for s in points))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4.0, abs=0.6)


def test_order_2_is_nearer_than_ddim_and_more_steps_than_fewer():
    scheduler, noise = made("vp", 5), noises(4, 2)
    first = scheduler._grid.nodes[0]
    exact = DATA.solve(noise, (first.alpha, first.sigma), (1.0, 0.0))

    def error(**options: int) -> float:
        return rms(fine_trajectory(scheduler, network_of(scheduler), noise, **options).samples[-1] - exact)

    ddim, usual, fine = error(steps=200, solver_order=1), error(steps=200), error(steps=1000)
    assert fine < usual < ddim < 0.02


def test_networks_get_whole_timesteps_unless_they_take_fractions():
    scheduler = made("vp", 7)
    labels = fine_trajectory(scheduler, network_of(scheduler), noises(1, 0)).grid.timesteps
    assert (labels == labels.round()).all()
    assert set(scheduler.timesteps.tolist()) <= set(labels.tolist())
    scheduler = made("vp", 7, fractional_timesteps=True)
    assert scheduler.timesteps.dtype == torch.float32
    labels = fine_trajectory(scheduler, network_of(scheduler), noises(1, 0)).grid.timesteps
    assert (labels != labels.round()).any()


# ------------------------------------------------------------------------------------------------ search


def states(scheduler: DCSolverScheduler, ratios: list[Any], noise: torch.Tensor, last: int) -> torch.Tensor:
    """The authors' loop over tensors, to node ``last``: corrected there if it is corrected at all."""
    grid, config = scheduler._grid, scheduler.config
    measure = "data" if config.predict_x0 else "noise"
    orders = unipc.step_orders(grid, config.solver_order, 0, True)
    predict = unipc.predictor(grid, orders, measure=measure, form=config.solver_type).rule
    correct = unipc.corrector(grid, orders, config.disable_corrector, measure=measure, form=config.solver_type)
    x = base = noise
    history: list[torch.Tensor] = []
    for i in range(last + 1):
        node = grid.nodes[i]
        unic = correct(i - 1, len(history)) if i else None
        if i == last and (unic is None or i == grid.steps):
            return x
        clean = DATA.clean(x, node.alpha, node.sigma)
        m = clean if measure == "data" else (x - node.alpha * clean) / node.sigma
        if unic is not None:
            x = unic.state * base + sum(w * v for w, v in zip(unic.predictions, [m, *history], strict=False))
        if i == last:
            return x
        base = x
        history.insert(0, m)
        if len(history) > 2:
            t = [float(v) for v in grid.timesteps[[i, i - 1, i - 2]]]
            at = ratios[i] * t[0] + (1 - ratios[i]) * t[1]
            basis = [math.prod((at - u) / (own - u) for u in t if u != own) for own in t]
            history[0] = sum(w * v for w, v in zip(basis, history, strict=False))
        unip = predict(i, len(history))
        x = unip.state * base + sum(w * v for w, v in zip(unip.predictions, history, strict=False))
    raise AssertionError


@pytest.mark.parametrize("base", ["unipc", "unipc3", "noise"])
def test_search_under_a_corrector_finds_the_best_ratios(base):
    """Every step's distance is the least of 201 ratios tried through the authors' loop, and is reported as it is."""
    scheduler, noise = made("vp", 6, **BASES[base]), noises(10, 3)
    truth = fine_trajectory(scheduler, network_of(scheduler), noise)
    found = search_ratios(scheduler, network_of(scheduler), noise, truth=truth, evaluations=12)
    assert found.ratios[:2] == [1.0, 1.0]
    for i in range(6):
        target = truth.at(float(scheduler._grid.levels[i + 1]))

        def distance(ratio: float, i: int = i, target: torch.Tensor = target) -> float:
            return rms(states(scheduler, [*found.ratios[:i], ratio], noise, i + 1) - target)

        assert found.errors[i] == pytest.approx(distance(found.ratios[i]), rel=1e-9)
        assert found.errors[i] <= 1.002 * min(distance(r) for r in np.linspace(0.5, 1.5, 201 if i > 1 else 1))
    # Less than a search by scanning would take, and never more than asked for.
    assert found.calls <= 3 + 12 * 3 + 1


@pytest.mark.parametrize("base", ["ddim", "dpm++", "deis"])
@pytest.mark.parametrize("dc_order", [1, 2, 3])
def test_search_without_a_corrector_is_exact_and_costs_one_run(base, dc_order):
    scheduler, noise = made("vp", 7, dc_order=dc_order, **BASES[base]), noises(10, 4)
    network = network_of(scheduler)
    truth = fine_trajectory(scheduler, network, noise)
    found = search_ratios(scheduler, network, noise, truth=truth)
    assert found.calls == 7
    assert found.ratios[:dc_order] == [1.0] * dc_order
    levels = scheduler._grid.levels
    for i in range(dc_order, 7):

        def distance(ratio: float, i: int = i) -> float:
            ratios = [*found.ratios[:i], ratio, *[1.0] * (6 - i)]
            run = made("vp", 7, dc_order=dc_order, **BASES[base], ratios=ratios)
            x = noise
            for t in run.timesteps[: i + 1]:
                x = run.step(network(x, t), t, x, return_dict=False)[0]
            return rms(x - truth.at(float(levels[i + 1])))

        assert found.errors[i] == pytest.approx(distance(found.ratios[i]), rel=1e-9)
        assert found.errors[i] <= min(distance(r) for r in np.linspace(0.5, 1.5, 51)) * (1 + 1e-9)


@pytest.mark.parametrize("bounds", [None, (0.5, 1.5)])
def test_gradient_search_is_the_authors(bounds):
    """AdamW with rate 0.1 and its default decay through their loop, bounded by a hyperbolic tangent or not."""
    scheduler, noise = made("vp", 5), noises(6, 6)
    truth = fine_trajectory(scheduler, network_of(scheduler), noise)
    found = search_ratios(
        scheduler, network_of(scheduler), noise, truth=truth, method="gradient", bounds=bounds, iterations=15
    )
    ratios: list[float] = [1.0, 1.0]
    for i in range(2, 5):
        target = truth.at(float(scheduler._grid.levels[i + 1]))
        parameter = torch.nn.Parameter(torch.tensor(0.0 if bounds else 1.0, dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=0.1)

        def bounded(p: torch.Tensor) -> torch.Tensor:
            return torch.tanh(p) * 0.5 + 1.0 if bounds else p

        for _ in range(15):
            optimizer.zero_grad()
            result = states(scheduler, [*ratios, bounded(parameter)], noise, i + 1)
            torch.nn.functional.mse_loss(result, target).backward()
            optimizer.step()
        ratios.append(float(bounded(parameter).detach()))
    assert found.ratios == pytest.approx(ratios, abs=1e-8)


def test_gradient_and_forward_search_agree():
    scheduler, noise = made("flow", 5), noises(10, 7)
    forward, gradient = (
        search_ratios(scheduler, network_of(scheduler), noise, method=method) for method in ("forward", "gradient")
    )
    assert gradient.ratios[2] == pytest.approx(forward.ratios[2], abs=0.03)
    assert gradient.errors[2] == pytest.approx(forward.errors[2], rel=0.01)
    assert forward.calls < gradient.calls / 4


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model", MODELS)
def test_a_run_with_the_found_ratios_ends_where_the_search_did(model, base):
    """Every kind of model, with thresholding too; no step is worse than without compensation of that step."""
    noise = noises(6, 8)
    for thresholding in (False, True):
        options = {**BASES[base], "thresholding": thresholding, "sample_max_value": 1.5}
        scheduler = made(model, 5, **options)
        before = scheduler.plan
        truth = fine_trajectory(scheduler, network_of(scheduler), noise)
        found = search_ratios(scheduler, network_of(scheduler), noise, truth=truth)
        assert scheduler.plan == before, "the search left something behind"
        run = made(model, 5, **options, ratios=found.ratios)
        # Near alpha = 0 the conversions of noise predictions lose digits.
        assert rms(drawn(run, noise) - truth.samples[-1]) == pytest.approx(found.errors[-1], rel=1e-4)
        assert any(ratio != 1.0 for ratio in found.ratios)


@pytest.mark.parametrize(
    ("base", "steps", "scale", "gain"),
    [("unipc", 8, 4.0, 0.75), ("dpm++", 5, 4.0, 0.85), ("dpm++", 5, 7.5, 0.85), ("unipc", 8, 7.5, 0.85)],
)
def test_guided_runs_get_nearer_on_noises_that_the_search_never_saw(base, steps, scale, gain):
    """Classifier-free guidance on a mixture in 64 dimensions; ten noises for the search, a hundred for the verdict."""
    mixture = GaussianMixture.random(10, 64, seed=0)
    guided = GuidedPair(mixture.component(3), mixture, scale)
    generator = torch.Generator().manual_seed(77)
    seen, unseen = (torch.randn(count, 64, generator=generator, dtype=torch.float64) for count in (10, 100))
    plain = made("vp", steps, **BASES[base])
    network = network_of(plain, guided)
    found = search_ratios(plain, network, seen)
    truth = fine_trajectory(plain, network, unseen).samples[-1]
    compensated = made("vp", steps, **BASES[base], ratios=found.ratios)
    errors = [rms(drawn(scheduler, unseen, guided) - truth) for scheduler in (plain, compensated)]
    assert errors[1] < gain * errors[0]


@pytest.mark.parametrize("base", ["unipc", "dpm++"])
def test_refinement_ends_nearer_and_stays_within_bounds(base):
    scheduler, noise = made("vp", 6, **BASES[base]), noises(10, 3)
    network = network_of(scheduler)
    truth = fine_trajectory(scheduler, network, noise)
    greedy, refined = (
        search_ratios(scheduler, network, noise, truth=truth, refinement=runs, bounds=(0.6, 1.4)) for runs in (0, 60)
    )
    assert refined.errors[-1] < greedy.errors[-1]
    assert refined.ratios[:2] == [1.0, 1.0]
    assert min(refined.ratios) >= 0.6
    assert max(refined.ratios) <= 1.4
    run = made("vp", 6, **BASES[base], ratios=refined.ratios)
    assert rms(drawn(run, noise) - truth.samples[-1]) == pytest.approx(refined.errors[-1], rel=1e-6)
    short = made("vp", 2, **BASES[base])
    assert search_ratios(short, network_of(short), noise, refinement=5).ratios == [1.0, 1.0]


def test_single_precision_finds_the_same_ratios():
    scheduler, noise = made("vp", 6), noises(10, 9)
    double, single = (search_ratios(scheduler, network_of(scheduler), n) for n in (noise, noise.float()))
    assert single.ratios == pytest.approx(double.ratios, abs=0.02)
    assert single.errors == pytest.approx(double.errors, rel=1e-3)


def test_networks_that_predict_variances_too():
    scheduler = made("vp", 4, variance_type="learned_range", **PREDICTOR)
    noise = noises(3, 1).reshape(3, 4, 4)
    network = network_of(scheduler)

    def both(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(x, t), x], dim=1)

    assert search_ratios(scheduler, both, noise) == search_ratios(scheduler, network, noise)


def test_progress_and_short_runs():
    seen: list[tuple[int, float, float]] = []
    scheduler = made("vp", 3)
    found = search_ratios(scheduler, network_of(scheduler), noises(2, 1), progress=lambda *values: seen.append(values))
    assert seen == list(zip(range(3), found.ratios, found.errors, strict=True))
    scheduler = made("vp", 2)
    assert search_ratios(scheduler, network_of(scheduler), noises(2, 1)).ratios == [1.0, 1.0]


def test_searches_that_cannot_be_done_are_refused():
    scheduler, noise = made("vp", 4), noises(2, 1)
    network = network_of(scheduler)
    truth = fine_trajectory(scheduler, network, noise)
    later = made("vp", 4, timestep_spacing="leading")
    with pytest.raises(ValueError, match="truth begins with other noise or at another level"):
        search_ratios(scheduler, network, noises(2, 2), truth=truth)
    with pytest.raises(ValueError, match="truth begins with other noise or at another level"):
        search_ratios(later, network, noise, truth=truth)
    for options, message in (
        ({"method": "newton"}, "method 'newton' is unknown; use forward or gradient"),
        ({"bounds": (1.1, 1.5)}, r"bounds \(1.1, 1.5\) must lie on both sides of 1"),
        ({"evaluations": 2}, "evaluations 2 must be at least 3"),
        ({"iterations": 0}, "iterations 0 must be at least 1"),
        ({"refinement": -1}, "refinement -1 at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            search_ratios(scheduler, network, noise, truth=truth, **options)
    with pytest.raises(ValueError, match="network returns no gradient"):
        search_ratios(scheduler, torch.no_grad()(network), noise, truth=truth, method="gradient")
    with pytest.raises(ValueError, match="the run is not finite"):
        search_ratios(scheduler, lambda x, t: x * math.nan, noise, truth=truth)
    with pytest.raises(ValueError, match="no timesteps; call its set_timesteps"):
        search_ratios(DCSolverScheduler(), network, noise, truth=truth)
    with pytest.raises(ValueError, match="steps 3 must be at least the 4"):
        fine_trajectory(scheduler, network, noise, steps=3)
    with pytest.raises(ValueError, match="solver_order 4 must be 1, 2 or 3"):
        fine_trajectory(scheduler, network, noise, solver_order=4)


# ------------------------------------------------------------------------------------------------ regression


BOX = {"steps": (5, 20), "guidance_scale": (1.5, 7.5)}


def monomials(coefficients: np.ndarray, steps: int, scale: float) -> list[float]:
    """The authors' formula, which counts steps from 1."""
    n, g, result = steps / 50, scale / 12, []
    for i in range(1, steps + 1):
        a = coefficients @ [n**2, n, 1.0]
        b = a @ [g**2, g, 1.0]
        result.append(float(b @ [(i / steps) ** p for p in range(4)]))
    return [1.0, 1.0, *result[2:]]


def test_the_authors_files():
    """Known cases, and a random polynomial with the cancellation of their fits."""
    constant = np.zeros((4, 3, 3))
    constant[0, 2, 2] = 1.0
    assert CascadeRegression.from_monomials(constant, **BOX).predict(9, 4.0) == pytest.approx([1.0] * 9, abs=1e-14)
    product = np.zeros((4, 3, 3))
    product[1, 1, 0] = 2.0
    regression = CascadeRegression.from_monomials(product.ravel(), **BOX, ratios=(0.0, 2.0))
    expected = [1.0, 1.0, *(2 * (i / 10) * (6.0 / 12) * (10 / 50) ** 2 for i in range(3, 11))]
    assert regression.predict(10, 6.0) == pytest.approx(expected, abs=1e-14)
    generator = np.random.default_rng(0)
    for wide in ({}, {"steps": (8, 8)}, {"guidance_scale": (3.0, 3.0)}):
        box = {**BOX, **wide}
        coefficients = 1e3 * generator.normal(size=(4, 3, 3))
        regression = CascadeRegression.from_monomials(coefficients, **box, ratios=(-1e6, 1e6))
        for steps, scale in ((box["steps"][0], box["guidance_scale"][1]), (8, 3.0)):
            assert regression.predict(steps, scale) == pytest.approx(monomials(coefficients, steps, scale), rel=1e-10)


def test_a_fit_recovers_a_polynomial():
    """From searched runs on a lattice, at every other point of the box."""
    generator = np.random.default_rng(1)
    coefficients = 0.2 * generator.normal(size=(4, 3, 3))
    coefficients[0, 2, 2] = 1.0
    lattice = [(steps, scale) for steps in (5, 8, 10, 15, 20) for scale in (1.5, 4.0, 7.5)]
    regression = CascadeRegression.fit({key: monomials(coefficients, *key) for key in lattice})
    assert (regression.steps, regression.guidance_scale) == ((5, 20), (1.5, 7.5))
    low, high = regression.ratios
    for key in ((5, 1.5), (6, 2.0), (12, 6.9), (20, 7.5)):
        assert regression.predict(*key) == pytest.approx(np.clip(monomials(coefficients, *key), low, high), abs=1e-9)


def test_predictions_stay_among_the_fitted_ratios():
    ratios = {(5, 1.0): [1, 1, 0.6, 1.4, 0.6], (6, 1.0): [1, 1, 0.6, 1.4, 0.6, 1.4], (9, 1.0): [1, 1, *[0.6] * 7]}
    regression = CascadeRegression.fit(ratios)
    for steps in range(5, 10):
        predicted = regression.predict(steps, 1.0)
        assert predicted[:2] == [1.0, 1.0]
        assert min(predicted) >= 0.6
        assert max(predicted) <= 1.4


def test_one_run_alone_is_reproduced():
    """Three ratios of one number of steps and one guidance scale: nothing is left to smooth."""
    ratios = [1.0, 1.0, 0.9, 1.2, 1.05]
    regression = CascadeRegression.fit({(5, 7.5): ratios})
    assert regression.predict(5, 7.5) == pytest.approx(ratios, abs=1e-9)


def test_outside_the_box_is_refused():
    regression = CascadeRegression.from_monomials(np.ones(36), **BOX)
    for steps in (4, 21):
        with pytest.raises(ValueError, match=rf"a run of {steps} steps lies outside the 5 to 20 steps .* fitted on"):
            regression.predict(steps, 4.0)
    for scale in (1.0, 7.6, math.nan):
        with pytest.raises(ValueError, match=r"guidance_scale .* lies outside the 1.5 to 7.5 .* fitted on"):
            regression.predict(10, scale)
    with pytest.raises(ValueError, match="guidance_scale is needed"):
        regression.predict(10, None)


def test_json_brings_a_regression_back():
    regression = CascadeRegression.fit({(n, g): [1, 1, *np.linspace(0.7, 1.1, n - 2)] for n in (5, 7) for g in (1, 4)})
    data = json.loads(json.dumps(regression.to_dict()))
    assert CascadeRegression.from_dict(data) == regression


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "no fewstep.cascade of version 1"),
        ({"coefficients": [[1.0]]}, "finite table of 3 axes"),
        ({"coefficients": [[[math.nan]]]}, "finite table of 3 axes"),
        ({"coefficients": "x"}, "regression is damaged"),
        ({"steps": [9, 5]}, "steps of regression"),
        ({"guidance_scale": [1.0]}, "guidance_scale of regression"),
        ({"ratios": None}, "regression is damaged"),
    ],
)
def test_damaged_regressions_are_refused(change, message):
    data = CascadeRegression.from_monomials(np.ones(36), **BOX).to_dict()
    with pytest.raises(ValueError, match=message):
        CascadeRegression.from_dict({**data, **change})


def test_fits_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="no run of more than 2 steps"):
        CascadeRegression.fit({(2, 1.0): [1.0, 1.0]})
    with pytest.raises(ValueError, match=r"searched\[5, 1\] has 4 ratios"):
        CascadeRegression.fit({(5, 1.0): [1.0] * 4})
    with pytest.raises(ValueError, match="not finite"):
        CascadeRegression.fit({(3, 1.0): [1.0, 1.0, math.inf]})
    with pytest.raises(ValueError, match="coefficients has 9 numbers"):
        CascadeRegression.from_monomials(np.ones(9), **BOX)


def test_from_search_to_scheduler():
    """Ratios of several runs, fitted, predict those of a run between them well enough to help it."""
    mixture = GaussianMixture.random(4, 16, seed=2)
    scheduler = DCSolverScheduler(**STABLE_DIFFUSION, **PREDICTOR)
    scheduler.set_timesteps(5)
    networks = {g: network_of(scheduler, GuidedPair(mixture.component(1), mixture, g)) for g in (2.0, 4.0, 6.0)}
    table = search_ratios_over(scheduler, networks, noises(10, 1), steps=(5, 6, 8))
    assert sorted(table) == [(n, g) for n in (5, 6, 8) for g in (2.0, 4.0, 6.0)]
    alone = DCSolverScheduler(**STABLE_DIFFUSION, **PREDICTOR)
    alone.set_timesteps(6)
    truth = fine_trajectory(alone, networks[4.0], noises(10, 1))
    assert table[6, 4.0] == pytest.approx(
        search_ratios(alone, networks[4.0], noises(10, 1), truth=truth).ratios, abs=0.05
    )
    guided = GuidedPair(mixture.component(1), mixture, 3.0)
    errors = []
    for options in ({}, {"regression": CascadeRegression.fit(table), "guidance_scale": 3.0}):
        run = made("vp", 7, **PREDICTOR, **options)
        unseen = noises(50, 2)
        errors.append(
            rms(drawn(run, unseen, guided) - fine_trajectory(run, network_of(run, guided), unseen).samples[-1])
        )
    assert errors[1] < errors[0]


def test_searches_take_any_sampler_s_config():
    """What was found for a model serves the scheduler that its pipeline saves."""
    base = DPMSolverPPScheduler(**STABLE_DIFFUSION)
    scheduler = DCSolverScheduler.from_config(base.config)
    scheduler.set_timesteps(5)
    found = search_ratios(scheduler, network_of(scheduler), noises(4, 3))
    tuned = DCSolverScheduler.from_config(base.config, ratios=found.ratios)
    assert tuned.config.ratios == found.ratios
