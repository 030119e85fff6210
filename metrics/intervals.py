"""Confidence intervals of figures that are no averages, by leaving out groups of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """A figure of many images.

    Attributes:
        value: of all images.
        left_out: of all but one group, for each group in turn.
        lowest: that the figure can be.
        highest: likewise.
    """

    value: float
    left_out: tuple[float, ...]
    lowest: float = -math.inf
    highest: float = math.inf

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The bounds of a confidence interval, by the jackknife of groups and Student's distribution.

        What the figure owes to the number of images (a Frechet distance is larger of few) is not in it: the spread is
        around the mean of what is left out, so the interval is that of the figure at this number of images.

        Args:
            confidence: in (0, 1).

        Raises:
            ValueError: ``confidence`` is out of its range.
        """
        half = self.half_width(confidence)
        return max(self.value - half, self.lowest), min(self.value + half, self.highest)

    def half_width(self, confidence: float = 0.95) -> float:
        """Half of `interval`, where no bound of the figure cuts it.

        Args:
            confidence: in (0, 1).

        Raises:
            ValueError: ``confidence`` is out of its range.
        """
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence={confidence}: give a number between 0 and 1, such as 0.95")
        groups = len(self.left_out)
        mean = math.fsum(self.left_out) / groups
        squares = math.fsum((value - mean) ** 2 for value in self.left_out)
        error = math.sqrt(squares * (groups - 1) / groups)
        return float(stdtrit(groups - 1, (1.0 + confidence) / 2.0)) * error

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two figures whose images are paired: the same count, and seeds or data in common."""
        pairs = zip(self.left_out, other.left_out, strict=True)
        return Estimate(self.value - other.value, tuple(a - b for a, b in pairs))


def jackknife_groups(count: int, groups: int = 20, *, turn: int = 1) -> torch.Tensor:
    """The group of each image, ``(count,)`` int64: always the same draw, in equal parts up to one image.

    Args:
        count: of images.
        groups: how many.
        turn: number of classes or prompts that the images take in turn, image ``k`` the ``k % turn``-th. Each group
            has its share of every one then, as the set has: what parts them is no chance, and groups drawn without
            regard to it make intervals up to twice too wide. Best is a count that ``groups * turn`` divides.

    Raises:
        ValueError: there are fewer than two groups, or fewer than two images a group; or ``turn`` is less than 1.
    """
    if groups < 2 or count < 2 * groups:
        raise ValueError(f"groups={groups} of {count} images: give at least 2 groups, and at least 2 images for each")
    if turn < 1:
        raise ValueError(f"turn={turn}: give the number of classes that the images take in turn, 1 for none")
    # Drawn, since images come sorted by class, or with the classes in turn: neither may meet the groups.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if turn == 1:
        parts = torch.arange(count) * groups // count
    else:
        order = order[(order % turn).argsort(stable=True)]
        parts = torch.arange(count) % groups
    return torch.empty_like(order).scatter_(0, order, parts)


def jackknife(statistic: Callable[[torch.Tensor], float], count: int, groups: int = 20, *, turn: int = 1) -> Estimate:
    """A statistic of all images, and without each group.

    Args:
        statistic: takes the numbers of the images, ascending, int64.
        count: of images.
        groups: how many.
        turn: as of ``jackknife_groups``.

    Raises:
        ValueError: as of ``jackknife_groups``.
    """
    group = jackknife_groups(count, groups, turn=turn)
    left_out = tuple(statistic(torch.nonzero(group != g)[:, 0]) for g in range(groups))
    return Estimate(statistic(torch.arange(count)), left_out)
