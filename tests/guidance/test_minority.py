"""Minority guidance against what is known exactly: mixtures' posteriors, and one Gaussian's reconstructions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from analytic import ZERO_SNR, network_of
from exact_laws import CUTS, FIRST, run, shares, tensor
from fewstep.guidance import MinorityGuidance, SelfMinorityGuidance
from fewstep.metrics import GaussianMixture
from fewstep.samplers import Denoiser, DPMSolverPPScheduler
from fewstep.samplers.guided import Guidance, GuidedStep
from pipelines.loops import build, every_kind_and_edm, every_sampler
from pipelines.loops import run as run_loop
from pipelines.loops import start as start_loop
from pipelines.tiny import CASES, batched, seeded

# Two classes, common and rare, and how often each mode of the mixture is of which.
CLASSES = tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])

KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "sample": {"prediction_type": "sample"},
    "v": ZERO_SNR,
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "edm": {"sigma_data": 0.5},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def exact_classifier(mixture: GaussianMixture, classes: torch.Tensor) -> Any:
    """Logits of the posterior ``p(class | x_t)`` of a mixture whose modes have the given class shares."""

    def logits(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        variance = alpha**2 * mixture.stds**2 + sigma**2
        away = (x[:, None] - alpha * mixture.means).square().sum(2)
        log_joint = mixture.weights.log() - 0.5 * away / variance - 0.5 * x.shape[1] * variance.log()
        return (log_joint[:, :, None] + classes.log()).logsumexp(1)

    return logits


def tilted(mixture: GaussianMixture, classes: torch.Tensor, target: int) -> GaussianMixture:
    """The data of a class."""
    return GaussianMixture(mixture.means, mixture.stds, mixture.weights * classes[:, target])


def scheduler_of(kind: str, steps: int = 40, **options: Any) -> DPMSolverPPScheduler:
    scheduler = DPMSolverPPScheduler(**{**KINDS[kind], **options})
    scheduler.set_timesteps(steps)
    return scheduler


class Compare(Guidance):
    """Notes how far guided predictions are from those of another mixture, relative to what guidance changed."""

    def __init__(self, guidance: Guidance, truth: GaussianMixture) -> None:
        self.guidance, self.truth = guidance, truth
        self.errors: list[float] = []
        self.changes: list[float] = []

    def act(self, step: GuidedStep) -> None:
        before = step.clean
        self.guidance.act(step)
        expected = self.truth.clean(step.sample, step.call.alpha, step.call.sigma)
        self.errors.append(float((step.clean - expected).abs().max()))
        self.changes.append(float((step.clean - before).abs().max()))


@every_kind
def test_guidance_by_the_exact_posterior_gives_the_predictions_of_the_class(kind: str) -> None:
    scheduler = scheduler_of(kind, 12)
    target = tilted(FIRST, CLASSES, 1)
    compared = Compare(MinorityGuidance(exact_classifier(FIRST, CLASSES), 1, 1.0), target)
    run(scheduler.guide(compared), FIRST, 64)
    # Labels and coefficients of EDM and of zero terminal SNR are known in single precision.
    assert max(compared.errors[1:]) < 1e-4
    assert max(compared.changes) > 0.1
    # At pure noise alone nothing is known, and nothing done.
    assert (scheduler.plan.calls[0].alpha == 0.0) == (compared.changes[0] == 0.0)


@pytest.mark.parametrize("kind", ["epsilon", "flow", "edm"])
def test_guidance_shifts_the_shares_of_modes_to_those_of_the_class(kind: str) -> None:
    classifier = exact_classifier(FIRST, CLASSES)
    # In one dimension the flow keeps the order: quantiles of the noise give shares without any chance.
    start = torch.special.ndtri((torch.arange(2000).double() + 0.5) / 2000)[:, None]

    def found(target: int, scale: float) -> torch.Tensor:
        scheduler = scheduler_of(kind, 60, **({"timestep_spacing": "trailing"} if kind == "epsilon" else {}))
        scheduler.guide(MinorityGuidance(classifier, target, scale))
        network = network_of(scheduler, FIRST.clean)
        x = start * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        return shares(x.view(1, -1), CUTS)[0]

    base = found(1, 0.0)
    for target in (0, 1):
        truth = tilted(FIRST, CLASSES, target)
        # Modes overlap a little: shares between the cuts, not weights.
        exact = torch.stack([_mass(truth, a, b) for a, b in zip((-99, *CUTS), (*CUTS, 99), strict=True)])
        guided = found(target, 1.0)
        torch.testing.assert_close(guided, exact, rtol=0, atol=0.01)
        assert float((base - exact).abs().max()) > 0.1
        # Stronger guidance goes on in the same direction, from the commonest mode of the class to its opposite.
        mode = 0 if target == 0 else 2
        stronger = found(target, 3.0)[mode]
        assert stronger > guided[mode] > base[mode]


def _mass(mixture: GaussianMixture, low: float, high: float) -> torch.Tensor:
    ends = (tensor([low, high])[:, None] - mixture.means[:, 0]) / mixture.stds / math.sqrt(2.0)
    return (mixture.weights * (torch.erf(ends[1]) - torch.erf(ends[0]))).sum() / 2


def linear(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    return torch.stack([x.flatten(1).mean(1), x.flatten(1).sum(1)], 1)


def nothing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    raise AssertionError("no call is needed")


@every_sampler
@every_kind_and_edm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_zero_leaves_every_sampler_bit_identical(name: str, kind: str, dtype: torch.dtype) -> None:
    x = start_loop(2, dtype)
    expected = run_loop(build(name, kind), x)
    scheduler = build(name, kind)
    late = 0.0 if kind == "edm" else 800.0
    for guidance in (
        MinorityGuidance(linear, 1, 0.0),
        SelfMinorityGuidance(nothing, scheduler, scale=0.0, timestep=late),
    ):
        assert torch.equal(run_loop(build(name, kind).guide(guidance), x), expected)


def test_one_class_alone_changes_nothing() -> None:
    """Its probability is 1 everywhere."""
    x = start_loop()
    guidance = MinorityGuidance(lambda x, a, s: linear(x, a, s)[:, :1], 0, 5.0)
    torch.testing.assert_close(run_loop(build("dpm++", "vp").guide(guidance), x), run_loop(build("dpm++", "vp"), x))


def test_several_targets_are_their_union() -> None:
    three = torch.cat([CLASSES * tensor([1.0, 0.5]), CLASSES[:, 1:] * 0.5], 1)
    results = []
    for classes, target in ((CLASSES, 1), (three, [1, 2])):
        guidance = MinorityGuidance(exact_classifier(FIRST, classes), target, 2.0)  # type: ignore[arg-type]
        results.append(run(scheduler_of("epsilon", 10).guide(guidance), FIRST, 16))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ self-guided

MEAN, STD = tensor([[0.3, -0.7, 1.1]]), tensor([0.6])
GAUSSIAN = GaussianMixture(MEAN, STD, tensor([1.0]))


@every_kind
def test_the_gradient_of_one_gaussian_is_its_closed_form(kind: str) -> None:
    """Both predictions are linear in the sample, so ``g`` is along ``clean - again``."""
    scheduler = scheduler_of(kind, 8)
    late = 0.25 * math.log(2.0) if kind == "edm" else 700.0
    level = float(scheduler.schedule.level(late))
    network = network_of(scheduler, GAUSSIAN.clean)
    scale = 0.3
    guidance = SelfMinorityGuidance(network, scheduler, scale=scale, timestep=late, seeds=5, every=2)
    found: list[tuple[GuidedStep, torch.Tensor, torch.Tensor]] = []

    class Watch(Guidance):
        def act(self, step: GuidedStep) -> None:
            before = step.clean
            guidance.start(GuidedRunLike(step))
            guidance.act(step)
            found.append((step, before, step.clean - before))

    run(scheduler.guide(Watch()), GAUSSIAN, 4)
    alpha_s, sigma_s = (float(v) for v in scheduler.schedule.alpha_sigma(level))
    acted = 0
    for step, clean, change in found:
        alpha, sigma = step.call.alpha, step.call.sigma
        if step.index % 2 or alpha == 0.0:
            assert float(change.abs().max()) == 0.0
            continue
        noise = guidance._streams.draw(step.index, step.sample.shape, torch.device("cpu"), torch.float64)
        again = GAUSSIAN.clean(alpha_s * clean + sigma_s * noise, alpha_s, sigma_s)
        direction = (clean - again) / (clean - again).abs().amax(1, keepdim=True)
        rho = sigma / alpha
        torch.testing.assert_close(change, scale * rho**2 / math.hypot(1.0, rho) * direction, rtol=1e-3, atol=1e-4)
        acted += 1
    assert acted >= 3


class GuidedRunLike:
    def __init__(self, step: GuidedStep) -> None:
        self.sample = step.sample


def test_a_scale_means_the_same_for_every_schedule() -> None:
    """Runs through the same signal-to-noise ratios, VP and EDM, end alike where both are exact."""
    levels = [8.0, 4.0, 2.0, 1.0, 0.5]
    changes = []
    for kind, late in (("epsilon", 700.0), ("edm", 0.0)):
        scheduler = DPMSolverPPScheduler(**KINDS[kind])
        if kind == "edm":
            late = 0.25 * math.log(float(DPMSolverPPScheduler().schedule.level(700.0)))
        scheduler.set_timesteps(sigmas=levels)
        network = network_of(scheduler, GAUSSIAN.clean)
        scheduler.guide(SelfMinorityGuidance(network, scheduler, scale=0.2, timestep=late, seeds=3))
        alpha = scheduler.plan.calls[0].alpha
        x = alpha * (GAUSSIAN.sample(8, torch.Generator().manual_seed(0)) + 8.0 * seeded(8, 3, seed=1).double())
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        changes.append(x)
    torch.testing.assert_close(*changes, rtol=1e-3, atol=2e-3)


def test_samples_move_away_from_the_mode() -> None:
    base = run(scheduler_of("epsilon", 20), GAUSSIAN, 256)
    scheduler = scheduler_of("epsilon", 20)
    network = network_of(scheduler, GAUSSIAN.clean)
    guided = run(scheduler.guide(SelfMinorityGuidance(network, scheduler, scale=0.3, timestep=800.0)), GAUSSIAN, 256)
    distances = [(x - MEAN).norm(dim=1).mean() for x in (base, guided)]
    assert distances[1] > 1.1 * distances[0]


# ------------------------------------------------------------------------------------------------ in pipelines


def mean_classifier(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The brighter, the more of class 1."""
    mean = x.flatten(1).mean(1) * alpha / (alpha**2 + sigma**2)
    return torch.stack([torch.zeros_like(mean), 40.0 * mean], 1)


