"""The fit of plans: what it gains on noises that it never saw, its derivatives, and that it resumes exactly."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from analytic import EDM, FLOW, STABLE_DIFFUSION, network_of
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, LearnedScheduler, LearnedTable, PlanScheduler, Problem, fit_plan, problem_of
from fewstep.samplers.fitting import _Fit
from fewstep.samplers.plan_numbers import FREE, PlanNumbers

DATA = GaussianMixture.random(4, 8, seed=7)
MODELS: dict[str, dict[str, Any]] = {
    "vp": {**STABLE_DIFFUSION, "timestep_spacing": "trailing"},
    "flow": FLOW,
    "edm": EDM,
}
CALLS = 4


def start(model: str = "vp", name: str = "ddim", calls: int = CALLS, **options: Any) -> PlanScheduler:
    scheduler = SAMPLERS[name].build(MODELS[model], **options)
    scheduler.set_timesteps(calls)
    return scheduler


def exact(scheduler: PlanScheduler, count: int, seed: int) -> Problem:
    """Noises, and where the mixture's own flow takes them."""
    noise = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = noise * scheduler.init_noise_sigma
    call = scheduler.plan.calls[0]
    end = DATA.solve(x, (call.alpha, call.sigma), (scheduler.plan.final_alpha, scheduler.plan.final_sigma))
    return Problem(network_of(scheduler, DATA.clean), x, end)


