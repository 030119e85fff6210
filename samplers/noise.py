"""One noise stream a sample: the seed is the image, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor


class NoiseStreams:
    """Standard normal noise that depends on the sample's seed and the step alone.

    Nothing is remembered between draws, so a step may be repeated and the object copied.

    Args:
        seeds: of sample 0 (sample ``k`` then has ``seeds + k``), or one a sample.
    """

    def __init__(self, seeds: int | Sequence[int]) -> None:
        self._seeds = int(seeds) if isinstance(seeds, int) else [int(seed) for seed in seeds]

    def draw(self, step: int, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The noise of one step, ``shape[0]`` samples.

        Raises:
            ValueError: the batch is neither as long as the list of seeds nor twice as long (a batch that a
                pipeline has doubled for guidance gets the same noise in both halves).
        """
        batch = shape[0]
        if isinstance(self._seeds, int):
            seeds = [self._seeds + k for k in range(batch)]
        elif batch == len(self._seeds):
            seeds = self._seeds
        elif batch == 2 * len(self._seeds):
            seeds = self._seeds * 2
        else:
            raise ValueError(
                f"manual_seed was given {len(self._seeds)} seeds for a batch of {batch}; give one a sample"
            )
        streams = []
        for seed in seeds:
            entropy = np.random.SeedSequence(seed % 2**64, spawn_key=(step,)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(entropy[0] >> 1))
            streams.append(torch.randn(shape[1:], generator=generator, dtype=dtype))
        return torch.stack(streams).to(device)


def draw_from(
    generator: torch.Generator | Sequence[torch.Generator] | None,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Noise from the caller's generator, or one a sample, or torch's global state: as diffusers draws it."""
    chosen = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(tuple(shape), generator=chosen, device=device, dtype=dtype)
