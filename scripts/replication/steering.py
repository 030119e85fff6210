"""Claims on steering: Feynman-Kac correctors and steering, SVDD, trees, rare samples, search, masked diffusion."""

from __future__ import annotations

import functools
import itertools

import torch
from diffusers import DiTPipeline

from fewstep.guidance import RandomSearch, ZeroOrderSearch, decoder_of
from fewstep.metrics import DigitsClassifier, Estimate
from fewstep.samplers import SAMPLERS, Denoiser, sample

from ..bench.digits import real_digits
from ..bench.minority import RARITY, REFERENCE, Bench, real_features
from ..bench.steer_methods import METHODS, Sampling, class_reward
from ..generation.model import load_model
from . import known_laws, masked
from .claims import Claim, Finding, Measurement, Rule, Scale, percent
from .known_laws import mean_of

_TARGET = 8
_RUNS = 4
"""Whole runs an image that methods may spend."""


# ---------------------------------------------------------------- one digit from a model of all


def _classifier() -> DigitsClassifier:
    return DigitsClassifier.bundled().requires_grad_(False)


@functools.cache
def _pipeline(model: str) -> DiTPipeline:
    pipeline = load_model(model, "float32", "cpu").pipeline
    pipeline.vae.requires_grad_(False)
    return pipeline


@functools.cache
def _rewards(model: str, method: str, runs: int, seeds: int, count: int) -> torch.Tensor:
    """Mean log-probability of the target, ``(seeds,)``, of sets of images by one method."""
    pipeline = _pipeline(model)
    reward = class_reward(pipeline, _classifier(), [_TARGET], f"class {_TARGET}")
    found = []
    for seed in range(seeds):
        sampling = Sampling(
            pipeline, reward, sampler="sde-dpm++", steps=10, count=count, scale=5.0, seed=seed, batch_size=100
        )
        ((_, latents),) = METHODS[method](sampling, [runs])
        found.append(float(reward(latents, "the end").double().mean()))
    return torch.tensor(found, dtype=torch.float64)


def _against(scale: Scale, method: str, runs: int, baseline: str, more: int, rule: Rule) -> Finding:
    """Gain in mean reward over a baseline with ``more`` times the calls; a loss where none shall show."""
    seeds, count = (8, 16) if scale.quick else (10, 100)
    own = _rewards(scale.model, method, runs, seeds, count)
    other = _rewards(scale.model, baseline, more * runs, seeds, count)
    with_calls = "equal calls" if more == 1 else f"{more} times the calls"
    setting = f"{scale.model}, digit {_TARGET}, {runs} runs an image, {method} against {baseline} at {with_calls}"
    if rule == "at least":
        return mean_of(f"{setting}: gain in log-probability", own - other, "at least")
    return mean_of(f"{setting}: loss of log-probability", other - own, "no more than")


def _feynman_kac(scale: Scale) -> Measurement:
    on_digits = _against(scale, "fk", _RUNS, "best-of-n", 1, "at least")
    return Measurement([*known_laws.steering(scale).findings, on_digits])


def _svdd(scale: Scale) -> Measurement:
    baselines = ("best-of-n", "smc")
    return Measurement([_against(scale, "svdd-greedy", _RUNS, name, 1, "at least") for name in baselines])


def _tree_search(scale: Scale) -> Measurement:
    times = (1, 2) if scale.quick else (1, 2, 5)
    return Measurement([_against(scale, "dts-star", _RUNS, "best-of-all", more, "no more than") for more in times])


# ---------------------------------------------------------------- rare digits


def _minority(scale: Scale) -> Measurement:
    count, strengths = (200, (1.0,)) if scale.quick else (1000, (0.5, 1.0))
    reference = (
        _generated(300 if scale.quick else 2000)
        if scale.data is None
        else real_features(real_digits(scale.data, "test"), REFERENCE)[0]
    )
    bench = Bench(scale.model, "dpm++", 10, count, [9], reference)
    findings = []
    for guidance in (2.0,) if scale.quick else (1.0, 2.0):
        base = bench.measure("minority", guidance, 0.0)
        for strength in strengths:
            point = bench.measure("minority", guidance, strength)
            setting = f"{scale.model}, guidance {guidance:g}, scale {strength:g}"
            for name, measure in RARITY.items():
                figures = percent(base.figures[name], point.figures[name])
                findings.append(Finding(f"{setting}: {measure.title}", *figures, 0.0, "at least"))
            loss = base.figures["agreement"] - point.figures["agreement"]
            points = Estimate(100.0 * loss.value, tuple(100.0 * one for one in loss.left_out))
            title = f"{setting}: loss of agreement, points"
            findings.append(Finding(title, points.value, *points.interval(), 0.0, "no more than", ""))
    return Measurement(findings)


