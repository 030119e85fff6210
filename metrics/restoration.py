"""How close restored images are to the originals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


class RestorationScores(NamedTuple):
    """A score an image, ``(B,)`` float64 each; larger is better."""

    psnr: torch.Tensor
    ssim: torch.Tensor


def restoration_scores(restored: torch.Tensor, originals: torch.Tensor) -> RestorationScores:
    """Peak signal-to-noise ratio in dB and structural similarity (Wang et al., 2004) of 8-bit images.

    Args:
        restored: uint8 ``(B, C, H, W)``, at least 11 pixels high and wide.
        originals: of the same shape.

    Returns:
        of each image; the ratio is infinite where nothing differs.

    Raises:
        ValueError: shapes disagree, images are too small for the similarity's window, or of another type.
    """
    if restored.ndim != 4 or restored.shape != originals.shape or not restored.numel():
        raise ValueError(
            f"restored {tuple(restored.shape)} and originals {tuple(originals.shape)} disagree; give both (B, C, H, W)"
        )
    if restored.dtype != torch.uint8 or originals.dtype != torch.uint8:
        raise ValueError(f"restored are {restored.dtype} and originals {originals.dtype}; give uint8 from 0 to 255")
    if min(restored.shape[2:]) < 11:
        raise ValueError(f"images are {tuple(restored.shape[2:])}; the similarity's window takes 11 x 11 at least")
    a, b = restored.double(), originals.double()
    ratio = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3))
    similarity = structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
    assert isinstance(similarity, torch.Tensor)
    return RestorationScores(ratio, similarity)
