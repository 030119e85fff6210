"""The invariants of the design, for every registered sampler at once: a new one is tested by being registered.

Orders of convergence are measured in ``test_orders.py``; agreement with diffusers and published numbers in
``test_parity_*.py`` and ``test_golden.py``; that a step reads nothing from the device, and allocates only what it
returns or keeps, in ``tests/pipelines/test_state.py`` and ``tests/scripts/test_bench.py``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from analytic import EDM, EPSILON, FLOW, MIXTURE, STABLE_DIFFUSION, edm_output, rounding
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS

MODELS = {"vp": STABLE_DIFFUSION, "flow": FLOW, "edm": EDM}
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic]


def straight_line(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A clean sample and noise, below 4 in size."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, batch, 5, generator=generator, dtype=torch.float64).clamp(-4, 4)
    return clean, noise


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 20])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_exact_on_straight_lines(name, steps, model):
    """A constant clean prediction c maps alpha_i c + sigma_i e to alpha_{i+1} c + sigma_{i+1} e at every call."""
    scheduler = SAMPLERS[name].build(MODELS[model])
    scheduler.set_timesteps(steps)
    clean, noise = straight_line()
    plan = scheduler.plan
    bounds = rounding(plan, scheduler._grid)
    x = plan.calls[0].alpha * clean + plan.calls[0].sigma * noise
    for k, call in enumerate(plan):
        torch.testing.assert_close(x, call.alpha * clean + call.sigma * noise, rtol=0, atol=bounds[k])
        # The output of the network whose clean sample is c: the conversion of the call, solved.
        p, q = call.clean
        output = scheduler.step((clean - p * x) / q, scheduler.timesteps[k], x)
        conversion = EPSILON * (4 + 4 * abs(p) * (call.alpha + call.sigma))
        torch.testing.assert_close(output.pred_original_sample, clean, rtol=0, atol=8 * conversion)
        x = output.prev_sample
    torch.testing.assert_close(x, plan.final_alpha * clean + plan.final_sigma * noise, rtol=0, atol=bounds[-1])


def test_bounds_of_rounding_are_small():
    """Or the test above would show nothing; the largest are those of stages and correctors at the noisy end."""
    for name in DETERMINISTIC:
        for model, config in MODELS.items():
            scheduler = SAMPLERS[name].build(config)
            scheduler.set_timesteps(6)
            data = all(call.measure == "data" for call in scheduler.plan)
            assert max(rounding(scheduler.plan, scheduler._grid)) < (1e-12 if data else 1e-5), (name, model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_plans_keep_the_marginals(name, model):
    """A constant clean prediction c: mean alpha_i c and variance sigma_i^2 at every call, by the rows alone.

    The noise form holds one noise prediction over a step: there it is true in the limit of small steps.
    """
    scheduler = SAMPLERS[name].build(MODELS[model], use_lu_lambdas=model == "vp")

    def deviation(steps: int) -> float:
        """Largest error of mean and standard deviation relative to the size of the sample."""
        scheduler.set_timesteps(steps)
        plan = scheduler.plan
        noises = np.eye(1 + len(plan))
        # Values as (coefficient of c, coefficients of the initial noise and of every draw).
        values = {"sample": (plan.calls[0].alpha, plan.calls[0].sigma * noises[0])}
        worst = 0.0
        for k, call in enumerate(plan):
            mean, parts = values["sample"]
            worst = max(worst, abs(mean - call.alpha), abs(np.linalg.norm(parts) / call.sigma - 1))
            slope = 0.0 if call.measure == "data" else 1.0 / call.sigma
            constant = 1.0 if call.measure == "data" else -call.alpha / call.sigma
            values.update(prediction=(constant + slope * mean, slope * parts), noise=(0.0, noises[k + 1]))
            kept = {call.keep_sample: values["sample"], call.keep_prediction: values["prediction"]}
            for row in call.rows:
                total = [sum(c * values[slot][part] for slot, c in row.terms) for part in (0, 1)]
                kept[row.out] = tuple(total)
                values.update({row.out: tuple(total)} if row.out != "sample" else {})
            values.update(kept)
        mean, parts = values["sample"]
        assert mean == pytest.approx(plan.final_alpha, abs=1e-9)
        return max(worst, abs(np.linalg.norm(parts) - plan.final_sigma) / max(plan.final_sigma, 1e-2))

    scheduler.set_timesteps(10)
    if all(call.measure == "data" for call in scheduler.plan):
        assert deviation(10) < 1e-11
    else:
        errors = [deviation(steps) for steps in (100, 200)]
        assert errors[1] < 0.6 * errors[0]
        assert errors[1] < 0.2 or model != "vp"


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_plans_sample_the_mixture(name):
    """Mean and variance of 20,000 samples of a two-component mixture, within five standard errors and a small bias."""
    scheduler = SAMPLERS[name].build({**STABLE_DIFFUSION, "prediction_type": "sample"}, use_lu_lambdas=True)
    scheduler.set_timesteps(100)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    for k, call in enumerate(scheduler.plan):
        x = scheduler.step(MIXTURE.clean(x, call.alpha, call.sigma), scheduler.timesteps[k], x, generator=generator)[0]
    mean = float(MIXTURE.weights @ MIXTURE.means[:, 0])
    variance = float(MIXTURE.weights @ (MIXTURE.stds**2 + MIXTURE.means[:, 0] ** 2)) - mean**2
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / len(x)) + 0.01)
    assert float(x.var()) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("model", ["vp", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_prediction_types_are_one(name, model):
    """Epsilon, sample, v and flow wrappings of one model give one trajectory."""
    mixture = GaussianMixture.random(4, 6, seed=3)
    results = []
    for prediction_type in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        scheduler = SAMPLERS[name].build({**MODELS[model], "prediction_type": prediction_type}).manual_seed(1)
        scheduler.set_timesteps(8)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for k, call in enumerate(scheduler.plan):
            u = mixture.predict(x, call.alpha, call.sigma, prediction_type)
            x = scheduler.step(u, scheduler.timesteps[k], x, return_dict=False)[0]
        results.append(x)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_prediction_types_of_edm_are_one(name):
    mixture = GaussianMixture.random(4, 6, seed=3)
    results = []
    for prediction_type, sign in (("epsilon", 1.0), ("v_prediction", -1.0)):
        scheduler = SAMPLERS[name].build({**EDM, "prediction_type": prediction_type}).manual_seed(1)
        scheduler.set_timesteps(8)
        x = 80.0 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for k, call in enumerate(scheduler.plan):
            u = edm_output(mixture.clean(x, 1.0, call.sigma), x, call.sigma, 0.5, sign)
            x = scheduler.step(u, scheduler.timesteps[k], x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_is_its_samples(name):
    """Every sample of a batch equals its own run, bit for bit; its noise stream is its own."""
    scheduler = SAMPLERS[name].build(STABLE_DIFFUSION)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))

    def run(sample: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        scheduler.manual_seed(seeds).set_timesteps(6)
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.tanh(sample), t, sample, return_dict=False)[0]
        return sample

    together = run(x, [5, 6, 7])
    for k in range(3):
        assert torch.equal(run(x[k : k + 1], [5 + k])[0], together[k])
    # A batch that a pipeline doubled for guidance: both halves are the undoubled run.
    doubled = run(torch.cat([x, x]), [5, 6, 7])
    assert torch.equal(doubled[:3], together)
    assert torch.equal(doubled[3:], together)


@pytest.mark.parametrize("name", SAMPLERS)
def test_stated_entries(name):
    sampler = SAMPLERS[name]
    assert sampler.name == name
    assert sampler.order in range(1, 6)
    assert sampler.paper.startswith("arXiv ")
    scheduler = sampler.build(STABLE_DIFFUSION)
    scheduler.set_timesteps(5)
    assert scheduler.plan.is_stochastic == sampler.stochastic
    assert np.isfinite([c for call in scheduler.plan for row in call.rows for _, c in row.terms]).all()