def _generated(count: int) -> torch.Tensor:
    """Features of digits of the large model without guidance, in the place of real ones."""
    bench = Bench("digits-large", "dpm++", 10, count, [9], torch.empty(0))
    return bench.features("minority", 1.0, 0.0)


# ---------------------------------------------------------------- search over noises


def _search(scale: Scale) -> Measurement:
    """Each group of candidates searches for a digit of its own, with a model that is told none."""
    groups, budgets, steps, final = (30, (1, 4, 16), 5, 10) if scale.quick else (100, (1, 4, 16, 64), 5, 20)
    pipeline = _pipeline(scale.model)
    classifier, decode = _classifier(), decoder_of(pipeline)
    wanted = torch.arange(groups)[:, None] % 10
    no_class = [pipeline.transformer.config.num_embeds_ada_norm] * groups

    def reward(latents: torch.Tensor) -> torch.Tensor:
        return classifier(2.0 * decode(latents) - 1.0).log_softmax(1).gather(1, wanted).squeeze(1)

    findings = []
    for name, search in (("random", RandomSearch), ("zero-order", ZeroOrderSearch)):
        denoiser = Denoiser.from_pipeline(pipeline, class_labels=no_class, guidance_scale=1.0)
        scheduler = SAMPLERS["dpm++"].build(pipeline.scheduler.config)
        # One candidate a round: a budget is a number of rounds.
        searching = search(denoiser, scheduler, steps, reward, candidates=1, seed=0)
        rewards: dict[int, torch.Tensor] = {}
        for budget in budgets:
            found = searching.run((budget - max(rewards, default=0)) * searching.cost)
            # What was found with few steps is judged with more.
            judged = SAMPLERS["dpm++"].build(pipeline.scheduler.config)
            rewards[budget] = reward(sample(denoiser, judged, final, latents=found.noise))
        for less, more in itertools.pairwise(budgets):
            setting = f"{scale.model}, {name} search, {more} candidates instead of {less}"
            findings.append(mean_of(f"{setting}: gain in log-probability", rewards[more] - rewards[less], "at least"))
    return Measurement(findings)


_STEER = "fewstep bench steer --data mnist.npz"
CLAIMS = (
    Claim(
        "fkc",
        "2503.02819",
        "Feynman-Kac correctors",
        "Weights make powers, products and geometric averages of models what they claim to be; scaled scores do not.",
        "fewstep replicate --claims fkc",
        known_laws.correctors,
    ),
    Claim(
        "fk-steering",
        "2501.06848",
        "Feynman-Kac steering",
        "At equal calls steered particles have a higher reward than best-of-N.",
        _STEER,
        _feynman_kac,
    ),
    Claim(
        "svdd", "2408.08252", "SVDD", "At equal calls SVDD has a higher reward than best-of-N and SMC.", _STEER, _svdd
    ),
    Claim(
        "dts",
        "2506.20701",
        "diffusion tree sampling",
        "DTS is as close to the tilted law as the best baseline with twice the calls and more.",
        _STEER,
        known_laws.tree_sampling,
        "Boltzmann selection underrates branches that were unlucky once, and in two dimensions particles need no tree.",
    ),
    Claim(
        "dts-star",
        "2506.20701",
        "diffusion tree search",
        "DTS* has the reward of best-of-N with twice the calls and more.",
        _STEER,
        _tree_search,
        "With the paper's widening a node is searched below after 36 rollouts only: small trees have hardly begun.",
    ),
    Claim(
        "minority",
        "2301.12334",
        "minority guidance",
        "Distance to neighbours, outlier factor and rarity score rise with the scale, and agreement holds.",
        "fewstep bench minority --data mnist.npz",
        _minority,
        "The classifier of rare digits does not know which digit is asked for; without guidance to it, some get lost.",
    ),
    Claim(
        "noise-search",
        "2501.09732",
        "search over noises",
        "The reward rises with the number of candidates, by random and by zero-order search.",
        "fewstep replicate --claims noise-search",
        _search,
    ),
    Claim(
        "masked",
        "2409.02908",
        "masked diffusion",
        "First hitting is as exact as ancestral sampling with many more calls; Gumbel noise in float32 lowers the "
        "temperature.",
        "fewstep replicate --claims masked",
        masked.masked,
    ),
)
