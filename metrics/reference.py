"""Statistics of a reference set of images, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from .extractors import FeatureExtractor
from .images import ImageSource, describe_preparation, reference_images
from .statistics import FeatureStatistics, ReferenceStatistics


def compute_reference(
    source: ImageSource,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    keep_features: int = 10000,
    part: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> ReferenceStatistics:
    """Mean and covariance of the features of a data set's images, and a sample of the features themselves.

    Args:
        source: of the images; see ``reference_images`` for this, ``part``, ``size`` and ``channels``.
        extractor: gives the features.
        batch_size: images at a time.
        keep_features: of how many images, drawn with a fixed seed, the features are kept (all, where there are no
            more): the metrics that compare pairs of images need them. 0 keeps none.
        part: of the source.
        size: of the images.
        channels: of the images.
        progress: is told the number of images of each batch when it is done.

    Raises:
        ValueError: as of ``reference_images``, fewer than two images, or images that the extractor does not take.
    """
    if keep_features < 0:
        raise ValueError(f"keep_features {keep_features} must not be negative")
    statistics, digest, shape = FeatureStatistics(extractor.size, sync_on_compute=False), hashlib.sha256(), None
    kept = _Reservoir(keep_features, extractor.size)
    for images in reference_images(source, batch_size=batch_size, part=part, size=size, channels=channels):
        digest.update(images.numpy().tobytes())
        features = extractor(images).cpu()
        statistics.update(features)
        kept.add(features)
        shape = (images.shape[1], images.shape[2], images.shape[3])
        if progress is not None:
            progress(len(images))
    mean, covariance = statistics.compute()
    preparation = describe_preparation(size, channels)
    return ReferenceStatistics(
        mean,
        covariance,
        statistics.count,
        extractor=extractor.fingerprint,
        data=digest.hexdigest(),
        preprocessing="; ".join(filter(None, (preparation, extractor.preprocessing))),
        features=kept.features() if keep_features else None,
        image_shape=shape,
    )


class _Reservoir:
    """A fair sample of a stream of unknown length (Vitter's algorithm R), in the stream's order."""

    def __init__(self, capacity: int, size: int) -> None:
        self._capacity = capacity
        self._values = torch.empty(0, size)
        self._numbers = torch.empty(0, dtype=torch.long)
        self._seen = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, features: torch.Tensor) -> None:
        free = self._capacity - len(self._numbers)
        numbers = torch.arange(self._seen, self._seen + len(features))
        self._values = torch.cat([self._values, features[:free].float()]) if free else self._values
        self._numbers = torch.cat([self._numbers, numbers[:free]]) if free else self._numbers
        for k in range(free, len(features)):
            slot = int(torch.randint(self._seen + k + 1, (), generator=self._generator))
            if slot < self._capacity:
                self._values[slot], self._numbers[slot] = features[k].float(), numbers[k]
        self._seen += len(features)

    def features(self) -> torch.Tensor:
        return self._values[self._numbers.argsort()]
