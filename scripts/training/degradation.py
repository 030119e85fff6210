"""What the restoration model undoes: a Gaussian blur of a drawn width, then noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLUR = (1.0, 2.0)
"""Smallest and largest standard deviation of the blur, in pixels."""

NOISE = 0.1
"""Standard deviation of the noise, of images in [0, 1]."""


def degrade(images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Blurs and then adds noise; each image by its own seed alone, whatever the batch.

    Args:
        images: float32 ``(batch, C, H, W)`` in [0, 1].
        seeds: one an image, of the width of its blur (uniform in ``BLUR``) and of its noise.

    Returns:
        the degraded images, clipped to [0, 1] as a camera does.

    Raises:
        ValueError: another number of seeds than of images.
    """
    if len(seeds) != len(images):
        raise ValueError(f"seeds has {len(seeds)} entries for {len(images)} images; give one an image")
    degraded = []
    for image, seed in zip(images, seeds, strict=True):
        generator = torch.Generator().manual_seed(int(seed))
        width = BLUR[0] + (BLUR[1] - BLUR[0]) * torch.rand((), generator=generator)
        noise = torch.randn(image.shape, generator=generator)
        degraded.append(gaussian_blur(image, float(width)) + NOISE * noise)
    return torch.stack(degraded).clamp_(0.0, 1.0)


def gaussian_blur(image: torch.Tensor, width: float) -> torch.Tensor:
    """Convolution with a Gaussian; at the border its weights inside the image are scaled to the sum of 1.

    Args:
        image: ``(..., H, W)``.
        width: standard deviation, in pixels.
    """
    rows, columns = (_weights(size, width).to(image.dtype) for size in image.shape[-2:])
    return rows @ image @ columns.T


def _weights(size: int, width: float) -> torch.Tensor:
    position = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((position[:, None] - position) / width) ** 2)
    return weights / weights.sum(1, keepdim=True)
