"""Measures images that exist already."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fewstep.metrics import FeatureExtractor, ImageMetrics, reference_images
from fewstep.metrics.images import SUFFIXES, is_grid

from .references import ReferenceSource, check_reference, check_shapes
from .report import figures_of, reference_row
from .settings import GROUPS, check_number


def compare(
    images: Path, source: ReferenceSource, extractor: FeatureExtractor, metrics: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """The figures of images against a reference, ready for JSON.

    Args:
        images: a folder of images, an image tar or an ``.npz``.
        source: of the reference.
        extractor: of the features.
        metrics: names of the figures.
        batch_size: images at a time.

    Raises:
        ValueError: images are not readable, not alike, too few, or not such as the extractor takes.
    """
    first = next(iter(reference_images(images, batch_size=1)))
    shape = (first.shape[1], first.shape[2], first.shape[3])
    source.check_like(shape)
    source.check_number(metrics)
    argument = f"--images {images}: number"
    if images.is_dir():  # whose files are counted sooner than read
        files = sum(f.suffix.lower() in SUFFIXES and f.is_file() and not is_grid(f) for f in images.rglob("*"))
        check_number(argument, files, metrics, extractor.size)
    extractor.features_and_logits(first)
    reference = source.statistics(extractor, batch_size)
    check_shapes(shape, reference, source.name)
    check_reference(reference, metrics, source.name)
    measured = ImageMetrics(metrics, reference, extractor=extractor)
    count = 0
    with tqdm(desc=images.name, unit="image", file=sys.stderr) as bar:
        for batch in reference_images(images, batch_size=batch_size):
            measured.update(batch, range(count, count + len(batch)))
            count += len(batch)
            bar.update(len(batch))
    check_number(argument, count, metrics, extractor.size)
    return {
        "images": str(images.resolve()),
        "number": count,
        "figures": figures_of(measured.estimates(GROUPS)),
        "remarks": list(measured.remarks()),
        "reference": reference_row(source.to_json(), reference, extractor),
    }
