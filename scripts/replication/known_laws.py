"""Claims on steering where the law that is aimed at is known: mixtures of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from scipy.special import stdtrit

from fewstep.guidance import (
    DiffusionTreeSampling,
    FeynmanKacScheduler,
    FeynmanKacSteering,
    RewardTilt,
)
from fewstep.metrics import Estimate, GaussianMixture
from fewstep.samplers import SAMPLERS, PlanScheduler
from fewstep.samplers.per_sample import DenoisingChain

from ..bench import estimates
from ..bench.output import STABLE_DIFFUSION
from .claims import Finding, Measurement, Rule, Scale, percent

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def leave_one_out(statistic: Callable[[torch.Tensor], float], groups: int) -> Estimate:
    """A statistic of all groups, and of all but each in turn.

    Args:
        statistic: takes a mask of the groups, ``(groups,)``.
        groups: number of independent runs or sets.
    """
    numbers = torch.arange(groups)
    return Estimate(statistic(numbers >= 0), tuple(statistic(numbers != g) for g in range(groups)))


def mean_of(setting: str, values: torch.Tensor, rule: Rule, unit: str = "") -> Finding:
    """The mean of independent differences ``(count,)`` with Student's 95 % interval; what is claimed is 0."""
    value, half = estimates.mean_of(values.double().tolist())
    return Finding(setting, value, value - half, value + half, 0.0, rule, unit)


# ---------------------------------------------------------------- ideal networks


def _tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _ideal(scheduler: PlanScheduler, data: GaussianMixture) -> Network:
    """The network that predicts the noise of a mixture without error, at one time label or one a sample."""
    schedule = scheduler.schedule

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if timestep.ndim and len(timestep) > 1:
            found = torch.empty_like(x)
            for label in timestep.unique():
                rows = timestep == label
                found[rows] = network(x[rows], label)
            return found
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(float(schedule.level(float(timestep)))))
        return (x - alpha * data.clean(x, alpha, sigma)) / sigma

    return network


def _run(scheduler: PlanScheduler, network: Network, count: int, dimensions: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimensions, generator=generator, dtype=torch.float64) * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator, return_dict=False)[0]
    return x


# ---------------------------------------------------------------- Feynman-Kac correctors

_PARTICLES, _STEPS = 512, 200
_FIRST = GaussianMixture(
    _tensor([[-2.0, 0.0], [1.5, 1.0], [1.0, -2.0]]), _tensor([0.5, 0.4, 0.8]), _tensor([0.3, 0.3, 0.4])
)
_SECOND = GaussianMixture(_tensor([[-1.0, 0.0], [2.0, 0.5]]), _tensor([0.7, 0.6]), _tensor([0.5, 0.5]))
# Wider than the second everywhere, or its negative powers could not be normalised.
_WIDE = GaussianMixture(_tensor([[-1.5, 0.0], [2.5, 0.0]]), _tensor([1.0, 1.0]), _tensor([0.6, 0.4]))
_DENSITIES: Sequence[tuple[str, GaussianMixture, tuple[float, ...]]] = (
    ("p^0.5", _FIRST, (0.5,)),
    ("p^2", _FIRST, (2.0,)),
    ("product of two", _FIRST, (1.0, 1.0)),
    ("average, guidance 1.5", _WIDE, (-0.5, 1.5)),
)


def correctors(scale: Scale) -> Measurement:
    """Weights of modes: errors of corrected scores against those of scaled ones, and against none."""
    groups = 12 if scale.quick else 64
    findings = []
    for name, first, exponents in _DENSITIES:
        centres = _SECOND.means if first is _WIDE else first.means
        shares = {}
        for corrected in (True, False):
            options: dict[str, Any] = {} if corrected else {"churn": 0.0, "threshold": 0.0, "finish": "weights"}
            scheduler = FeynmanKacScheduler.from_config(
                {**STABLE_DIFFUSION, "use_karras_sigmas": True},
                exponents=list(exponents),
                particles=_PARTICLES,
                seeds=0,
                **options,
            )
            scheduler.set_timesteps(_STEPS)
            if len(exponents) == 2:
                scheduler.with_experts(_ideal(scheduler, _SECOND))
            x = _run(scheduler, _ideal(scheduler, first), groups * _PARTICLES, 2, 0)
            modes = torch.cdist(x, centres).argmin(1).view(groups, _PARTICLES)
            shares[corrected] = torch.stack([(modes == k).double().mean(1) for k in range(len(centres))], 1)
            # The density that is aimed at is that of the last level above 0.
            last = scheduler.plan.calls[-1]
        truth = _mode_weights(list(zip((first, _SECOND), exponents, strict=False)), centres, last.sigma / last.alpha)
        old, new = (
            leave_one_out(partial(_variation_of_means, shares[corrected], truth), groups) for corrected in (False, True)
        )
        findings.append(Finding(f"{name}: error of mode weights against scaled scores", *percent(old, new)))
        findings.append(_apart(f"{name}: mode furthest from its weight", shares[True], truth))
    return Measurement(findings)


def _variation_of_means(shares: torch.Tensor, truth: torch.Tensor, chosen: torch.Tensor) -> float:
    return float(0.5 * (shares[chosen].mean(0) - truth).abs().sum())


