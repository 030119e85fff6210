"""The steering methods of the command line, each from its options to one sample of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from fewstep.guidance import (
    SVDD,
    DiffusionTreeSampling,
    DiffusionTreeSearch,
    FeynmanKacScheduler,
    FeynmanKacSteering,
    MinorityClassifier,
    MinorityGuidance,
    PathSearch,
    Population,
    RandomSearch,
    RewardTilt,
    SelfMinorityGuidance,
    VerifierEnsemble,
    ZeroOrderSearch,
    absolute_distance,
    squared_distance,
)
from fewstep.samplers import Denoiser, DenoisingChain, PlanScheduler, sample
from fewstep.samplers.noise import derived_seed

from .model import DIGITS, Model
from .rewards import WatchedReward
from .steering import POPULATION, Steering, number

Tree = TypeVar("Tree", DiffusionTreeSampling, DiffusionTreeSearch)

_DISTANCES = {"squared": squared_distance, "absolute": absolute_distance}
_PICK = 2**20  # which of a seed's streams chooses from a population; particles have the lower ones


@dataclass(frozen=True)
class Found:
    """What a method ends with: one sample ``(1, ...)``, and the effective sample sizes on the way."""

    sample: torch.Tensor
    effective_sample_sizes: list[float] | None = None


@dataclass(frozen=True)
class Work:
    """All that a method needs for one image."""

    steering: Steering
    model: Model
    scheduler: PlanScheduler
    steps: int
    denoiser: Denoiser
    reward: WatchedReward | None
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """Of the method."""
        return self.steering.options

    @property
    def particles(self) -> int:
        """Of the image."""
        return self.steering.particles

    def run(self) -> torch.Tensor:
        """All samples of the denoiser's batch, ``(particles, ...)``."""
        seeds = [self.seed, *(derived_seed(self.seed, k) for k in range(1, self.particles))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(self.denoiser, self.scheduler, self.steps, generator=generators)


Run = Callable[[], Found]


def _random_search(work: Work) -> Run:
    return _search(work, RandomSearch(*_searched(work), candidates=work.particles, seed=work.seed))


def _zero_order(work: Work) -> Run:
    similarity = work.options["similarity"]
    search = ZeroOrderSearch(*_searched(work), candidates=work.particles, seed=work.seed, similarity=similarity)
    return _search(work, search)


def _paths(work: Work) -> Run:
    options = {name: work.options[name] for name in ("paths", "start", "forward", "backward")}
    return _search(work, PathSearch(*_searched(work), candidates=work.particles, seed=work.seed, **options))


def _searched(work: Work) -> tuple[Denoiser, PlanScheduler, int, WatchedReward | VerifierEnsemble]:
    assert work.reward is not None
    verifier = VerifierEnsemble(work.reward.parts) if work.options["combine"] == "ranks" else work.reward
    return work.denoiser, work.scheduler, work.steps, verifier


def _search(work: Work, search: Any) -> Run:
    def run() -> Found:
        for _ in range(work.options["rounds"]):
            search.run(search.cost)
        assert work.reward is not None
        work.reward.history.clear()  # a search over paths also asks on the way, about predictions
        for one in search.result.history:
            values = one.values.sum(-1) if work.options["combine"] == "ranks" else one.values
            work.reward.note(one.evaluations, values)
        return Found(search.result.samples)

    return run


def _feynman_kac(work: Work) -> Run:
    assert work.reward is not None
    tilt = RewardTilt(
        work.reward,
        number(work.options["scale"]),
        potential=work.options["potential"],
        gradient_scale=work.options.get("gradient_scale", 0.0),
    )
    population = {name: work.options[name] for name in POPULATION}
    steering = FeynmanKacSteering([tilt], particles=work.particles, seeds=work.seed, **population)
    work.scheduler.guide(steering)
    return _of_population(work, steering.population, tilt)


def _corrected(work: Work) -> Run:
    assert isinstance(work.scheduler, FeynmanKacScheduler)
    scheduler, tilt = work.scheduler, None
    if work.reward is not None:
        tilt = RewardTilt(work.reward, number(work.options["scale"]), potential=work.options["potential"])
        scheduler.tilt(tilt)
    elif work.options["pick"] == "best":
        raise ValueError("steer-option pick='best' needs a reward: give --reward, or pick=draw")
    run = _of_population(work, scheduler.population, tilt)

    def corrected() -> Found:
        scheduler.correct_guidance(work.model.pipeline)
        try:
            return run()
        finally:
            scheduler.correct_guidance(None)

    return corrected


def _of_population(work: Work, population: Population, tilt: RewardTilt | None) -> Run:
    """Takes one of a population whose weights are equal in the end: any is a sample of the target."""

    def run() -> Found:
        samples = work.run()
        if work.options["pick"] == "best":
            assert tilt is not None
            chosen = int(tilt.values.argmax())
        else:
            # Resampling leaves them in the order of their ancestors, so the first is not any.
            chosen = int(np.random.default_rng([work.seed, _PICK]).integers(len(samples)))
        sizes = [float(size) for size in population.history]
        return Found(samples[chosen : chosen + 1], sizes)

    return run


def _svdd(work: Work) -> Run:
    assert work.reward is not None
    guidance = SVDD(
        work.reward,
        candidates=work.particles,
        temperature=number(work.options["temperature"]),
        start=work.options["start"],
        stop=work.options["stop"],
        seeds=work.seed,
    )
    work.scheduler.guide(guidance)
    return lambda: Found(work.run()[:1])


def _tree_sampling(work: Work) -> Run:
    return _grow(work, DiffusionTreeSampling, lambda tree: tree.sample().samples, selection=work.options["selection"])


def _tree_search(work: Work) -> Run:
    return _grow(work, DiffusionTreeSearch, lambda tree: tree.best().samples, exploration=work.options["exploration"])


def _grow(work: Work, kind: type[Tree], chosen: Callable[[Tree], torch.Tensor], **options: Any) -> Run:
    """A tree of that kind, and what is taken of it when the budget is spent."""
    assert work.reward is not None
    chain = DenoisingChain(work.denoiser, work.scheduler, work.steps)
    tree = kind(chain, work.reward, **_tree_options(work, chain), **options)
    calls = _tree_calls(work, chain.steps)

    def run() -> Found:
        tree.run(calls)
        return Found(chosen(tree))

    return run


def _tree_options(work: Work, chain: DenoisingChain) -> dict[str, Any]:
    branching = work.options["branching"]
    if branching is None:  # up to five of the steps after which copies part, evenly spread
        noisy = [step for step, draws in enumerate(chain.noisy) if draws]
        count = min(5, len(noisy))
        branching = [noisy[k * len(noisy) // count] for k in range(count)]
    factor, exponent = work.options["widening"]
    return {
        "scale": number(work.options["scale"]),
        "branching": branching,
        "widening": (factor, exponent),
        "parallel": work.options["parallel"],
        "seed": work.seed,
    }


def _tree_calls(work: Work, rollout: int) -> int:
    """The budget, which must last for a rollout."""
    calls = work.options["calls"]
    if calls is None:
        return work.particles * rollout
    if calls < rollout:
        raise ValueError(f"steer-option calls={calls} is less than one whole run takes, {rollout}; give more")
    return int(calls)


def _minority(work: Work) -> Run:
    folder, target = work.options["classifier"], work.options["target"]
    if folder is None and work.model.name not in DIGITS:
        raise ValueError(
            f"steer minority needs a classifier of the samples of model {work.model.name!r}: the bundled one knows "
            f"those of {' and '.join(DIGITS)}; give --steer-option classifier=FOLDER, or take self-minority"
        )
    loaded = MinorityClassifier.bundled() if folder is None else MinorityClassifier.from_pretrained(folder)
    classifier = loaded.to(work.model.pipeline.device)
    if not 0 <= target < classifier.config["classes"]:
        last = classifier.config["classes"] - 1
        raise ValueError(f"steer-option target={target} must lie in 0 to {last}, the classes from common to rare")
    work.scheduler.guide(MinorityGuidance(classifier, target, work.options["scale"]))
    return lambda: Found(work.run())


def _self_minority(work: Work) -> Run:
    guidance = SelfMinorityGuidance(
        work.denoiser,
        work.scheduler,
        scale=work.options["scale"],
        timestep=work.options["timestep"],
        distance=_DISTANCES[work.options["distance"]],
        every=work.options["every"],
        seeds=work.seed,
    )
    work.scheduler.guide(guidance)
    return lambda: Found(work.run())


RUNS: Mapping[str, Callable[[Work], Run]] = {
    "best-of-n": _random_search,
    "zero-order": _zero_order,
    "paths": _paths,
    "fk": _feynman_kac,
    "fkc": _corrected,
    "reward-gradient": _feynman_kac,
    "svdd": _svdd,
    "dts": _tree_sampling,
    "dts-star": _tree_search,
    "minority": _minority,
    "self-minority": _self_minority,
}
"""From the work of an image to its run, by method; making the run checks the options."""
