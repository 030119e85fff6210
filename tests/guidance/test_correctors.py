"""Correctors on every schedule and in pipelines: weights, normalising constants, recorded branches of guidance."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from analytic import EDM, FLOW, MIXTURE, STABLE_DIFFUSION, network_of
from exact_laws import FIRST, SECOND, GridLaw, deviation, log_density, run, shares, tensor
from fewstep.guidance import FeynmanKacScheduler, GuidanceBranches, RewardTilt, finite_variance_churn
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, Denoiser
from pipelines.analytic import GaussianDenoiser, guided_mean, vp_level
from pipelines.tiny import CASES, batched, pndm, seeded

VP = {**STABLE_DIFFUSION, "use_karras_sigmas": True}
# The error of a mean over eight groups is estimated from them: 4 of it are less rare than 3 of a known one.
GROUPS, PARTICLES = 8, 512


def scheduler_of(exponents: list[float], config: dict[str, Any] = VP, steps: int = 200, **options: Any) -> Any:
    options = {"particles": PARTICLES, "seeds": 0, **options}
    scheduler = FeynmanKacScheduler.from_config(config, exponents=exponents, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def end_variance(scheduler: Any) -> float:
    """Of the noise at the last level above 0, whose density is the target."""
    call = scheduler.plan.calls[-1]
    return float((call.sigma / call.alpha) ** 2)


def with_second(scheduler: Any) -> Any:
    return (
        scheduler.with_experts(network_of(scheduler, SECOND.clean))
        if len(scheduler.config.exponents) == 2
        else scheduler
    )


def law(exponents: list[float], variance: float = 0.0, first: GaussianMixture = FIRST) -> GridLaw:
    return GridLaw(
        lambda x: sum(g * log_density(m, x, variance) for g, m in zip(exponents, (first, SECOND), strict=False))
    )


@pytest.mark.parametrize("config", [VP, EDM, {**FLOW, "flow_shift": 1.0}], ids=["vp", "edm", "flow"])
def test_annealing_on_every_schedule(config: dict[str, Any]) -> None:
    scheduler = scheduler_of([2.0], config)
    x = run(scheduler, FIRST, GROUPS * PARTICLES)
    truth = law([2.0], end_variance(scheduler))
    assert deviation(shares(x.view(GROUPS, PARTICLES)), truth.shares()) < 4
    assert truth.divergence(x) < 0.05
    assert len(scheduler.plan) == 201


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, EDM, FLOW], ids=["vp", "edm", "flow"])
def test_few_steps_of_default_grids(config: dict[str, Any]) -> None:
    """Fifty: over long steps with churn, a trapezium of weights or a straight line of predictions would go astray."""
    scheduler = scheduler_of([2.0], config, steps=50)
    truth = law([2.0], end_variance(scheduler))
    assert truth.divergence(run(scheduler, FIRST, GROUPS * PARTICLES)) < 0.02
    assert min(float(size.min()) for size in scheduler.population.history[1:-1]) > PARTICLES / 5


@pytest.mark.parametrize("exponent", [0.5, 2.0])
@pytest.mark.parametrize("steps", [100, 400])
def test_normalising_constants(exponent: float, steps: int) -> None:
    """Of the end over that of the start, where the mixture is a point in a wide Gaussian."""
    scheduler = scheduler_of([exponent], steps=steps, final_sigmas_type="sigma_min")
    run(scheduler, FIRST, GROUPS * PARTICLES)
    start, end = scheduler.plan.calls[0], scheduler.plan
    ends = [(start.sigma / start.alpha) ** 2, (end.final_sigma / end.final_alpha) ** 2]
    top = -0.5 * math.log(2 * math.pi * ends[0])
    log_start = exponent * top + 0.5 * math.log(2 * math.pi * ends[0] / exponent)
    expected = law([exponent], ends[1]).log_z - log_start
    found = float(scheduler.population.log_evidence.exp().mean().log())
    assert found == pytest.approx(expected, abs=0.12 if steps == 100 else 0.06)


@pytest.mark.parametrize("churn", [0.0, 1.0, None])
def test_any_churn_has_the_same_target(churn: float | None) -> None:
    """An annealed Gaussian has ``1 / beta`` of the variance."""
    data = GaussianMixture(tensor([[0.0]]), tensor([0.6]), tensor([1.0]))
    scheduler = scheduler_of([2.0], churn=churn)
    x = run(scheduler, data, GROUPS * PARTICLES).view(GROUPS, PARTICLES)
    expected = (0.36 + end_variance(scheduler)) / 2
    assert float(x.var(1).mean()) == pytest.approx(expected, rel=0.1)


def test_product_of_equal_models_is_annealing() -> None:
    """Drift, noise and weights are the same numbers."""
    results = []
    for exponents in ([2.0], [1.0, 1.0]):
        scheduler = scheduler_of(exponents, steps=20)
        if len(exponents) == 2:
            scheduler.with_experts(network_of(scheduler, FIRST.clean))
        results.append((run(scheduler, FIRST, 2 * PARTICLES), scheduler.population.log_evidence))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-9)


def test_exponent_one_is_the_reverse_sde() -> None:
    """All weights equal, and the run of the plan alone, bit for bit."""
    for config in (VP, EDM, FLOW):
        scheduler = scheduler_of([1.0], config, steps=20, threshold=1.0)
        x = run(scheduler, FIRST, PARTICLES)
        assert (scheduler.population.log_weights == 0).all()
        scheduler._guidance = None
        scheduler.set_timesteps(20)
        assert torch.equal(run(scheduler, FIRST, PARTICLES), x)
        first = scheduler_of([1.0], config, steps=20, solver_order=1, particles=64)
        known = SAMPLERS["sde-dpm++1"].build(config)
        known.set_timesteps(20)
        torch.testing.assert_close(run(first, FIRST, 64), run(known, FIRST, 64), rtol=1e-9, atol=1e-9)


def test_average_of_equal_models_has_equal_weights() -> None:
    scheduler = scheduler_of([-0.5, 1.5], steps=20)
    scheduler.with_experts(network_of(scheduler, FIRST.clean))
    x = run(scheduler, FIRST, PARTICLES)
    assert scheduler.population.log_evidence.abs().max() < 1e-9
    torch.testing.assert_close(x, run(scheduler_of([1.0], steps=20), FIRST, PARTICLES), rtol=1e-6, atol=1e-6)


def test_tilted_annealing() -> None:
    """``q^2 exp(r)`` with a linear reward: mixture and Gaussian tilt in one."""
    scheduler = scheduler_of([2.0], every=2).tilt(RewardTilt(lambda x: -x[:, 0], 0.8))
    x = run(scheduler, FIRST, GROUPS * PARTICLES)
    base = end_variance(scheduler)
    truth = GridLaw(lambda v: 2.0 * log_density(FIRST, v, base) - 0.8 * v)
    assert deviation(shares(x.view(GROUPS, PARTICLES)), truth.shares()) < 4
    assert abs(truth.mean - law([2.0]).mean) > 0.3
    assert float(x.mean()) == pytest.approx(truth.mean, abs=0.15)


# ----------------------------------------------------------------------------------------- guidance in pipelines


@pytest.mark.parametrize(
    ("case", "scale"),
    [("sd", 7.5), ("sdxl", 5.0), ("sd3", 7.0), ("flux-dynamic", 2.0), ("dit", 4.0), ("dit-learned", 4.0)],
)
def test_branches_are_recorded_in_unmodified_pipelines(case: str, scale: float) -> None:
    """``w (w - 1) |c - u|^2`` at every step, against the branches of the pipeline's denoiser."""
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS["dpm++"].build(pipe.scheduler.config)
    inputs = batched(chosen.inputs(), 2)
    denoiser = Denoiser.from_pipeline(chosen.build(), **inputs)
    recorder = GuidanceBranches(pipe)
    original, found = pipe.scheduler.step, []

    def step(model_output: torch.Tensor, t: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        value = recorder.take(model_output[:, : sample.shape[1]])
        x = sample.chunk(2)[0] if case.startswith("dit") else sample
        conditional, unconditional = denoiser.branches(pipe.scheduler.scale_model_input(x, t), t)
        expected = scale * (scale - 1) * (conditional - unconditional).flatten(1).double().square().sum(1)
        found.append((value, expected.repeat(len(sample) // len(x))))
        recorder._outputs.clear()  # of the denoiser, whose network is the same
        return original(model_output, t, sample, **kwargs)

    step.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    pipe.scheduler.step = step
    pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(1), **inputs)
    assert len(found) == 3
    for value, expected in found:
        torch.testing.assert_close(value, expected, rtol=5e-3, atol=1e-6)
        assert (value > 0).all()
    recorder.remove()
    pipe.scheduler.step = original
    pipe(num_inference_steps=1, **inputs)
    assert not recorder._outputs


def test_calls_that_are_no_branches_are_refused() -> None:
    class Pipeline:
        unet = torch.nn.Identity()

    recorder = GuidanceBranches(Pipeline())
    x = torch.randn(2, 3, 4, 4)
    Pipeline.unet((x,))
    assert recorder.take(x) is None
    for _ in range(3):
        Pipeline.unet((x,))
    with pytest.raises(ValueError, match="two branches"):
        recorder.take(x)


def test_guided_gaussians_in_stable_diffusion() -> None:
    """Equal covariances: all weights are equal, and the law is the Gaussian around the guided mean."""
    pipe = CASES["sd"].build()
    pipe.scheduler = FeynmanKacScheduler.from_config(pndm().config, particles=4, seeds=0).manual_seed(0)
    pipe.unet = GaussianDenoiser(pipe.unet, vp_level(pipe.scheduler.alphas_cumprod), spread=0.5, flow=False)
    pipe.scheduler.correct_guidance(pipe)
    inputs = batched(CASES["sd"].inputs(), 4)
    latents = CASES["sd"].call(pipe, 30, guidance_scale=3.0, latents=seeded(4, 4, 8, 8, seed=3), **inputs)
    sizes = torch.stack(pipe.scheduler.population.history)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 4.0), rtol=1e-4, atol=0)
    mean = guided_mean(CASES["sd"].inputs(), 3.0)
    assert float(latents.mean()) == pytest.approx(mean, abs=4 * 0.5 / math.sqrt(latents.numel()) + 0.02)
    assert float(latents.std()) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="guidance_rescale"):
        CASES["sd"].call(pipe, 3, guidance_rescale=0.5, **inputs)


