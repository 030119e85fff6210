"""How rare samples are among real ones, by nearest neighbours of features."""

from __future__ import annotations

import torch

from .neighbours import check_features, distances, leave_out_itself


def average_knn_distance(
    reference: torch.Tensor, samples: torch.Tensor | None = None, *, neighbours: int = 5
) -> torch.Tensor:
    """Mean distance of each sample to its nearest real neighbours (AvgkNN; arXiv 2301.12334 takes 5).

    Args:
        reference: features of real images, ``(N, D)``.
        samples: features of others, ``(M, D)``; by default the real ones themselves, each without itself.
        neighbours: how many.

    Returns:
        ``(M,)``, float64, larger is rarer. Far larger values than those of real images are none of the data.

    Raises:
        ValueError: shapes that disagree, values that are not finite, or too few real images.
    """
    return _nearest(reference, samples, neighbours)[0].mean(1)


def local_outlier_factor(
    reference: torch.Tensor, samples: torch.Tensor | None = None, *, neighbours: int = 20
) -> torch.Tensor:
    """How much thinner the real images lie around a sample than around its neighbours (Breunig et al., SIGMOD 2000).

    As scikit-learn's ``LocalOutlierFactor``: with samples, its ``-score_samples`` where ``novelty=True``; without, its
    ``-negative_outlier_factor_``.

    Args:
        reference: features of real images, ``(N, D)``.
        samples: features of others, ``(M, D)``; by default the real ones themselves, each without itself.
        neighbours: how many, 20 usually.

    Returns:
        ``(M,)``, float64; about 1 where samples lie as densely as their neighbours, larger is rarer.

    Raises:
        ValueError: as of ``average_knn_distance``.
    """
    distances, index = _nearest(reference, None, neighbours)
    reach = distances[:, -1]
    density = _density(distances, reach[index])
    if samples is None:
        return density[index].mean(1) / density
    distances, index = _nearest(reference, samples, neighbours)
    return density[index].mean(1) / _density(distances, reach[index])


def rarity_score(reference: torch.Tensor, samples: torch.Tensor | None = None, *, neighbours: int = 3) -> torch.Tensor:
    """Radius of the smallest ball around a real image that holds the sample (arXiv 2206.08549, equation 4).

    Each real image has a ball that reaches to its k-th nearest real neighbour: small where the data is dense. A sample
    outside of all balls is none of the data and has no score.

    Args:
        reference: features of real images, ``(N, D)``.
        samples: features of others, ``(M, D)``; by default the real ones themselves, each without its own ball.
        neighbours: ``k``, 3 in the paper.

    Returns:
        ``(M,)``, float64, larger is rarer; NaN for samples without score: average with ``nanmean``, and report how
        many there are.

    Raises:
        ValueError: as of ``average_knn_distance``.
    """
    radii = _nearest(reference, None, neighbours)[0][:, -1]
    own = samples is None
    reference, samples = _checked(reference, samples, neighbours)
    scores = []
    for begin, found in distances(samples, reference, by_differences=True):
        if own:
            leave_out_itself(found, begin)
        scores.append(torch.where(found <= radii, radii, torch.inf).amin(1))
    found = torch.cat(scores)
    return torch.where(found.isinf(), torch.nan, found)


def _density(distances: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Local reachability density, kept finite among duplicates as scikit-learn does it."""
    return 1.0 / (torch.maximum(distances, reach).mean(1) + 1e-10)


def _nearest(reference: torch.Tensor, samples: torch.Tensor | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances and numbers of the nearest real images, ``(M, count)``, nearest first."""
    own = samples is None
    reference, samples = _checked(reference, samples, count)
    values, numbers = [], []
    for begin, found in distances(samples, reference, by_differences=True):
        if own:
            leave_out_itself(found, begin)
        nearest = found.topk(count, dim=1, largest=False)
        values.append(nearest.values)
        numbers.append(nearest.indices)
    return torch.cat(values), torch.cat(numbers)


def _checked(reference: torch.Tensor, samples: torch.Tensor | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64; the reference itself where there are no samples."""
    check_features(**({"reference": reference} if samples is None else {"reference": reference, "samples": samples}))
    others = len(reference) - (samples is None)
    if not 1 <= count <= others:
        raise ValueError(f"neighbours {count} must lie in 1 to {others}, the other real images; give more of them")
    real = reference.detach().double()
    return real, real if samples is None else samples.detach().to(real)
