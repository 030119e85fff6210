"""The magnitude score of divergence artifacts: the over-saturated spots of too few steps under high guidance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class ChannelNormalization:
    """Mean and standard deviation of clean data, a number a channel.

    Attributes:
        mean: ``C`` numbers.
        std: ``C`` positive numbers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean has {len(self.mean)} entries and std {len(self.std)}; give one of each a channel")
        if not all(std > 0.0 for std in self.std):
            raise ValueError(f"std {self.std} must be positive; leave out channels that are constant")

    @classmethod
    def of_data(cls, batches: Iterable[torch.Tensor]) -> ChannelNormalization:
        """Estimates it from clean data in the space that is sampled: images of a pixel model, or latents.

        Args:
            batches: ``(B, C, H, W)`` each; sizes may differ, the channels not. A few hundred images do.

        Raises:
            ValueError: no data, other shapes, values that are not finite, or a constant channel.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            values = _checked(batch, None if count == 0 else len(total)).transpose(0, 1).flatten(1)
            if count == 0:
                # Sums of squares around some value near the mean lose no digits.
                near = values.mean(1, keepdim=True)
                total = squares = torch.zeros(len(values), dtype=torch.float64)
            centred = values - near
            count += values.shape[1]
            total, squares = total + centred.sum(1), squares + centred.square().sum(1)
        if count == 0:
            raise ValueError("batches is empty; give at least one batch of clean data")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0.0).sqrt()
        return cls(tuple((near[:, 0] + mean).tolist()), tuple(std.tolist()))

    @classmethod
    def of_vae(cls, vae: Any, batches: Iterable[torch.Tensor]) -> ChannelNormalization:
        """Estimates it from the latents that an autoencoder of diffusers gives to images.

        Args:
            vae: encodes images to ``latent_dist``, from which a sample is drawn (always the same), or to ``latents``.
                They are scaled and shifted by its config, as pipelines do.
            batches: images ``(B, 3, H, W)`` in [-1, 1].

        Raises:
            ValueError: as `of_data`.
        """
        generator = torch.Generator().manual_seed(0)
        return cls.of_data(_encoded(vae, images, generator) for images in batches)

    def __call__(self, data: torch.Tensor) -> torch.Tensor:
        """``(data - mean) / std`` a channel, in float64 on the CPU.

        Raises:
            ValueError: another number of channels, or values that are not finite.
        """
        values = _checked(data, len(self.mean))
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (values - mean) / std


STABLE_DIFFUSION_LATENTS = ChannelNormalization(
    (0.1455953, -0.10772908, 0.023680864, 0.045954444), (0.9220753, 1.0913924, 0.73026365, 0.72270846)
)
"""Of Stable Diffusion 1's scaled latents over COCO, by the authors of arXiv 2307.11118."""


def magnitude_score(
    samples: torch.Tensor, normalization: ChannelNormalization, *, threshold: float = 3.0, window: int = 4
) -> torch.Tensor:
    """Magnitude score of divergence artifacts (arXiv 2307.11118): how far samples leave the data's range.

    Of the normalised sample the absolute value, its maximum over channels and over windows, with what is below the
    threshold counting as 0, averaged over the windows. (The paper writes a sum; its figures are the mean, as its code.)
    Scores are only comparable for one normalization, and for one kind of space: of Stable Diffusion's latents the
    authors report 0.7 to 0.9 without artifacts and 1.1 to 3.1 with them.

    Args:
        samples: ``(B, C, H, W)``, results of runs: latents before decoding, or images of a pixel model before clipping.
        normalization: of clean data of the same space.
        threshold: in standard deviations.
        window: edge of the windows; those at the far edges are cut off where it does not divide the size.

    Returns:
        a score a sample, ``(B,)`` float64 on the CPU.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or parameters out of range.
    """
    if not threshold >= 0.0:
        raise ValueError(f"threshold {threshold} must not be negative; the paper takes 3")
    if window < 1:
        raise ValueError(f"window {window} must be at least 1; the paper takes 4")
    largest = normalization(samples).abs().amax(1, keepdim=True)
    pooled = F.max_pool2d(largest, window, ceil_mode=True)
    return torch.where(pooled < threshold, 0.0, pooled).mean((1, 2, 3))


@torch.no_grad()
def _encoded(vae: Any, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    encoded = vae.encode(images.to(vae.device, vae.dtype))
    # A diffusion model is trained on samples of the encoder, which spread more than its modes.
    latents: torch.Tensor = encoded.latent_dist.sample(generator) if "latent_dist" in encoded else encoded.latents
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (mean, std))
        latents = (latents - mean) / std
    return (latents - (config.get("shift_factor") or 0.0)) * config.get("scaling_factor", 1.0)


def _checked(data: torch.Tensor, channels: int | None) -> torch.Tensor:
    if data.ndim != 4 or not data.numel() or channels not in (None, data.shape[1]):
        wanted = "C" if channels is None else channels
        raise ValueError(f"data has shape {tuple(data.shape)}; give (B, {wanted}, H, W), not empty")
    if not bool(torch.isfinite(data).all()):
        raise ValueError("data has values that are not finite: the run has diverged beyond measure, or has NaN")
    return data.detach().to("cpu", torch.float64)