class _Branching(torch.nn.Module):
    """Both mixtures' predictions as one batch, as networks of guided pipelines return them."""

    def __init__(self, networks: list[Any]) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cat([network(x, t) for network in self.networks]),)


def test_corrected_guidance_is_the_geometric_average() -> None:
    """What two experts with exponents ``1 - w`` and ``w`` give, from the guided prediction and recorded branches."""
    scheduler = scheduler_of([1.0], steps=60)

    class Pipeline:
        unet = _Branching([network_of(scheduler, m.clean) for m in (FIRST, SECOND)])

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        first, second = Pipeline.unet(x, t)[0].chunk(2)
        return first + 1.5 * (second - first)

    scheduler.correct_guidance(Pipeline())
    found = run(scheduler, FIRST, PARTICLES, network=guided)
    experts = with_second(scheduler_of([-0.5, 1.5], steps=60))
    torch.testing.assert_close(found, run(experts, FIRST, PARTICLES), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scheduler.population.log_evidence, experts.population.log_evidence, rtol=1e-6, atol=1e-6)


def test_experts_from_pipelines() -> None:
    """Another prompt of the same model as the expert: a product of two conditions, in Stable Diffusion."""
    pipe = CASES["sd"].build()
    config = pipe.scheduler.config
    inputs = batched(CASES["sd"].inputs(), 4)
    other = {**inputs, "prompt_embeds": inputs["prompt_embeds"] + 1.0}
    expert = Denoiser.from_pipeline(CASES["sd"].build(), **other)
    pipe.scheduler = FeynmanKacScheduler.from_config(config, exponents=[0.5, 0.5], particles=4, seeds=0).manual_seed(0)
    pipe.scheduler.with_experts(expert)
    mixed = CASES["sd"].call(pipe, 4, **inputs)
    assert expert.calls == 4
    pipe.scheduler = FeynmanKacScheduler.from_config(config, particles=4, seeds=0).manual_seed(0)
    assert not torch.equal(CASES["sd"].call(pipe, 4, **inputs), mixed)
    flow = Denoiser.from_pipeline(CASES["sd3"].build(), **CASES["sd3"].inputs())
    with pytest.raises(ValueError, match="another process"):
        FeynmanKacScheduler.from_config(config, exponents=[1.0, 1.0]).with_experts(flow)


