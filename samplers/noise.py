"""One noise stream a sample: the seed is the image, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from .philox import philox_normal


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
        streams = []
        for seed in seeds_of(self._seeds, shape[0]):
            generator = torch.Generator().manual_seed(derived_seed(seed, step))
            streams.append(torch.randn(shape[1:], generator=generator, dtype=dtype))
        return torch.stack(streams).to(device, non_blocking=True)


class NoiseToDraw(NamedTuple):
    """Noise that is drawn where it is read: inside the kernel on CUDA.

    Attributes:
        seeds: one a sample, int64, ``(batch,)``, on the device of the samples.
        first_step: number of the step of the plan's first call.
    """

    seeds: torch.Tensor
    first_step: int

    def draw(self, position: int | torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The noise of the plan's call at a position, or at one a sample."""
        return philox_normal(self.seeds, self.first_step + position, shape, dtype)


class PhiloxStreams:
    """``NoiseStreams`` that a GPU draws by itself: other numbers, and of them the same on every device.

    Args:
        seeds: as of ``NoiseStreams``.
    """

    def __init__(self, seeds: int | Sequence[int]) -> None:
        self._seeds = int(seeds) if isinstance(seeds, int) else [int(seed) for seed in seeds]
        self._tensors: dict[tuple[int, torch.device], torch.Tensor] = {}

    def at(self, batch: int, device: torch.device, first_step: int) -> NoiseToDraw:
        """What draws the noise of a run.

        Args:
            batch: number of samples.
            device: of the samples.
            first_step: number of the run's first step.

        Raises:
            ValueError: as of ``NoiseStreams``.
        """
        if (batch, device) not in self._tensors:
            # As two's complement, which is how int64 holds the 64 bits.
            signed = [(seed + 2**63) % 2**64 - 2**63 for seed in seeds_of(self._seeds, batch)]
            self._tensors[batch, device] = torch.tensor(signed).to(device, non_blocking=True)
        return NoiseToDraw(self._tensors[batch, device], first_step)


def derived_seed(seed: int, *key: int) -> int:
    """A seed for a generator that stands for itself: of a seed, and of what it is for."""
    entropy = np.random.SeedSequence(seed % 2**64, spawn_key=key).generate_state(1, np.uint64)
    return int(entropy[0] >> 1)


def seeds_of(seeds: int | Sequence[int], batch: int) -> Sequence[int]:
    """The seeds of a batch.

    Raises:
        ValueError: the batch is neither as long as the list of seeds nor twice as long.
    """
    if isinstance(seeds, int):
        return [seeds + k for k in range(batch)]
    if batch == len(seeds):
        return seeds
    if batch == 2 * len(seeds):
        return [*seeds, *seeds]
    raise ValueError(f"manual_seed was given {len(seeds)} seeds for a batch of {batch}; give one a sample")


def draw_from(
    generator: torch.Generator | Sequence[torch.Generator] | None,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Noise from the caller's generator, or one a sample, or torch's global state: as diffusers draws it."""
    chosen = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(tuple(shape), generator=chosen, device=device, dtype=dtype)