@pytest.mark.parametrize("case", ["sd", "sdxl-edm", "sd3", "flux", "dit", "dit-learned", "ddpm"])
def test_classifiers_steer_every_pipeline(case: str) -> None:
    pipe, inputs = CASES[case].build(), CASES[case].inputs()
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    base = CASES[case].call(pipe, **inputs)
    means = []
    for target in (0, 1):
        pipe.scheduler.guide(MinorityGuidance(mean_classifier, target, 0.3))
        means.append(float(CASES[case].call(pipe, **inputs).float().mean()))
    assert means[0] < float(base.float().mean()) < means[1]
    pipe.scheduler.guide(None)
    assert torch.equal(CASES[case].call(pipe, **inputs), base)


@pytest.mark.parametrize("case", ["sd", "sd3", "flux", "dit", "ddpm"])
def test_models_steer_themselves_in_pipelines(case: str) -> None:
    pipe = CASES[case].build()
    inputs = {"batch_size": 2} if case == "ddpm" else batched(CASES[case].inputs(), 2)
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    base = CASES[case].call(pipe, **inputs)
    denoiser = Denoiser.from_pipeline(pipe, **_of_denoiser(case, inputs))
    guidance = SelfMinorityGuidance(denoiser, pipe.scheduler, scale=0.2, timestep=800.0)
    calls = denoiser.calls
    pipe.scheduler.guide(guidance)
    guided = CASES[case].call(pipe, **inputs)
    used = denoiser.calls - calls
    acting = sum(call.alpha > 0.0 for call in pipe.scheduler.plan)
    assert used == 2 * acting
    assert denoiser.evaluations >= used * denoiser.batch_size
    assert bool(torch.isfinite(guided).all())
    assert not torch.equal(guided, base)
    assert torch.equal(CASES[case].call(pipe, **inputs), guided)


