"""Counter-based normal numbers (Philox4x32-10, SC'11, Salmon et al.): the same on every device, in any order."""

from __future__ import annotations

import math

import torch

LANE = 512
"""Neighbouring elements that take the same of the four numbers of their counters: what a program of a GPU reads at
once. A group of ``4 * LANE`` elements shares ``LANE`` counters."""

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four words below ``2**32`` as int64 tensors that broadcast.
        key: two.

    Returns:
        four random words, int64 below ``2**32``.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, which leaves the 64 bits of the unsigned ones.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32 & _WORD) ^ c1 ^ k0,
            second & _WORD,
            (first >> 32 & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return [c0, c1, c2, c3]


def philox_normal(seeds: torch.Tensor, step: int | torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal noise of one step (Box-Muller on pairs of words).

    Element ``e`` of a sample, in row-major order, has the counter ``(e // (4 LANE) * LANE + e % LANE, step, 0, 0)``;
    the key is the sample's seed, and ``e // LANE % 4`` says which of the four numbers it is.

    Args:
        seeds: one a sample, int64, ``(batch,)``.
        step: number of the step, or one a sample, ``(batch,)``.
        shape: ``(batch, ...)``.
        dtype: of the result; it is computed in float32, or float64 for float64.

    Returns:
        of this shape, on the device of the seeds.
    """
    size = shape[1:].numel()
    element = torch.arange(size, device=seeds.device)
    seed = seeds.view(-1, 1)
    zero = torch.zeros_like(seed)
    counter = [
        element // (4 * LANE) * LANE + element % LANE,
        zero + (step if isinstance(step, int) else step.view(-1, 1)),
        zero,
        zero,
    ]
    words = torch.stack(philox(counter, [seed & _WORD, seed >> 32 & _WORD]))
    lane = (element // LANE % 4).expand(len(seeds), size)
    pair = lane // 2 * 2
    kind = torch.promote_types(dtype, torch.float32)
    first, second = ((words.gather(0, (pair + k)[None])[0] >> 8).to(kind) * 2.0**-24 for k in (0, 1))
    radius, angle = torch.sqrt(-2.0 * torch.log(first + 2.0**-24)), 2.0 * math.pi * second
    return torch.where(lane % 2 == 0, radius * torch.cos(angle), radius * torch.sin(angle)).view(shape).to(dtype)