# ----------------------------------------------------------------------------------------- options


def test_churn_by_the_variance_condition() -> None:
    """``beta zeta^2 >= 5.83 (beta - 1)``."""
    for exponent in (1.5, 2.0, 4.0):
        assert exponent * (1 + finite_variance_churn(exponent)) == pytest.approx(5.828427 * (exponent - 1))
    assert finite_variance_churn(1.2) == finite_variance_churn(1.0) == finite_variance_churn(0.3) == 0.0


def test_options_are_saved_and_other_configs_are_read(tmp_path: Any) -> None:
    scheduler = FeynmanKacScheduler.from_config(
        DPMSolverMultistepScheduler(**STABLE_DIFFUSION).config,
        exponents=(0.5, 0.7),
        churn=0.2,
        particles=3,
        seeds=[1, 2],
    )
    scheduler.save_pretrained(tmp_path)
    again = FeynmanKacScheduler.from_pretrained(tmp_path)
    assert again.config.exponents == [0.5, 0.7]
    assert (again.config.churn, again.config.particles, again.config.seeds) == (0.2, 3, [1, 2])
    assert again.config.beta_schedule == "scaled_linear"
    for one in (scheduler, again):
        one.set_timesteps(5)
    assert scheduler.plan == again.plan


def test_pipelines_are_saved_with_it(tmp_path: Any) -> None:
    pipe = CASES["dit"].build()
    pipe.scheduler = FeynmanKacScheduler.from_config(pipe.scheduler.config, exponents=[1.1], particles=3)
    pipe.save_pretrained(tmp_path)
    scheduler = DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert isinstance(scheduler, FeynmanKacScheduler)
    assert (scheduler.config.exponents, scheduler.config.particles) == ([1.1], 3)


