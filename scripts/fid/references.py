"""What images are held against: statistics of a set of images, bundled, from a file, or computed here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fewstep.metrics import (
    FeatureExtractor,
    ReferenceStatistics,
    compute_reference,
    digits_statistics,
    reference_images,
)
from fewstep.metrics.extractors import DigitsExtractor

BUNDLED = {"mnist-train": "train", "mnist-test": "test"}
"""References that come with the package, for the features ``digits``."""

_NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
"""Metric -> how many neighbours each of the reference's images must have."""

_KINDS = {1: "grey", 3: "RGB"}


@dataclass(frozen=True)
class ReferenceSource:
    """Where a reference comes from, and what is done to its images.

    Attributes:
        name: of ``BUNDLED``, or a folder of images, an image tar, an ``.npz``, or the ``.safetensors`` of statistics.
        part: sub-folder of a folder or tar, or array of an ``.npz``.
        size: of the square that the images are resized and cut to; as they are by default.
        channels: 1 or 3; as they are by default.
    """

    name: str
    part: str | None = None
    size: int | None = None
    channels: int | None = None

    @property
    def computed(self) -> bool:
        """Whether there are images to compute statistics of."""
        return self.name not in BUNDLED and not self.name.endswith(".safetensors")

    def check(self) -> None:
        """Raises ValueError where there is nothing of that name, or no images to prepare."""
        if self.name in BUNDLED:
            pass
        elif not Path(self.name).exists():
            raise ValueError(
                f"reference {self.name!r} does not exist; give a folder of images, an image tar, an .npz, the "
                f".safetensors of statistics, or {' or '.join(BUNDLED)}"
            )
        if not self.computed and (self.part, self.size, self.channels) != (None, None, None):
            raise ValueError(
                f"reference-part, reference-size and reference-channels prepare images; {self.name} holds statistics"
            )

    def to_json(self) -> dict[str, Any]:
        """The source, and what shows that its files are still the same: their number, sizes and times of change."""
        if self.name in BUNDLED:
            return asdict(self)
        path = Path(self.name).resolve()
        files = (file.stat() for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path.stat()]
        return {**asdict(self), "name": str(path), "files": _stamp(files)}

    def check_like(self, shape: tuple[int, int, int]) -> None:
        """Holds the first image against generated ones, before all are read.

        Args:
            shape: channels, height and width of the generated images.

        Raises:
            ValueError: the source is not readable, or its images are of another size or of other channels.
        """
        if self.computed:
            images = next(iter(self._images(1)))
            _check_shapes(shape, (images.shape[1], images.shape[2], images.shape[3]), self.name)

    def check_number(self, metrics: Sequence[str]) -> None:
        """Counts the images as far as the metrics need them, before all are read.

        Args:
            metrics: names of the figures.

        Raises:
            ValueError: the source is not readable, or has too few images.
        """
        if self.computed:
            _check_number(sum(1 for _ in islice(self._images(1), _least(metrics))), metrics, self.name)

    def statistics(self, extractor: FeatureExtractor, batch_size: int) -> ReferenceStatistics:
        """Loads or computes them.

        Args:
            extractor: of the features.
            batch_size: images at a time.

        Raises:
            ValueError: the source is not readable, of another extractor, or of images that the extractor does not take.
        """
        if self.name in BUNDLED:
            if not isinstance(extractor, DigitsExtractor):
                raise ValueError(
                    f"reference {self.name} is of features 'digits', not {extractor.name!r}; give a folder of images"
                )
            return digits_statistics(BUNDLED[self.name], extractor.network)
        if not self.computed:
            return ReferenceStatistics.load(self.name, extractor=extractor.fingerprint)
        with tqdm(desc="reference", unit="image", file=sys.stderr) as bar:
            return compute_reference(
                self.name,
                extractor,
                batch_size=batch_size,
                part=self.part,
                size=self.size,
                channels=self.channels,
                progress=bar.update,
            )

    def _images(self, batch_size: int) -> Iterable[Any]:
        return reference_images(
            self.name, batch_size=batch_size, part=self.part, size=self.size, channels=self.channels
        )


def check_shapes(shape: tuple[int, int, int], reference: ReferenceStatistics, name: str) -> None:
    """Holds images against those that statistics are of, where these are known.

    Raises:
        ValueError: another size, or other channels.
    """
    if reference.image_shape is not None:
        _check_shapes(shape, reference.image_shape, name)


def check_reference(reference: ReferenceStatistics, metrics: Sequence[str], name: str) -> None:
    """Holds the number of a reference's images against what metrics need.

    Args:
        reference: the statistics.
        metrics: names of the figures.
        name: of the reference.

    Raises:
        ValueError: there are too few.
    """
    number = reference.count
    if reference.features is not None and not _NEIGHBOURS.keys().isdisjoint(metrics):
        number = len(reference.features)
    _check_number(number, metrics, name)


def _check_number(number: int, metrics: Sequence[str], name: str) -> None:
    if number < _least(metrics):
        of = ", ".join(metric for metric in metrics if number < _least([metric]))
        raise ValueError(f"--reference {name}: number {number} is too small for {of}; give {_least(metrics)} or more")


def _least(metrics: Sequence[str]) -> int:
    return 1 + max(_NEIGHBOURS.get(metric, 1) for metric in metrics)  # a covariance is of two images


def _check_shapes(ours: tuple[int, int, int], theirs: tuple[int, int, int], name: str) -> None:
    if ours[0] != theirs[0]:
        raise ValueError(
            f"images are {_KINDS[ours[0]]} and those of reference {name} {_KINDS[theirs[0]]}; make them alike, as by "
            f"--reference-channels {ours[0]}"
        )
    if ours[1:] != theirs[1:]:
        remedy = f"--reference-size {ours[1]}" if ours[1] == ours[2] else "a folder of images of this size"
        raise ValueError(
            f"images are {ours[1]} x {ours[2]} and those of reference {name} {theirs[1]} x {theirs[2]}; make them "
            f"alike, as by {remedy}"
        )


def _stamp(files: Iterable[Any]) -> list[int]:
    count, size, changed = 0, 0, 0
    for stat in files:
        count, size, changed = count + 1, size + stat.st_size, max(changed, stat.st_mtime_ns)
    return [count, size, changed]
