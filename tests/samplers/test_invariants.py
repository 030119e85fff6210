"""The invariants of the design, for every registered sampler at once: a new one is tested by being registered."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, PlanScheduler
from truth import MIXTURE

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
EDM = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
MODELS = {"vp": STABLE_DIFFUSION, "flow": FLOW, "edm": EDM}
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic]


def model_output(scheduler: PlanScheduler, call, sample: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """The network output whose clean sample is ``clean``: the conversion of the call, solved."""
    p, q = call.clean
    return (clean - p * sample) / q


def constants(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, 5, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 20])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_exact_on_straight_lines(name, steps, model):
    """A constant clean prediction c maps alpha_i c + sigma_i e to alpha_{i+1} c + sigma_{i+1} e at every call."""
    scheduler = SAMPLERS[name].build(MODELS[model])
    scheduler.set_timesteps(steps)
    clean, noise = constants()
    calls = scheduler.plan.calls
    x = calls[0].alpha * clean + calls[0].sigma * noise
    # Runge-Kutta stages multiply each other's rounding errors.
    conversion = max(abs(call.prediction[0]) for call in calls) * calls[0].sigma
    rounding = (1e-13 + 1e-15 * conversion) * scheduler.plan.amplification + 1e-14 * scheduler.plan.amplification**2
    for k, call in enumerate(calls):
        expected = call.alpha * clean + call.sigma * noise
        torch.testing.assert_close(x, expected, rtol=0, atol=rounding * max(1, call.sigma))
        u = model_output(scheduler, call, x, clean)
        x, predicted = scheduler.step(u, scheduler.timesteps[k], x, return_dict=False)
        torch.testing.assert_close(predicted, clean, rtol=0, atol=1e-10 * max(1.0, call.sigma / max(call.alpha, 1e-3)))
    end = scheduler.plan
    torch.testing.assert_close(x, end.final_alpha * clean + end.final_sigma * noise, rtol=0, atol=rounding)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_plans_keep_the_marginals(name):
    """With a constant clean prediction the variance at every call is sigma^2: propagated exactly, row by row."""
    scheduler = SAMPLERS[name].build(STABLE_DIFFUSION)
    if scheduler.config.algorithm_type == "sde-dpmsolver":
        pytest.skip("the noise form keeps the marginals in the limit of small steps only; see the next test")
    scheduler.set_timesteps(10)
    calls = [*scheduler.plan.calls]
    variance, mean = calls[0].sigma ** 2, calls[0].alpha
    for k, call in enumerate(calls):
        assert variance == pytest.approx(call.sigma**2, rel=1e-12)
        assert mean == pytest.approx(call.alpha, rel=1e-12)
        (row,) = [row for row in call.rows if row.out == "sample"]
        terms = dict(row.terms)
        state, noise = terms.get("sample", 0.0), terms.get("noise", 0.0)
        variance = state**2 * variance + noise**2
        mean = state * mean + sum(c for slot, c in terms.items() if slot not in ("sample", "noise"))
    assert variance == pytest.approx(scheduler.plan.final_sigma**2, abs=1e-15)


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


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_prediction_types_are_one(name):
    """Epsilon, sample, v and flow wrappings of one model give one trajectory."""
    mixture = GaussianMixture.random(4, 6, seed=3)
    results = []
    for prediction_type in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        scheduler = SAMPLERS[name].build({**STABLE_DIFFUSION, "prediction_type": prediction_type})
        scheduler.set_timesteps(8)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for k, call in enumerate(scheduler.plan):
            u = mixture.predict(x, call.alpha, call.sigma, prediction_type)
            x = scheduler.step(u, scheduler.timesteps[k], x, return_dict=False)[0]
        results.append(x)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-9)


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