def _of_denoiser(case: str, inputs: dict[str, Any]) -> dict[str, Any]:
    dropped = ("generator", "num_inference_steps", "output_type", "latents", "batch_size")
    kept = {key: value for key, value in inputs.items() if key not in dropped}
    return {**kept, "num_images_per_prompt": 2} if case == "ddpm" else kept


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    scheduler = scheduler_of("epsilon", 4)
    with pytest.raises(ValueError, match=r"scale -1\.0 must be finite and at least 0; target=0"):
        MinorityGuidance(linear, 0, -1.0)
    with pytest.raises(ValueError, match="scale nan must be finite"):
        SelfMinorityGuidance(nothing, scheduler, scale=math.nan, timestep=800.0)
    with pytest.raises(ValueError, match="every 0 must be at least 1"):
        SelfMinorityGuidance(nothing, scheduler, scale=1.0, timestep=800.0, every=0)
    edm = scheduler_of("edm", 4)
    with pytest.raises(ValueError, match=r"timestep 800\.0 lies outside the model's training"):
        SelfMinorityGuidance(nothing, edm, scale=1.0, timestep=800.0)

    def runs(guidance: Guidance) -> None:
        run(copy.deepcopy(scheduler).guide(guidance), GAUSSIAN, 2)

    with pytest.raises(ValueError, match="label 2 must lie in 0 to 1"):
        runs(MinorityGuidance(linear, 2, 1.0))
    with pytest.raises(ValueError, match=r"classifier returned \(2,\); return logits \(2, classes\)"):
        runs(MinorityGuidance(lambda x, a, s: x.sum(1), 0, 1.0))
    with pytest.raises(ValueError, match="classifier has no gradient"):
        runs(MinorityGuidance(lambda x, a, s: linear(x.detach(), a, s), 0, 1.0))
    network = network_of(scheduler, GAUSSIAN.clean)
    with pytest.raises(ValueError, match=r"distance returned \(2, 3\); return a tensor \(2,\)"):
        runs(SelfMinorityGuidance(network, scheduler, scale=1.0, timestep=800.0, distance=torch.sub))
    with pytest.raises(ValueError, match="distance has no gradient"):
        runs(
            SelfMinorityGuidance(
                network, scheduler, scale=1.0, timestep=800.0, distance=lambda a, b: (a - b).detach().sum(1)
            )
        )
