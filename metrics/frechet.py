"""The Frechet distance between two Gaussians."""

from __future__ import annotations

import torch

_ROUNDING = 1e-6
"""Share of the largest eigenvalue down to which a negative one passes for rounding: covariances that
were computed in single precision have such eigenvalues."""


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
    mean_a, mean_b = (_checked(mean, f"mean_{k}", 1) for mean, k in ((mean_a, "a"), (mean_b, "b")))
    covariance_a, covariance_b = (
        _checked(covariance, f"covariance_{k}", 2) for covariance, k in ((covariance_a, "a"), (covariance_b, "b"))
    )
    size = len(mean_a)
    if len(mean_b) != size or covariance_a.shape != (size, size) or covariance_b.shape != (size, size):
        raise ValueError(
            f"shapes disagree: means {tuple(mean_a.shape)} and {tuple(mean_b.shape)}, covariances "
            f"{tuple(covariance_a.shape)} and {tuple(covariance_b.shape)}; give (D,), (D,), (D, D), (D, D)"
        )
    root_a, root_b = _square_root(covariance_a, "covariance_a"), _square_root(covariance_b, "covariance_b")
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2.0 * overlap
    return max(float(distance), 0.0)


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
