"""Precision, recall, density and coverage: how two sets of features lie among each other, by nearest neighbours."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .intervals import Estimate
from .neighbours import check_features, distances, leave_out_itself


class PrecisionRecall(NamedTuple):
    """Shares of generated images among the real ones, and of real images among the generated ones."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """How densely generated images lie among real ones, and the share of real images that have one near."""

    density: float
    coverage: float


def precision_recall(reference: torch.Tensor, samples: torch.Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991): shares within balls around the images of the other set.

    Each image's ball reaches to its k-th nearest neighbour in its own set. Both figures depend on the numbers of
    images: compare only where these are equal, best of both sets.

    Args:
        reference: features of real images, ``(N, D)``.
        samples: of generated ones, ``(M, D)``.
        neighbours: ``k``, 3 in the paper.

    Raises:
        ValueError: shapes disagree, values are not finite, or a set has no more images than ``neighbours``.
    """
    group = torch.zeros(len(samples), dtype=torch.long)
    precision, recall = precision_recall_estimates(reference, samples, group, 1, neighbours=neighbours)
    return PrecisionRecall(precision.value, recall.value)


def density_coverage(reference: torch.Tensor, samples: torch.Tensor, *, neighbours: int = 5) -> DensityCoverage:
    """Density and coverage (arXiv 2002.09797), which outliers among the generated images cannot raise.

    Density is the number of real images' balls that a generated image lies in, over ``k``: 1 for equal distributions,
    not bounded by 1. Coverage is the share of real images' balls that hold a generated image.

    Args:
        reference: features of real images, ``(N, D)``.
        samples: of generated ones, ``(M, D)``.
        neighbours: ``k``, 5 in the paper.

    Raises:
        ValueError: as of ``precision_recall``.
    """
    group = torch.zeros(len(samples), dtype=torch.long)
    density, coverage = density_coverage_estimates(reference, samples, group, 1, neighbours=neighbours)
    return DensityCoverage(density.value, coverage.value)


def precision_recall_estimates(
    reference: torch.Tensor, samples: torch.Tensor, group: torch.Tensor, groups: int, *, neighbours: int = 3
) -> tuple[Estimate, Estimate]:
    """Precision and recall also without each group of samples, in one pass over the pairs.

    Args:
        reference: features of real images, ``(N, D)``.
        samples: of generated ones, ``(M, D)``.
        group: of each sample, ``(M,)``, as of ``jackknife_groups``.
        groups: how many; 1 leaves nothing out.
        neighbours: ``k``.
    """
    real, fake = _checked(reference, samples, neighbours)
    member = _members(group, groups, fake)
    reach = _radii(real, neighbours)
    # Without a group, the balls of the others grow: row 0 has all samples, row 1 + g those without group g.
    fake_reach = _radii_left_out(fake, neighbours, member)
    inside = []
    covered = torch.zeros(len(fake_reach), len(real), dtype=torch.bool, device=real.device)
    for begin, found in distances(fake, real, by_differences=False):
        inside.append((found <= reach).any(1))
        rows = slice(begin, begin + len(found))
        for row, radii in enumerate(fake_reach):
            covered[row] |= (found <= radii[rows, None]).any(0)
    shares = covered.double().mean(1).tolist()
    precision = _mean_estimate(torch.cat(inside).double(), member, 1.0)
    return precision, Estimate(shares[0], tuple(shares[1:]), 0.0, 1.0)


def density_coverage_estimates(
    reference: torch.Tensor, samples: torch.Tensor, group: torch.Tensor, groups: int, *, neighbours: int = 5
) -> tuple[Estimate, Estimate]:
    """Density and coverage also without each group of samples; see ``precision_recall_estimates``."""
    real, fake = _checked(reference, samples, neighbours)
    member = _members(group, groups, fake)
    reach = _radii(real, neighbours)
    balls = []
    held = torch.zeros(len(real), groups, dtype=torch.float64, device=real.device)
    for begin, found in distances(fake, real, by_differences=False):
        inside = (found <= reach).double()
        balls.append(inside.sum(1))
        held += inside.T @ member[begin : begin + len(inside)]
    everyone = held.sum(1)
    left_out = tuple(float((everyone > held[:, g]).double().mean()) for g in range(groups if groups > 1 else 0))
    coverage = Estimate(float((everyone > 0).double().mean()), left_out, 0.0, 1.0)
    return _mean_estimate(torch.cat(balls) / neighbours, member, math.inf), coverage


def _members(group: torch.Tensor, groups: int, fake: torch.Tensor) -> torch.Tensor:
    """``(M, groups)``, 1 where a sample is of the group."""
    return torch.nn.functional.one_hot(group, groups).to(fake)


def _mean_estimate(values: torch.Tensor, member: torch.Tensor, highest: float) -> Estimate:
    sums, sizes = values @ member, member.sum(0)
    left_out = ((sums.sum() - sums) / (sizes.sum() - sizes)).tolist() if len(sizes) > 1 else []
    return Estimate(float(sums.sum() / sizes.sum()), tuple(left_out), 0.0, highest)


def _radii(features: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Distance of each image to its k-th nearest neighbour in its own set, ``(N,)``."""
    radii = []
    for begin, found in distances(features, features, by_differences=False):
        leave_out_itself(found, begin)
        radii.append(found.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _radii_left_out(features: torch.Tensor, neighbours: int, member: torch.Tensor) -> torch.Tensor:
    """The same of all images, then without each group, ``(1 + groups, M)``; images left out have no ball (-inf)."""
    groups = member.shape[1]
    if groups == 1:
        return _radii(features, neighbours)[None]
    order = [torch.nonzero(member[:, g])[:, 0] for g in range(groups)]
    rows = []
    for begin, found in distances(features, features, by_differences=False):
        leave_out_itself(found, begin)
        # The nearest of each group are enough to know the nearest of any union.
        nearest = [
            _padded(found[:, of].topk(min(neighbours, len(of)), largest=False).values, neighbours) for of in order
        ]
        stacked = torch.stack(nearest, 1)
        chosen = [stacked] + [stacked[:, [h for h in range(groups) if h != g]] for g in range(groups)]
        rows.append(torch.stack([of.flatten(1).kthvalue(neighbours, dim=1).values for of in chosen]))
    radii = torch.cat(rows, 1)
    radii[1:][member.T.bool()] = -torch.inf
    return radii


def _padded(values: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, count - values.shape[1]), value=torch.inf)


def _checked(reference: torch.Tensor, samples: torch.Tensor, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64, moved to the middle of the real images, where products of features lose the least."""
    check_features(reference=reference, samples=samples)
    for name, values in (("reference", reference), ("samples", samples)):
        if not 1 <= neighbours < len(values):
            raise ValueError(f"neighbours {neighbours} must lie in 1 to {len(values) - 1}, the other images of {name}")
    real = reference.detach().double()
    middle = real.mean(0)
    return real - middle, samples.detach().to(real) - middle
