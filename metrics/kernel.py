"""The kernel distance (KID) between two sets of features."""

from __future__ import annotations

import torch

from .intervals import Estimate

_CHUNK = 1 << 24
"""Kernel values held at a time, 128 MB in float64."""


def kernel_distance(reference: torch.Tensor, samples: torch.Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3`` (KID, arXiv 1801.01401), without bias.

    Of all pairs. The usual mean over random subsets has the same expectation and more noise, and depends on the draw.

    Args:
        reference: features of real images, ``(N, D)``.
        samples: of generated ones, ``(M, D)``.

    Returns:
        the distance, of equal distributions around 0; often given times 1000.

    Raises:
        ValueError: shapes disagree, values are not finite, or a set has fewer than two images.
    """
    return kernel_distance_estimate(reference, samples, torch.zeros(len(samples), dtype=torch.long), 1).value


def kernel_distance_estimate(
    reference: torch.Tensor, samples: torch.Tensor, group: torch.Tensor, groups: int
) -> Estimate:
    """``kernel_distance`` also without each group of samples, in one pass over the pairs.

    Args:
        reference: features of real images, ``(N, D)``.
        samples: of generated ones, ``(M, D)``.
        group: of each sample, ``(M,)``, as of ``jackknife_groups``.
        groups: how many; 1 leaves nothing out.
    """
    for name, values in (("reference", reference), ("samples", samples)):
        if values.ndim != 2 or len(values) < 2 or values.shape[1] != reference.shape[1]:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; give (count, D), two images at least")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} has values that are not finite; check the images for NaN")
    real, fake = reference.detach().double(), samples.detach().to(reference.device, torch.float64)
    member = torch.nn.functional.one_hot(group, groups).to(fake)
    real_count, sizes = len(real), member.sum(0)
    everyone = torch.ones(real_count, 1, dtype=torch.float64, device=real.device)
    among_real = float(_sums(real, real, everyone, everyone) - _kernel_with_self(real).sum()) / (
        real_count * (real_count - 1)
    )
    among_fake = _sums(fake, fake, member, member)
    own = member.T @ _kernel_with_self(fake)
    across = _sums(fake, real, member, everyone)[:, 0]

    def distance(pairs: torch.Tensor, selves: torch.Tensor, crossing: torch.Tensor, count: torch.Tensor) -> float:
        found = (pairs - selves) / (count * (count - 1)) - 2.0 * crossing / (count * real_count)
        return among_real + float(found)

    total = among_fake.sum(), own.sum(), across.sum(), sizes.sum()
    left_out = []
    for g in range(groups if groups > 1 else 0):
        pairs = total[0] - among_fake[g].sum() - among_fake[:, g].sum() + among_fake[g, g]
        left_out.append(distance(pairs, total[1] - own[g], total[2] - across[g], total[3] - sizes[g]))
    return Estimate(distance(*total), tuple(left_out))


def _sums(a: torch.Tensor, b: torch.Tensor, groups_a: torch.Tensor, groups_b: torch.Tensor) -> torch.Tensor:
    """Sums of the kernel over pairs, by the groups of both."""
    found = torch.zeros(groups_a.shape[1], groups_b.shape[1], dtype=torch.float64, device=a.device)
    rows = max(1, _CHUNK // len(b))
    for part, of in zip(a.split(rows), groups_a.split(rows), strict=True):
        found += of.T @ ((part @ b.T / a.shape[1] + 1.0) ** 3 @ groups_b)
    return found


def _kernel_with_self(x: torch.Tensor) -> torch.Tensor:
    return (x.square().sum(1) / x.shape[1] + 1.0) ** 3
