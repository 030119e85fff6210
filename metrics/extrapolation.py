"""The Frechet distance of infinitely many images, extrapolated."""

from __future__ import annotations

from statistics import linear_regression

import torch

from .frechet import FrechetDistance
from .statistics import FeatureStatistics

_POINTS = 15


def frechet_distance_infinity(
    features: torch.Tensor, reference: FrechetDistance, kept: torch.Tensor | None = None
) -> float:
    """FID-infinity (arXiv 1911.07023): the distance of ever more images, continued to infinitely many.

    The distance of N images is too large by about a constant over N. So it is taken of 15 subsets, from a tenth of the
    images (and more than twice as many as features) to all, drawn with a fixed seed, and a straight line in 1 / N is
    laid through. The bias of the reference's own number of images stays.

    Args:
        features: of generated images, ``(N, D)``.
        reference: the distance to the reference.
        kept: numbers of the images to take, by default all. The draws follow the images' numbers, so leaving out a few
            changes the subsets by these alone.

    Returns:
        the line's value at 1 / N = 0; of images as good as the reference around 0, so it can be negative.

    Raises:
        ValueError: fewer images than four times the features (and 30).
    """
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; give (N, D)")
    size, everyone = features.shape[1], len(features)
    taken = torch.ones(everyone, dtype=torch.bool)
    if kept is not None:
        taken = torch.zeros(everyone, dtype=torch.bool).index_fill_(0, kept, True)
    count = int(taken.sum())
    least = max(count // 10, 2 * size + 1, 15)
    if count < 2 * least:
        raise ValueError(
            f"features of {count} images of {size} numbers each are too few to extrapolate; "
            f"give at least {max(2 * (2 * size + 1), 30)} images"
        )
    generator = torch.Generator().manual_seed(0)
    counts = torch.linspace(least, count, _POINTS, dtype=torch.float64).round().long()
    distances = []
    for n in counts.tolist():
        order = torch.randperm(everyone, generator=generator)
        chosen = order[taken[order]][:n]
        gathered = FeatureStatistics(size, sync_on_compute=False)
        gathered.update(features[chosen.sort().values])
        distances.append(reference(*gathered.compute()))
    return linear_regression([1.0 / n for n in counts.tolist()], distances).intercept
