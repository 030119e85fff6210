"""Minority scores: how badly a diffusion model reconstructs a sample (arXiv 2301.12334)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewstep.samplers import PlanScheduler
from fewstep.samplers.noise import NoiseStreams
from fewstep.samplers.prediction import conversions
from fewstep.samplers.schedule import DiscreteVPSchedule
from fewstep.samplers.trajectory import Network, asked

from .rewards import Decoder

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``distance(a, b)``: of two batches ``(batch, ...)``, pair by pair, ``(batch,)``; LPIPS from a package of its own is
one."""


# ------------------------------------------------------------------------------------------------ distances


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of squared differences. With it the minority score is the model's own loss at one noise level."""
    return (a - b).square().flatten(1).sum(1)


def absolute_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of absolute differences."""
    return (a - b).abs().flatten(1).sum(1)


def feature_distance(extractor: Callable[[torch.Tensor], torch.Tensor]) -> Distance:
    """Sum of squared differences of features.

    Args:
        extractor: images ``(batch, ...)`` to features ``(batch, ...)``, such as ``DigitsClassifier.bundled().features``
            (images in [-1, 1]).
    """
    return lambda a, b: squared_distance(extractor(a), extractor(b))


# ------------------------------------------------------------------------------------------------ scores


@dataclass(frozen=True)
class Reconstruction:
    """What a model makes of noised samples: its prediction of the clean ones (Tweedie's formula).

    Attributes:
        network: ``network(x, t)`` to the model's output: a ``Denoiser``, or any function.
        scheduler: of the model; its schedule and prediction type are what counts.
    """

    network: Network
    scheduler: PlanScheduler

    def level(self, timestep: float) -> float:
        """The noise level of a time label.

        Raises:
            ValueError: it lies outside the model's training, or means no noise.
        """
        schedule = self.scheduler.schedule
        with np.errstate(over="ignore"):
            level = float(schedule.level(timestep))
        last = float(schedule.timestep(schedule.max_level))
        # Tables of discrete timesteps go on with their first and last level.
        outside = timestep > last + 1e-6 * abs(last) or (isinstance(schedule, DiscreteVPSchedule) and timestep < 0)
        if outside or not 0.0 < level <= schedule.max_level * (1.0 + 1e-6):
            raise ValueError(
                f"timestep {timestep} lies outside the model's training, or means no noise; of 1000 timesteps 600 to "
                "800 are usual, for EDM models a quarter of the logarithm of sigma"
            )
        return level

    def noised(self, clean: torch.Tensor, level: float, noise: torch.Tensor) -> torch.Tensor:
        """``alpha clean + sigma noise`` at a level."""
        alpha, sigma = self.scheduler.schedule.alpha_sigma(level)
        return float(alpha) * clean + float(sigma) * noise

    def clean(self, x: torch.Tensor, level: float) -> torch.Tensor:
        """The predicted clean samples, shaped like ``x``; one call of the network, with gradients where enabled.

        Raises:
            ValueError: the model predicts noise, and the level is pure noise.
        """
        schedule, config = self.scheduler.schedule, self.scheduler.config
        label = torch.tensor(float(schedule.timestep(level)))
        if isinstance(schedule, DiscreteVPSchedule) and self.scheduler.timesteps.dtype == torch.int64:
            label = label.round().long()
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(level))
        pair, _ = conversions(schedule, config.prediction_type, level, alpha, sigma)
        if pair is None:
            raise ValueError(
                f"level {level:g} is pure noise, of which a prediction of noise says nothing; take a lower"
            )
        output = asked(self.scheduler, self.network, x, label, schedule.in_scale(level))
        return pair[0] * x + pair[1] * output


@torch.no_grad()
def minority_scores(
    network: Network,
    scheduler: PlanScheduler,
    samples: torch.Tensor,
    *,
    timestep: float,
    draws: int = 5,
    distance: Distance = squared_distance,
    decode: Decoder | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Mean distance of samples from what a model makes of them after noise was added (arXiv 2301.12334, equation 8).

    A prediction of the clean sample averages over all that could have been there, in which common samples have the
    most weight: what is unusual gets lost. So the score is high where the data is thin.

    Args:
        network: ``network(x, t)`` to the model's output: a ``Denoiser``, or any function; it is called ``draws`` times.
        scheduler: made from the model's config.
        samples: clean ones, ``(batch, ...)``, in the space that the scheduler steps.
        timestep: label of the noise level; the paper takes 0.6 of the training's timesteps, about 600 of 1000.
        draws: noises to average over, 5 in the paper.
        distance: of decoded samples.
        decode: from what the scheduler steps to what the distance compares; nothing by default.
        seed: of the noises of sample 0; sample ``k`` has ``seed + k``, whatever the batch.

    Returns:
        ``(batch,)``, float64 on the CPU.

    Raises:
        ValueError: no draws, an impossible time, or a distance of another shape.
    """
    if draws < 1:
        raise ValueError(f"draws {draws} must be at least 1; the paper takes 5")
    reconstruction = Reconstruction(network, scheduler)
    level = reconstruction.level(timestep)
    shown = samples if decode is None else decode(samples)
    streams = NoiseStreams(seed)
    total = torch.zeros(len(samples), dtype=torch.float64)
    for k in range(draws):
        noise = streams.draw(k, samples.shape, samples.device, samples.dtype)
        clean = reconstruction.clean(reconstruction.noised(samples, level, noise), level)
        values = distance(shown, clean if decode is None else decode(clean))
        total += checked_distances(values, samples).double().cpu()
    return total / draws


def checked_distances(values: Any, samples: torch.Tensor) -> torch.Tensor:
    """The distances, if there is one a sample.

    Raises:
        ValueError: there is not.
    """
    if not isinstance(values, torch.Tensor) or values.shape != (len(samples),):
        found = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"distance returned {found}; return a tensor ({len(samples)},), one number a sample")
    return values