def test_unguided_classes_are_no_branches() -> None:
    """DiT without guidance: the batch is not doubled."""
    pipe = CASES["dit"].build()
    pipe.scheduler = FeynmanKacScheduler.from_config(pipe.scheduler.config, particles=2, seeds=0).manual_seed(0)
    pipe.scheduler.correct_guidance(pipe)
    CASES["dit"].call(pipe, class_labels=[1, 1], guidance_scale=1.0)
    assert pipe.scheduler.population.log_evidence.tolist() == [0.0]
    CASES["dit"].call(pipe, class_labels=[1, 1], guidance_scale=2.0)
    first, second = pipe.scheduler.population.log_evidence.tolist()
    assert first == second != 0.0
    pipe.scheduler.correct_guidance(None)
    assert not pipe.transformer._forward_hooks


def test_starting_inside_the_run() -> None:
    """Image to image begins with the right noise: nothing is scaled."""
    scheduler = scheduler_of([2.0], steps=10)
    assert len(scheduler.plan) == 11
    scheduler.set_begin_index(4)
    assert len(scheduler.plan) == 7
    assert scheduler.plan.calls[0].level == scheduler._plan.calls[4].level
    scheduler = scheduler_of([1.0], FLOW, steps=10)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 10))
    x = run(scheduler, MIXTURE, PARTICLES)
    assert torch.isfinite(x).all()
    with pytest.raises(ValueError, match="cannot start from alpha = 0"):
        scheduler_of([2.0], FLOW).set_timesteps(sigmas=np.linspace(1.0, 0.1, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponents": []}, r"exponents \[\]"),
        ({"exponents": [1.0, -1.0]}, "a sum above 0"),
        ({"exponents": [math.nan]}, "exponents"),
        ({"churn": -1.0}, "churn -1.0"),
        ({"solver_order": 3}, "solver_order 3"),
        ({"preset": "accurate"}, "preset"),
        ({"particles": 0}, "particles 0"),
        ({"finish": "best"}, "finish 'best'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeynmanKacScheduler(**options)


def test_missing_experts_are_an_error() -> None:
    scheduler = scheduler_of([1.0, 1.0], steps=5)
    with pytest.raises(ValueError, match="with_experts"):
        run(scheduler, FIRST, PARTICLES)
    with pytest.raises(ValueError, match="one expert each"):
        scheduler.with_experts()
    with pytest.raises(ValueError, match="tilt"):
        scheduler.guide(None)
    with pytest.raises(ValueError, match="neither unet nor transformer"):
        scheduler.correct_guidance(object())
