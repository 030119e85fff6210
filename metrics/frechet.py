"""The Frechet distance between two Gaussians."""

from __future__ import annotations

import torch

from .statistics import FeatureStatistics

_ROUNDING = 1e-6
"""Share of the largest eigenvalue down to which a negative one passes for rounding: covariances that
were computed in single precision have such eigenvalues."""


class FrechetDistance:
    """The distance of Gaussians to one that stays, a reference: its decomposition is made once.

    Args:
        mean: ``(D,)``.
        covariance: ``(D, D)``, symmetric, without negative eigenvalues.

    Raises:
        ValueError: as of ``frechet_distance``, where these are ``mean_b`` and ``covariance_b``.
    """

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        self._mean, self._covariance = _checked(mean, "mean_b", 1), _checked(covariance, "covariance_b", 2)
        if self._covariance.shape != (len(self._mean), len(self._mean)):
            raise ValueError(_disagreement(mean, covariance, mean, covariance))
        self._root = _square_root(self._covariance, "covariance_b")

    def __call__(self, mean: torch.Tensor, covariance: torch.Tensor) -> float:
        """The distance of N(mean, covariance), which are ``mean_a`` and ``covariance_a`` of ``frechet_distance``."""
        mean, covariance = _checked(mean, "mean_a", 1), _checked(covariance, "covariance_a", 2)
        if mean.shape != self._mean.shape or covariance.shape != self._covariance.shape:
            raise ValueError(_disagreement(mean, covariance, self._mean, self._covariance))
        root = _square_root(covariance, "covariance_a")
        overlap = torch.linalg.svdvals(root @ self._root).sum()
        traces = covariance.trace() + self._covariance.trace()
        distance = (mean - self._mean).square().sum() + traces - 2.0 * overlap
        return max(float(distance), 0.0)


def frechet_distance(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """Squared Frechet (2-Wasserstein) distance of N(mean_a, covariance_a) and N(mean_b, covariance_b).

    Of features of real and generated images it is the FID of Heusel et al., arXiv 1706.08500:
    ``|mean_a - mean_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2``. The last trace is taken as the sum
    of the singular values of ``A^1/2 B^1/2``, which are the roots of the eigenvalues of
    ``A^1/2 B A^1/2``: symmetric decompositions only, no complex numbers, and singular covariances lose
    no digits to roots of rounding errors. Computed in float64.

    Args:
        mean_a: ``(D,)``.
        covariance_a: ``(D, D)``, symmetric, without negative eigenvalues.
        mean_b: ``(D,)``.
        covariance_b: ``(D, D)``, likewise.

    Returns:
        The distance, at least 0. Eigenvalues, or a distance, below 0 by no more than rounding count as 0.

    Raises:
        ValueError: shapes disagree, values are not finite, or a covariance is not one.
    """
    return FrechetDistance(mean_b, covariance_b)(mean_a, covariance_a)


def class_frechet_distances(
    features: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor, reference_labels: torch.Tensor
) -> dict[int, float]:
    """The Frechet distance within each class (of arXiv 1802.05637, "intra FID"); their mean is the usual figure.

    Args:
        features: of generated images, ``(N, D)``.
        labels: integers ``(N,)``.
        reference: features of real images, ``(M, D)``.
        reference_labels: integers ``(M,)``.

    Returns:
        label -> distance, for the labels of the generated images, ascending.

    Raises:
        ValueError: shapes disagree, or a class has fewer than two generated or real images.
    """
    for name, values, of in (("labels", labels, features), ("reference_labels", reference_labels, reference)):
        if of.ndim != 2 or values.shape != of.shape[:1] or values.is_floating_point():
            raise ValueError(f"{name} have shape {tuple(values.shape)}; give an integer for each of {len(of)} features")
    distances = {}
    for label in sorted(set(labels.tolist())):
        parts = features[labels == label], reference[reference_labels == label]
        if min(map(len, parts)) < 2:
            raise ValueError(
                f"class {label} has {len(parts[0])} generated and {len(parts[1])} real images; give at least 2 of each"
            )
        found: list[torch.Tensor] = []
        for part in parts:
            statistics = FeatureStatistics(part.shape[1], sync_on_compute=False)
            statistics.update(part)
            found.extend(statistics.compute())
        distances[int(label)] = frechet_distance(*found)
    return distances


def _disagreement(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> str:
    return (
        f"shapes disagree: means {tuple(mean_a.shape)} and {tuple(mean_b.shape)}, covariances "
        f"{tuple(covariance_a.shape)} and {tuple(covariance_b.shape)}; give (D,), (D,), (D, D), (D, D)"
    )


def _checked(tensor: torch.Tensor, name: str, dimensions: int) -> torch.Tensor:
    if tensor.ndim != dimensions:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give a tensor of {dimensions} dimension(s)")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has values that are not finite; check the features for NaN and overflow")
    return tensor.detach().to("cpu", torch.float64)


def _square_root(covariance: torch.Tensor, name: str) -> torch.Tensor:
    """The symmetric square root."""
    scale = float(covariance.abs().max())
    if float((covariance - covariance.T).abs().max()) > _ROUNDING * scale:
        raise ValueError(f"{name} is not symmetric; give a covariance matrix")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2.0)
    if float(values[0]) < -_ROUNDING * max(float(values[-1]), 0.0):
        raise ValueError(f"{name} has the negative eigenvalue {float(values[0]):.3g}; give a covariance matrix")
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
