"""What an evaluation is: one model, and cells of a sampler, a number of steps and a guidance scale."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fewstep.samplers import PlanScheduler

from ..generation.model import Model
from ..generation.record import Cell, Settings, library_versions
from ..generation.schedulers import build_scheduler, plain_config

_VALUES = 16384
_LARGEST = 64
GROUPS = 20
"""Of images, which the confidence intervals leave out in turn."""


@dataclass(frozen=True)
class EvaluatedCell:
    """The images of one sampler, number of steps and guidance scale.

    Attributes:
        settings: of ``fewstep generate``, with the guidance scale; its images are those of the cell.
        cell: the sampler and the number of steps.
        scheduler: at this number of steps.
        config: of the scheduler, ready for JSON.
    """

    settings: Settings
    cell: Cell
    scheduler: PlanScheduler
    config: Mapping[str, Any]

    @property
    def guidance_scale(self) -> float | None:
        """None where the pipeline has none."""
        return self.settings.guidance_scale

    @property
    def key(self) -> tuple[str, int, float | None]:
        """What a command calls the cell."""
        return self.cell.sampler, self.cell.steps, self.guidance_scale

    @property
    def folder(self) -> str:
        """Name of the cell's folder, below the output."""
        scale = self.guidance_scale
        return self.cell.folder if scale is None else f"{self.cell.folder}-g{scale:g}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that tells the cells of an evaluation apart, also of a sampler's folder that has changed."""
        return hashlib.sha256(json.dumps([*self.key, self.config], sort_keys=True).encode()).hexdigest()

    @property
    def title(self) -> str:
        """The cell in words."""
        scale = self.guidance_scale
        guided = "" if scale is None else f", guidance {scale:g}"
        return f"{self.cell.name}, {self.cell.steps} step{'s' * (self.cell.steps > 1)}{guided}"


@dataclass(frozen=True)
class Evaluation:
    """All that the figures depend on, besides the reference and the feature extractor.

    Attributes:
        settings: of ``fewstep generate``: model, samplers, steps, number of images a cell, seed, conditions.
        scales: guidance scales; ``(None,)`` where the pipeline has none.
        metrics: names of the figures; a continued run may ask for others.
        chunk: images that share a call of the pipeline and of the extractor, the unit of work.
        save_images: whether the images are written as PNG files.
    """

    settings: Settings
    scales: tuple[float | None, ...]
    metrics: tuple[str, ...]
    chunk: int
    save_images: bool

    def cells(self, model: Model) -> list[EvaluatedCell]:
        """Sampler by sampler, its guidance scales, and their steps.

        Raises:
            ValueError: a sampler refuses the settings.
        """
        cells = []
        for sampler in self.settings.samplers:
            for scale in self.scales:
                settings = replace(self.settings, samplers=(sampler,), guidance_scale=scale)
                for cell in settings.cells:
                    scheduler = build_scheduler(settings, model, cell)
                    config = json.loads(json.dumps(plain_config(scheduler)))
                    cells.append(EvaluatedCell(settings, cell, scheduler, config))
        return cells

    def chunks(self) -> Iterator[range]:
        """The indices of a cell's images, a chunk at a time."""
        number = self.settings.number
        return (range(begin, min(begin + self.chunk, number)) for begin in range(0, number, self.chunk))

    def to_json(self, model: Model) -> dict[str, Any]:
        """What all cells have in common and a continued run must have too, ready for JSON."""
        shared = self.settings.to_json()
        for name in ("samplers", "steps", "compare", "guidance_scale", "inputs"):  # of the cells, or of other commands
            del shared[name]
        return {
            **shared,
            "chunk": self.chunk,
            "save_images": self.save_images,
            "model_weights": weights_fingerprint(model),
            "versions": library_versions(),
        }


def check_number(argument: str, number: int, metrics: Sequence[str], size: int) -> None:
    """Refuses fewer images than the metrics and their intervals need, before any is made.

    Args:
        argument: that says how many images there are.
        number: of the images.
        metrics: names of the figures.
        size: number of features.

    Raises:
        ValueError: there are too few.
    """
    least = 2 * GROUPS
    if "fid_infinity" in metrics:
        # The extrapolation needs twice as many images as a subset of full rank has, also without one of the groups.
        least = max(least, math.ceil(2 * (2 * size + 1) * GROUPS / (GROUPS - 1)) + 1)
    if number < least:
        of = "fid_infinity" if least > 2 * GROUPS else "confidence intervals"
        raise ValueError(f"{argument} {number} is too small for {of}; give {least} or more")


def chunk_size(model: Model, settings: Settings, batch_size: int) -> int:
    """How many images share a call.

    Equal noise is not yet an equal image: a network gives other last bits in another batch. On the CPU the chunk
    therefore depends on the model alone, so that no option changes a bit of any image: 64 samples of 4 x 8 x 8 share a
    call, which is 10 times as fast as one by one, and a latent of 4 x 64 x 64, where sharing saves little, has the call
    to itself. Elsewhere it is the batch size, and images of different batch sizes agree up to rounding.

    Args:
        model: that makes the images.
        settings: with the kind of device.
        batch_size: for devices other than the CPU.
    """
    if settings.device != "cpu":
        return batch_size
    network = getattr(model.pipeline, "transformer", None) or model.pipeline.unet
    size, channels = (network.config.get(name) for name in ("sample_size", "in_channels"))
    if settings.height is not None or settings.width is not None or not isinstance(size, int) or channels is None:
        return 1
    return max(1, min(_LARGEST, _VALUES // (channels * size * size)))


def weights_fingerprint(model: Model) -> str:
    """SHA-256 of the weights of all of a pipeline's networks: a folder may hold another model tomorrow."""
    digest = hashlib.sha256()
    for part, network in sorted(model.pipeline.components.items()):
        if isinstance(network, torch.nn.Module):
            for name, tensor in sorted(network.state_dict().items()):
                digest.update(f"{part}.{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