@dataclass(frozen=True)
class MinorityClasses:
    """Classes of equal size by quantiles of a score: class 0 is the commonest, the last the rarest.

    Attributes:
        thresholds: ``(groups, classes - 1)``, float64, increasing: between the classes.
    """

    thresholds: torch.Tensor

    @classmethod
    def of(cls, scores: torch.Tensor, classes: int, groups: torch.Tensor | None = None) -> MinorityClasses:
        """Cuts scores into classes.

        Args:
            scores: ``(N,)``.
            classes: number of them, at least 2; arXiv 2301.12334 takes 100 for 300,000 bedrooms.
            groups: ``(N,)`` integers from 0 up, such as class labels: each group is cut by itself, so that what is
                rare for its group is rare, and guidance changes no group's share. All are one group by default.

        Raises:
            ValueError: fewer scores than classes in a group, or scores that are not finite.
        """
        values, numbers = cls._aligned(scores, groups)
        if classes < 2:
            raise ValueError(f"classes {classes} must be at least 2")
        quantiles = np.arange(1, classes) / classes
        thresholds = []
        for group in range(int(numbers.max()) + 1):
            members = values[numbers == group]
            if len(members) < classes:
                raise ValueError(f"group {group} has {len(members)} scores; give at least {classes}, one a class")
            thresholds.append(torch.from_numpy(np.quantile(members.numpy(), quantiles)))
        return cls(torch.stack(thresholds))

    @property
    def count(self) -> int:
        """Number of classes."""
        return self.thresholds.shape[1] + 1

    def labels(self, scores: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
        """The classes ``(N,)``, int64, of scores ``(N,)`` of the groups ``(N,)``.

        Raises:
            ValueError: a group without thresholds, or shapes that disagree.
        """
        values, numbers = self._aligned(scores, groups)
        if int(numbers.max()) >= len(self.thresholds):
            raise ValueError(f"groups goes up to {int(numbers.max())}; thresholds are known of {len(self.thresholds)}")
        return (values[:, None] > self.thresholds[numbers]).sum(1)

    @staticmethod
    def _aligned(scores: torch.Tensor, groups: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if scores.ndim != 1 or not len(scores) or not bool(torch.isfinite(scores).all()):
            raise ValueError(f"scores have shape {tuple(scores.shape)}; give (N,) finite numbers, N > 0")
        if groups is None:
            groups = torch.zeros(len(scores), dtype=torch.int64)
        if groups.shape != scores.shape or groups.is_floating_point() or int(groups.min()) < 0:
            raise ValueError(f"groups {tuple(groups.shape)} must be {len(scores)} integers from 0 up, one a score")
        return scores.detach().double().cpu(), groups.cpu()
