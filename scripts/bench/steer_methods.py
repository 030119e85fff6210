"""Steering methods at equal numbers of network calls: what each makes of a budget, for a set of images together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import DiTPipeline

from fewstep.guidance import (
    SVDD,
    DiffusionTreeSampling,
    DiffusionTreeSearch,
    FeynmanKacSteering,
    Guidance,
    Reward,
    RewardTilt,
    class_log_probability,
    decoder_of,
)
from fewstep.metrics import DigitsClassifier
from fewstep.samplers import SAMPLERS, Denoiser, PlanScheduler, sample
from fewstep.samplers.per_sample import DenoisingChain

Tree = TypeVar("Tree", DiffusionTreeSampling, DiffusionTreeSearch)

_PARALLEL = 10
"""Rollouts of a tree in one batch."""

_START = 0.2
"""Share of the calls before which no reward is asked: predictions of pure noise look alike."""

_EVERY = 2
"""Calls from one resampling of particles to the next."""

_JUDGED = 50
"""Images that the reward sees at a time."""

NOISES = 2**20
"""Noises of a seed. Generators read 32 bits."""


class Sampling:
    """The unconditional model under one seed and one reward; what the methods are made of.

    Args:
        pipeline: of digits, with the scheduler that it came with.
        reward: of its latents.
        sampler: name of a stochastic sampler.
        steps: of a run.
        count: of images that are wanted.
        scale: inverse temperature of the methods that have one.
        seed: noise ``k`` has ``seed * NOISES + k``.
        batch_size: samples at a time, where a method leaves the choice.
    """

    def __init__(
        self,
        pipeline: DiTPipeline,
        reward: Reward,
        *,
        sampler: str,
        steps: int,
        count: int,
        scale: float,
        seed: int,
        batch_size: int,
    ) -> None:
        self._pipeline, self._sampler, self._batch_size = pipeline, sampler, batch_size
        self.reward, self.steps, self.count, self.scale, self.seed = reward, steps, count, scale, seed
        self._denoisers: dict[int, Denoiser] = {}

    @property
    def calls(self) -> int:
        """Network evaluations so far, by the denoisers' own count."""
        return sum(denoiser.evaluations for denoiser in self._denoisers.values())

    def start_over(self) -> None:
        """Counts calls from 0, for a budget that takes over nothing from the one before."""
        self._denoisers.clear()

    def scheduler(self) -> PlanScheduler:
        """A new one."""
        return SAMPLERS[self._sampler].build(self._pipeline.scheduler.config)

    def denoiser(self, batch: int) -> Denoiser:
        """Of the label that stands for no class."""
        if batch not in self._denoisers:
            label = self._pipeline.transformer.config.num_embeds_ada_norm
            self._denoisers[batch] = Denoiser.from_pipeline(
                self._pipeline, class_labels=[label], guidance_scale=1.0, num_images_per_prompt=batch
            )
        return self._denoisers[batch]

    def run(self, numbers: Sequence[int], guidance: Guidance | None = None) -> torch.Tensor:
        """Latents ``(batch, ...)`` from the noises of these numbers, in one batch."""
        scheduler = self.scheduler()
        if guidance is not None:
            scheduler.guide(guidance)
        generators = [torch.Generator().manual_seed(self.seed * NOISES + number) for number in numbers]
        return sample(self.denoiser(len(numbers)), scheduler, self.steps, generator=generators)

    def independent(self, numbers: range) -> torch.Tensor:
        """The same without guidance, in several batches."""
        parts = [numbers[k : k + self._batch_size] for k in range(0, len(numbers), self._batch_size)]
        return torch.cat([self.run(part) for part in parts])

    def chain(self) -> DenoisingChain:
        """The same as a Markov chain, for trees."""
        return DenoisingChain(self.denoiser(1), self.scheduler(), self.steps)

    def groups(self, size: int, guidance: Callable[[list[int]], Guidance]) -> torch.Tensor:
        """Runs a group for each image.

        Args:
            size: of a group.
            guidance: made for the seeds of the groups of one batch.

        Returns:
            latents ``(count, size, ...)``.
        """
        parts = []
        images_each = max(1, self._batch_size // size)
        for begin in range(0, self.count, images_each):
            images = range(begin, min(begin + images_each, self.count))
            # Image j begins with the same noises in every method.
            numbers = [image + self.count * member for image in images for member in range(size)]
            latents = self.run(numbers, guidance([self.seed * NOISES + image for image in images]))
            parts.append(latents.unflatten(0, (len(images), size)))
        return torch.cat(parts)

    def random(self, *key: int) -> np.random.Generator:
        """For draws from what was made."""
        return np.random.default_rng([self.seed, *key])


def class_reward(pipeline: DiTPipeline, classifier: DigitsClassifier, classes: Sequence[int], name: str) -> Reward:
    """The log-probability of some digits, of latents."""
    log_probability = class_log_probability(lambda images: classifier(2.0 * images - 1.0), classes)
    return Reward(log_probability, decode=decoder_of(pipeline), name=name, batch_size=_JUDGED)


Steps = Iterator[tuple[int, torch.Tensor]]
Method = Callable[[Sampling, Sequence[int]], Steps]
"""``method(sampling, runs)``: for each of the rising budgets an image, in whole runs of the sampler, the budget and
latents ``(count, ...)``."""


def systematic(weights: np.ndarray, count: int, uniform: float) -> torch.Tensor:
    """Numbers ``(count,)`` drawn by weights with the least noise: each as often as is expected, up to one.

    Args:
        weights: at least 0, of any sum above 0.
        count: of numbers.
        uniform: in [0, 1).
    """
    cumulative = np.cumsum(weights)
    points = (np.arange(count) + uniform) / count * cumulative[-1]
    found = np.searchsorted(cumulative, points, side="right")
    return torch.from_numpy(np.minimum(found, np.flatnonzero(weights)[-1]))


# ---------------------------------------------------------------- independent samples


def _pool(sampling: Sampling, runs: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Samples ``(count, runs, ...)`` and their rewards; of a larger budget, more of them."""
    samples: list[torch.Tensor] = []
    rewards: list[torch.Tensor] = []
    for budget in runs:
        while len(samples) < budget:
            first = sampling.count * len(samples)
            samples.append(sampling.independent(range(first, first + sampling.count)))
            rewards.append(sampling.reward(samples[-1], "the end"))
        yield budget, torch.stack(samples, 1), torch.stack(rewards, 1)


def _best_of_n(sampling: Sampling, runs: Sequence[int]) -> Steps:
    for budget, samples, rewards in _pool(sampling, runs):
        yield budget, samples[torch.arange(len(samples)), rewards.argmax(1)]


def _best_of_all(sampling: Sampling, runs: Sequence[int]) -> Steps:
    for budget, samples, rewards in _pool(sampling, runs):
        yield budget, samples.flatten(0, 1)[rewards.flatten().argsort(descending=True)[: len(samples)]]


def _importance(sampling: Sampling, runs: Sequence[int]) -> Steps:
    for budget, samples, rewards in _pool(sampling, runs):
        weights = torch.softmax(sampling.scale * rewards.flatten().double(), 0).cpu().numpy()
        yield budget, samples.flatten(0, 1)[systematic(weights, sampling.count, sampling.random(budget).random())]


# ---------------------------------------------------------------- particles and candidates


def _steering(sampling: Sampling, particles: int, gradient_scale: float, seeds: list[int]) -> Guidance:
    tilt = RewardTilt(sampling.reward, sampling.scale, gradient_scale=gradient_scale)
    # Proposals follow the gradient in every step.
    every = _EVERY if gradient_scale == 0.0 else 1
    return FeynmanKacSteering([tilt], particles=particles, every=every, start=_START, seeds=seeds)


def _fk(sampling: Sampling, runs: Sequence[int], gradient_scale: float = 0.0) -> Steps:
    for budget in runs:
        sampling.start_over()
        particles = sampling.groups(budget, partial(_steering, sampling, budget, gradient_scale))
        # All have equal weights, but systematic resampling leaves them in order.
        kept = torch.from_numpy(sampling.random(budget).integers(budget, size=len(particles)))
        yield budget, particles[torch.arange(len(particles)), kept]


def _smc(sampling: Sampling, runs: Sequence[int]) -> Steps:
    for budget in runs:
        sampling.start_over()
        size = sampling.count * budget
        particles = sampling.run(range(size), _steering(sampling, size, 0.0, [sampling.seed * NOISES]))
        # Each so-manieth of a systematic resampling is a systematic resampling itself.
        yield budget, particles[int(sampling.random(budget).integers(budget)) :: budget]


def _candidates(sampling: Sampling, candidates: int, temperature: float, seeds: list[int]) -> Guidance:
    return SVDD(sampling.reward, candidates=candidates, temperature=temperature, start=_START, seeds=seeds)


def _chains(sampling: Sampling, runs: Sequence[int], temperature: float) -> Steps:
    for budget in runs:
        sampling.start_over()
        chains = sampling.groups(budget, partial(_candidates, sampling, budget, temperature))
        yield budget, chains[:, 0]


def _svdd(sampling: Sampling, runs: Sequence[int]) -> Steps:
    return _chains(sampling, runs, 1.0 / sampling.scale)


# ---------------------------------------------------------------- trees


def _grown(sampling: Sampling, runs: Sequence[int], kind: type[Tree], **options: Any) -> Iterator[tuple[int, Tree]]:
    """One tree for all images, by rising budgets."""
    tree = kind(
        sampling.chain(),
        sampling.reward,
        scale=sampling.scale,
        parallel=_PARALLEL,
        seed=sampling.seed * NOISES,
        **options,
    )
    for budget in runs:
        tree.run(sampling.count * sampling.steps * budget - tree.network_calls)
        yield budget, tree


def _dts(sampling: Sampling, runs: Sequence[int], **options: Any) -> Steps:
    for budget, tree in _grown(sampling, runs, DiffusionTreeSampling, **options):
        drawn = systematic(tree.leaf_probabilities, sampling.count, sampling.random(budget).random())
        yield budget, tree.chain.results(tree.tree.states(tree.tree.leaves[drawn].tolist(), tree.chain.device))


def _dts_star(sampling: Sampling, runs: Sequence[int], **options: Any) -> Steps:
    for budget, tree in _grown(sampling, runs, DiffusionTreeSearch, **options):
        # While rollouts are under way a leaf or two may be missing: the best ones stand for them too.
        best = tree.best(min(sampling.count, len(tree.tree.leaves))).samples
        yield budget, best[torch.arange(sampling.count) % len(best)]


METHODS: Mapping[str, Method] = {
    "best-of-n": _best_of_n,
    "best-of-all": _best_of_all,
    "importance": _importance,
    "fk": _fk,
    "smc": _smc,
    "svdd": _svdd,
    "svdd-greedy": partial(_chains, temperature=0.0),
    "gradient": partial(_fk, gradient_scale=1.0),
    "dts": _dts,
    "dts-uniform": partial(_dts, selection="uniform"),
    "dts-star": _dts_star,
    "dts-star-narrow": partial(_dts_star, widening=(1.0, 0.4)),
}
"""By name: the best of an image's own samples, the best of all images' samples, and samples drawn from all of these by
weight; particles of an image's own, and one population for all images; chains of candidates; particles whose proposals
follow the gradient; one tree for all images, sampled with either selection, or searched, with the paper's widening or a
narrower one."""
