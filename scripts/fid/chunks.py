"""The features of a cell's images on disk, a file a chunk, each there whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import replace_file

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class CellFeatures:
    """What a cell's images are measured by, in the order of their indices.

    Attributes:
        features: ``(number, D)``.
        logits: ``(number, classes)``, where the extractor has classes.
        calls: of the network, for an image.
    """

    features: torch.Tensor
    logits: torch.Tensor | None
    calls: int


class ChunkFiles:
    """The files of a cell, which any number of processes write, each its own chunks.

    Args:
        folder: of the cell; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begins(self) -> set[int]:
        """First indices of the chunks that are there."""
        if not self._folder.is_dir():
            return set()
        return {int(path.stem) for path in self._folder.iterdir() if path.suffix == _SUFFIX and path.stem.isdecimal()}

    def write(self, indices: range, features: torch.Tensor, logits: torch.Tensor | None, calls: int) -> None:
        """Writes a chunk.

        Args:
            indices: of its images.
            features: ``(len(indices), D)``.
            logits: ``(len(indices), classes)``, if any.
            calls: of the network, for an image.
        """
        tensors = {"features": features.cpu().contiguous()}
        if logits is not None:
            tensors["logits"] = logits.cpu().contiguous()
        with replace_file(self._path(indices)) as file:
            file.write(save(tensors, metadata={"calls": str(calls)}))

    def read(self, chunks: list[range]) -> CellFeatures:
        """All chunks together.

        Raises:
            ValueError: one is missing or not readable.
        """
        features, logits, calls = [], [], 0
        for indices in chunks:
            path = self._path(indices)
            try:
                with safe_open(path, framework="pt") as file:
                    features.append(file.get_tensor("features"))
                    if "logits" in file.keys():  # noqa: SIM118  it is no mapping
                        logits.append(file.get_tensor("logits"))
                    calls = int(file.metadata()["calls"])
            except (OSError, SafetensorError, KeyError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); delete it and give the same command again"
                ) from error
        return CellFeatures(torch.cat(features), torch.cat(logits) if logits else None, calls)

    def remove(self) -> None:
        """Deletes the files: the cell has been measured."""
        if self._folder.is_dir():
            shutil.rmtree(self._folder)

    def _path(self, indices: range) -> Path:
        return self._folder / f"{indices.start:08d}{_SUFFIX}"