def _mode_weights(powers: Sequence[tuple[GaussianMixture, float]], centres: torch.Tensor, noise: float) -> torch.Tensor:
    """Of ``prod q_i^g_i`` with noise of a standard deviation, around each centre, by sums over a grid."""
    axis = torch.linspace(-8.0, 8.0, 641, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    total = torch.zeros(len(points), dtype=torch.float64)
    for mixture, exponent in powers:
        variance = mixture.stds**2 + noise**2
        away = torch.cdist(points, mixture.means).square()
        total += exponent * (mixture.weights.log() - 0.5 * away / variance - variance.log()).logsumexp(1)
    mass = torch.softmax(total, 0)
    nearest = torch.cdist(points, centres).argmin(1)
    return torch.stack([mass[nearest == k].sum() for k in range(len(centres))])


def _apart(setting: str, shares: torch.Tensor, truth: torch.Tensor) -> Finding:
    """How far the mode that is the most standard errors away is, ``no more than`` chance among so many modes."""
    groups, modes = shares.shape
    away = (shares.mean(0) - truth).abs()
    error = shares.std(0) / math.sqrt(groups)
    worst = int((away / error).argmax())
    half = float(stdtrit(groups - 1, 1.0 - 0.025 / modes)) * float(error[worst])
    value = float(away[worst])
    return Finding(setting, value, value - half, value + half, 0.0, "no more than", "")


# ---------------------------------------------------------------- Feynman-Kac steering

_GAUSSIAN_DIMENSIONS = 16


def steering(scale: Scale) -> Measurement:
    """The reward of the best of N particles, steered and independent, on a Gaussian."""
    groups = 50 if scale.quick else 500
    data = GaussianMixture(torch.zeros(1, _GAUSSIAN_DIMENSIONS), torch.ones(1), torch.ones(1))
    aim = torch.full((_GAUSSIAN_DIMENSIONS,), 0.75, dtype=torch.float64)

    def reward(x: torch.Tensor) -> torch.Tensor:
        return -0.5 * (x - aim).square().sum(1)

    findings = []
    for particles in (4, 8) if scale.quick else (4, 8, 16):
        best = []
        for strength in (10.0, 0.0):
            scheduler: PlanScheduler = SAMPLERS["sde-dpm++1"].build(STABLE_DIFFUSION)
            if strength:
                tilt = RewardTilt(reward, strength)
                scheduler.guide(
                    FeynmanKacSteering([tilt], particles=particles, every=5, start=0.2, finish="weights", seeds=0)
                )
            scheduler.set_timesteps(50)
            x = _run(scheduler, _ideal(scheduler, data), groups * particles, _GAUSSIAN_DIMENSIONS, 0)
            best.append(reward(x).view(groups, particles).amax(1))
        setting = f"Gaussian in {_GAUSSIAN_DIMENSIONS} dimensions, {particles} particles of 50 calls: gain in reward"
        findings.append(mean_of(setting, best[0] - best[1], "at least"))
    return Measurement(findings)


# ---------------------------------------------------------------- diffusion tree sampling

_MODES, _TREE_STEPS = 8, 10


def tree_sampling(scale: Scale) -> Measurement:
    """The distance from a tilted mixture of eight modes, of a tree and of the best baseline at more calls."""
    seeds, runs = (24, 200) if scale.quick else (48, 1000)
    angles = torch.arange(_MODES, dtype=torch.float64) * (2.0 * math.pi / _MODES)
    means = 3.0 * torch.stack([angles.cos(), angles.sin()], 1)
    std = 0.3
    data = GaussianMixture(means, torch.full((_MODES,), std), torch.ones(_MODES))
    # Of exp(x): the components keep their widths, and are weighed by its mean over them.
    truth = torch.softmax(means[:, 0], 0)

    def reward(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]

    def distance(x: torch.Tensor, weights: torch.Tensor) -> float:
        shares = torch.zeros(_MODES, dtype=torch.float64)
        shares.index_add_(0, torch.cdist(x, means).argmin(1), weights)
        return float(0.5 * (shares - truth).abs().sum())

    def particles(count: int, seed: int, guidance: FeynmanKacSteering | None) -> torch.Tensor:
        scheduler: PlanScheduler = SAMPLERS["sde-dpm++1"].build(STABLE_DIFFUSION)
        scheduler.guide(guidance)
        scheduler.set_timesteps(_TREE_STEPS)
        return _run(scheduler, _ideal(scheduler, data), count, 2, seed)

    times = (2,) if scale.quick else (1, 2, 5, 10)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        scheduler: PlanScheduler = SAMPLERS["sde-dpm++1"].build(STABLE_DIFFUSION)
        chain = DenoisingChain(_ideal(scheduler, data), scheduler, _TREE_STEPS, shape=(2,), dtype=torch.float64)
        tree = DiffusionTreeSampling(chain, reward, parallel=10, seed=seed)
        tree.run(runs * _TREE_STEPS)
        leaves = chain.results(tree.tree.states(tree.tree.leaves.tolist(), chain.device))
        found.setdefault("tree", []).append(distance(leaves, torch.from_numpy(tree.leaf_probabilities)))
        for more in times:
            count = more * runs
            x = particles(count, seed, None)
            found.setdefault(f"importance {more}", []).append(distance(x, torch.softmax(reward(x), 0)))
            steered = FeynmanKacSteering([RewardTilt(reward)], particles=count, start=0.2, seeds=seed)
            x = particles(count, seed, steered)
            equal = torch.full((count,), 1.0 / count, dtype=torch.float64)
            found.setdefault(f"smc {more}", []).append(distance(x, equal))
    values = {name: torch.tensor(distances) for name, distances in found.items()}
    findings = []
    for more in times:
        best = min(("importance", "smc"), key=lambda name: float(values[f"{name} {more}"].mean()))
        setting = f"eight modes, {runs} runs of {_TREE_STEPS} calls, against {best} with {more} times the calls: loss"
        findings.append(mean_of(setting, values["tree"] - values[f"{best} {more}"], "no more than"))
    return Measurement(findings)
