"""Mean and covariance of features: gathered from a stream of batches, and stored as a reference."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torchmetrics import Metric

from .classifier import BUNDLED_DIGITS, DigitsClassifier


class FeatureStatistics(Metric):
    """Mean and covariance of a stream of feature vectors, in float64 and constant memory.

    A ``torchmetrics.Metric``: `update` with batches, `compute` the result, `reset`; states are sums, so
    processes of a distributed run add up.

    Args:
        size: number D of features.
        settings: of ``torchmetrics.Metric``, such as ``sync_on_compute=False`` for features of this process alone.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    number: torch.Tensor
    total: torch.Tensor
    products: torch.Tensor

    def __init__(self, size: int, **settings: Any) -> None:
        super().__init__(**settings)
        if size < 1:
            raise ValueError(f"size={size}: give the number of features, at least 1")
        self.size = size
        self.add_state("number", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            features: ``(B, D)``.

        Raises:
            ValueError: another shape, or values that are not finite; nothing is added then.
        """
        if features.ndim != 2 or features.shape[1] != self.size:
            raise ValueError(f"features have shape {tuple(features.shape)}; give (B, {self.size})")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("features have values that are not finite; check the images for NaN")
        values = features.detach().to(self.total)
        self.number += len(values)
        self.total += values.sum(0)
        self.products += values.T @ values

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean ``(D,)`` and unbiased covariance ``(D, D)``, float64.

        Raises:
            ValueError: fewer than two vectors were added.
        """
        return moments(self.count, self.total, self.products)

    @property
    def count(self) -> int:
        """Number of feature vectors added."""
        return int(self.number)


def moments(count: int, total: torch.Tensor, products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``(D,)`` and unbiased covariance ``(D, D)`` of feature vectors.

    Args:
        count: of the vectors.
        total: their sum, ``(D,)`` float64.
        products: the sum of their outer products with themselves, ``(D, D)`` float64.

    Raises:
        ValueError: fewer than two vectors.
    """
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 feature vectors, not {count}; call update first")
    mean = total / count
    centred = products - count * torch.outer(mean, mean)
    return mean, (centred + centred.T) / (2.0 * (count - 1))


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of the features of a data set, and what they were made from.

    Attributes:
        mean: ``(D,)`` float64.
        covariance: ``(D, D)`` float64.
        count: number of images.
        extractor: fingerprint of the feature extractor.
        data: fingerprint of the images, SHA-256 of their bytes.
        preprocessing: what happened to an image before the extractor.
        features: of some or all of the images, ``(K, D)`` float32, or ``None``.
        image_shape: channels, height and width of the images, where known.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int
    extractor: str
    data: str
    preprocessing: str
    features: torch.Tensor | None = None
    image_shape: tuple[int, int, int] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the statistics were made from: data, extractor and preprocessing."""
        return hashlib.sha256("\n".join((self.data, self.extractor, self.preprocessing)).encode()).hexdigest()

    @property
    def singular(self) -> bool:
        """Whether there are too few images for a covariance of full rank: no more than features."""
        return self.count <= len(self.mean)

    def save(self, path: str | Path) -> None:
        """Writes one ``.safetensors`` file."""
        path = Path(path)
        tensors = {"mean": self.mean.double().contiguous(), "covariance": self.covariance.double().contiguous()}
        if self.features is not None:
            tensors["features"] = self.features.float().contiguous()
        metadata = {
            "count": str(self.count),
            "extractor": self.extractor,
            "data": self.data,
            "preprocessing": self.preprocessing,
        }
        if self.image_shape is not None:
            metadata["image_shape"] = json.dumps(self.image_shape)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(save(tensors, metadata=metadata))
        os.replace(partial, path)

    @classmethod
    def load(
        cls, path: str | Path, *, extractor: str, data: str | None = None, preprocessing: str | None = None
    ) -> ReferenceStatistics:
        """Reads a file written by `save`.

        Args:
            path: the file.
            extractor: fingerprint of the extractor whose features are to be compared with these.
            data: fingerprint of the images that they must be of; by default of any.
            preprocessing: that the images must have had; by default any.

        Raises:
            ValueError: no such file, or one made with another extractor, of other images, or prepared otherwise.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                shape = json.loads(metadata.get("image_shape", "null"))
                found = cls(
                    mean=file.get_tensor("mean"),
                    covariance=file.get_tensor("covariance"),
                    count=int(metadata["count"]),
                    extractor=metadata["extractor"],
                    data=metadata["data"],
                    preprocessing=metadata["preprocessing"],
                    features=file.get_tensor("features") if "features" in file.keys() else None,  # noqa: SIM118
                    image_shape=None if shape is None else (shape[0], shape[1], shape[2]),
                )
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"path {path} holds no reference statistics: {error}") from error
        if found.extractor != extractor:
            raise ValueError(
                f"path {path} was made with extractor {found.extractor[:12]}, not {extractor[:12]}: features of "
                "different extractors are not comparable; make the statistics anew with this one"
            )
        if data is not None and found.data != data:
            raise ValueError(
                f"path {path} was made of images {found.data[:12]}, not {data[:12]}; make the statistics anew of these"
            )
        if preprocessing is not None and found.preprocessing != preprocessing:
            raise ValueError(
                f"path {path} was made of images prepared by {found.preprocessing!r}, not by {preprocessing!r}; "
                "make the statistics anew"
            )
        return found


def digits_statistics(split: str, classifier: DigitsClassifier) -> ReferenceStatistics:
    """The bundled statistics of MNIST's features.

    Args:
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000 images).
        classifier: the extractor in use; it must be the bundled one.

    Raises:
        ValueError: another split or another extractor.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: give 'train' or 'test'")
    return ReferenceStatistics.load(BUNDLED_DIGITS / f"mnist-{split}.safetensors", extractor=classifier.fingerprint)