def distances(scheduler: PlanScheduler, problem: Problem) -> torch.Tensor:
    scheduler.set_timesteps(scheduler.num_inference_steps or CALLS)
    x = problem.start
    for t in scheduler.timesteps:
        x = scheduler.step(problem.network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return (x - problem.end).square().mean(1).sqrt()


@pytest.mark.parametrize("model", MODELS)
def test_a_fitted_plan_halves_the_error_of_the_best_known_solver(model):
    """On noises that it never saw, in the mean and in the median, whatever the schedule; run as it will be used."""
    scheduler = start(model)
    found = fit_plan(scheduler, [exact(scheduler, 48, 0)], validation=[exact(scheduler, 24, 1)], iterations=15)
    fitted = LearnedScheduler.from_config(MODELS[model], table=found.table)
    held_out = exact(scheduler, 200, 2)
    ours = distances(fitted, held_out)
    best = min(
        (distances(start(model, name), held_out) for name in ("ddim", "dpm++", "unipc", "deis")),
        key=lambda error: float(error.median()),
    )
    assert float(ours.median()) < 0.5 * float(best.median())
    assert float(ours.mean()) < 0.7 * float(best.mean())


def test_what_is_reported_is_what_the_scheduler_does():
    scheduler = start()
    problem = exact(scheduler, 16, 0)
    seen: list[Any] = []
    found = fit_plan(scheduler, [problem], iterations=3, progress=seen.append)
    assert seen == found.history
    assert found.history[0].error == pytest.approx(float(distances(scheduler, problem).mean()), rel=1e-6)
    fitted = LearnedScheduler.from_config(scheduler.config, table=found.table)
    best = min(step.error for step in found.history)
    assert best == pytest.approx(float(distances(fitted, problem).mean()), rel=1e-6)
    for reach in {step.reach for step in seen}:
        errors = [step.error for step in found.history if step.reach == reach]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.7 * errors[0]


def test_batches_do_not_matter():
    scheduler = start()
    whole = exact(scheduler, 12, 0)
    parts = [Problem(whole.network, whole.start[part], whole.end[part]) for part in (slice(0, 5), slice(5, 12))]
    tables = [fit_plan(scheduler, problems, iterations=2).table for problems in ([whole], parts)]
    np.testing.assert_allclose(tables[0].data[-1], tables[1].data[-1], rtol=1e-6)


@pytest.mark.parametrize("free", FREE)
def test_only_what_is_free_changes(free):
    scheduler = start(name="unipc")
    base = LearnedTable.of(scheduler.plan)
    table = fit_plan(scheduler, [exact(scheduler, 16, 0)], free=[free], iterations=2).table
    assert (table.levels[:-1] != base.levels[:-1]) == (free in ("times", "end"))
    assert (table.levels[-1] > base.levels[-1]) == (free == "end")
    assert (table.scales != base.scales) == (free == "scales")
    assert table.data != base.data or free == "labels"
    assert table.labels != base.labels or free in ("scales", "weights")
    assert table.levels[0] == base.levels[0]
    assert table.labels[0] == base.labels[0] or free == "labels"


def test_any_numbers_are_a_consistent_table():
    """Consistency is in the parametrisation: no penalty, no projection."""
    generator = np.random.default_rng(0)
    for model, name in itertools.product(MODELS, ("ddim", "unipc", "dpm++2s")):
        scheduler = start(model, name)
        numbers = PlanNumbers(scheduler, FREE)
        for _ in range(10):
            table = numbers.table(generator.normal(0.0, 2.0, len(numbers)))
            LearnedScheduler.from_config(scheduler.config, table=table)
            widths = [
                -np.diff([math.atan2(n.sigma, n.alpha) for n in _nodes(scheduler, t)]) for t in (numbers.base, table)
            ]
            if name != "dpm++2s":  # whose stages lie between its steps
                assert (widths[1] > 0.24 * widths[0])[:-1].all()


def _nodes(scheduler: PlanScheduler, table: LearnedTable) -> list[Any]:
    alpha, sigma = scheduler.schedule.alpha_sigma(table.levels)
    return [type("Node", (), {"alpha": a, "sigma": s}) for a, s in zip(alpha, sigma, strict=True)]


def test_the_derivatives_are_those_of_the_error():
    """The vector of the normal equations against central differences of the reported error."""
    scheduler = start("flow", "dpm++")
    fit = _Fit(scheduler, [exact(scheduler, 8, 0)], (), PlanNumbers(scheduler, FREE))
    values = np.random.default_rng(1).normal(0.0, 0.02, len(fit.numbers))
    _, vector = fit.equations(values)
    for k, unit in enumerate(np.eye(len(values)) * 1e-4):
        slope = (fit.error(values + unit, fit.problems) - fit.error(values - unit, fit.problems)) / 2e-4
        assert 2.0 * vector[k] / 8 == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_an_interrupted_fit_ends_as_an_uninterrupted_one(tmp_path):
    scheduler = start()
    problem, other = exact(scheduler, 16, 0), exact(scheduler, 8, 1)
    whole = fit_plan(scheduler, [problem], validation=[other], iterations=4)

    class StopError(Exception):
        pass

    def stop(step: Any) -> None:
        if (step.reach, step.iteration) == (0.85, 2):
            raise StopError

    path = tmp_path / "fit.json"
    with pytest.raises(StopError):
        fit_plan(scheduler, [problem], validation=[other], iterations=4, checkpoint=path, progress=stop)
    seen: list[Any] = []
    resumed = fit_plan(scheduler, [problem], validation=[other], iterations=4, checkpoint=path, progress=seen.append)
    assert [(step.reach, step.iteration) for step in seen[:7]] == [(0.85, 3), (0.85, 4), *((0.7, k) for k in range(5))]
    assert resumed == whole
    with pytest.raises(ValueError, match="another fit"):
        fit_plan(scheduler, [other], checkpoint=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no fit"):
        fit_plan(scheduler, [problem], checkpoint=path)


def test_the_ends_of_a_fine_run_serve_as_truth():
    scheduler = start()
    expected = exact(scheduler, 8, 0)
    problem = problem_of(scheduler, expected.network, expected.start)
    torch.testing.assert_close(problem.start, expected.start)
    torch.testing.assert_close(problem.end, expected.end, rtol=0.0, atol=0.02)


def test_what_is_refused():
    scheduler = start()
    problem = exact(scheduler, 4, 0)
    for arguments, message in (
        ({"free": ()}, "must name some of"),
        ({"free": ("time",)}, "must name some of"),
        ({"iterations": 0}, "iterations 0"),
        ({"patience": 0}, "patience 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_plan(scheduler, [problem], **arguments)
    with pytest.raises(ValueError, match="problems is empty"):
        fit_plan(scheduler, [])
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_plan(start(calls=1), [problem], free=("weights",))
    with pytest.raises(ValueError, match="fresh noise"):
        fit_plan(start(name="sde-dpm++"), [problem])
    silent = Problem(lambda x, t: x * math.nan, problem.start, problem.end)
    with pytest.raises(ValueError, match="not finite"):
        fit_plan(scheduler, [silent])
