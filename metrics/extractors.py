"""Networks that turn images into features, by name."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .classifier import BUNDLED_DIGITS, DigitsClassifier, add_weights
from .inception import INCEPTION_SIZE, InceptionV3, resize_as_tensorflow

EXTRACTORS = ("digits", "inception", "dinov2", "clip")
"""Names that ``feature_extractor`` knows."""

_Self = TypeVar("_Self", bound="FeatureExtractor")


class FeatureExtractor(nn.Module, ABC):
    """A network with frozen weights and what happens to an image before it.

    Takes images as a PNG file holds them, uint8. Always in evaluation mode and float32; an image has the same features
    alone and among others, up to rounding. Serves as ``feature`` of torchmetrics' image metrics as it is.

    Args:
        name: of ``EXTRACTORS``.
        size: number D of features.
        classes: number of classes that the network tells apart, or ``None``.
        preprocessing: what happens to an image, in words.
    """

    def __init__(self, name: str, size: int, classes: int | None, preprocessing: str) -> None:
        super().__init__()
        self.name = name
        self.size = size
        self.classes = classes
        self.preprocessing = preprocessing

    @property
    def num_features(self) -> int:
        """``size``, by the name that torchmetrics looks for."""
        return self.size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the name, the architecture, the weights and the preprocessing."""
        digest = hashlib.sha256(f"{self.name}\n{self.preprocessing}\n{self._architecture()}\n".encode())
        add_weights(digest, self)
        return digest.hexdigest()

    @torch.no_grad()
    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features ``(B, D)`` and logits ``(B, classes)`` of images, float32; no logits where there are no classes.

        Args:
            images: uint8 ``(B, 3, H, W)``, or grey ``(B, 1, H, W)``.

        Raises:
            ValueError: other shapes, another type, or images that the network does not take.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
            raise ValueError(f"images have shape {tuple(images.shape)}; give (B, 3, H, W) or (B, 1, H, W), not empty")
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}; give uint8 from 0 to 255, as a PNG file would hold them")
        device = next(self.parameters()).device
        return self._evaluate(images.to(device))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``(B, D)``; see `features_and_logits`."""
        return self.features_and_logits(images)[0]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, classes)``; see `features_and_logits`.

        Raises:
            ValueError: also where the network has no classes.
        """
        logits = self.features_and_logits(images)[1]
        if logits is None:
            raise ValueError(f"extractor {self.name} has no classes; the inception score takes digits or inception")
        return logits

    def train(self: _Self, mode: bool = True) -> _Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def freeze(self: _Self) -> _Self:
        """Itself, without gradients and in evaluation mode; for the end of a constructor."""
        return self.requires_grad_(False).eval()

    @abstractmethod
    def _evaluate(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    @abstractmethod
    def _architecture(self) -> str:
        """All that the shapes of the weights do not say."""


class DigitsExtractor(FeatureExtractor):
    """The classifier of 32 x 32 digits that comes with the package, or another ``DigitsClassifier``.

    Its fingerprint is the classifier's own, so the bundled statistics belong to it.

    Args:
        classifier: the network.
    """

    def __init__(self, classifier: DigitsClassifier) -> None:
        sizes = classifier.config
        super().__init__(
            "digits",
            sizes["feature_size"],
            sizes["classes"],
            "uint8 32 x 32, smaller images padded with black; x / 127.5 - 1",
        )
        self.network = classifier
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:
        return self.network.fingerprint

    def _evaluate(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        channels, (height, width) = self.network.config["channels"], images.shape[2:]
        if images.shape[1] != channels:
            raise ValueError(f"images have {images.shape[1]} channels; the digit classifier takes {channels}")
        if not (24 <= height <= 32 and 24 <= width <= 32):
            raise ValueError(f"images are {height} x {width}; the digit classifier takes 32 x 32, or down to 24 x 24")
        top, left = (32 - height) // 2, (32 - width) // 2
        padded = F.pad(images, (left, 32 - width - left, top, 32 - height - top))
        features = self.network.features(padded.float().div(127.5).sub(1.0))
        return features, self.network.classify(features)

    def _architecture(self) -> str:
        return str(self.network.config)


class InceptionExtractor(FeatureExtractor):
    """The network of the Frechet Inception Distance and the inception score, as their TensorFlow graph ran it.

    The features are its 2048 averages before the classifier; the logits leave out the classifier's bias, as the
    authors' inception score does.

    Args:
        network: with its weights.
    """

    def __init__(self, network: InceptionV3) -> None:
        super().__init__(
            "inception",
            2048,
            1008,
            f"grey repeated in three channels; {INCEPTION_SIZE} x {INCEPTION_SIZE} by TensorFlow 1's bilinear "
            "interpolation; (x - 128) / 128",
        )
        self.network = network
        self.freeze()

    def _evaluate(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        resized = resize_as_tensorflow(images.float(), INCEPTION_SIZE).expand(-1, 3, -1, -1)
        features = self.network((resized - 128.0) / 128.0)
        return features, self.network.classify(features)

    def _architecture(self) -> str:
        return "FID variant of InceptionV3"


def feature_extractor(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Loads a feature extractor.

    Args:
        name: ``"digits"`` (32 x 32 digits, bundled), ``"inception"`` (of the FID), ``"dinov2"`` or ``"clip"``
            (through transformers).
        weights: of ``inception`` the safetensors file that ``convert_inception`` wrote; of ``dinov2`` and ``clip`` a
            folder or hub id, such as ``facebook/dinov2-large``; of ``digits`` a folder of another ``DigitsClassifier``,
            by default the bundled one.
        device: where it runs.

    Raises:
        ValueError: another name, or weights that are missing, not readable, or of another network.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"name {name!r} is no feature extractor; use {', '.join(EXTRACTORS)}")
    extractor: FeatureExtractor
    if name == "digits":
        extractor = DigitsExtractor(DigitsClassifier.from_pretrained(weights or BUNDLED_DIGITS))
    elif name == "inception":
        if weights is None:
            raise ValueError(
                "weights of inception are missing: give the safetensors file that convert_inception makes of the "
                "public pt_inception-2015-12-05-6726825d.pth"
            )
        extractor = InceptionExtractor(InceptionV3.from_file(weights))
    else:
        # What imports transformers is only imported where it is used.
        from .vision_transformers import load_vision_transformer

        if weights is None:
            example = "facebook/dinov2-large" if name == "dinov2" else "openai/clip-vit-large-patch14"
            raise ValueError(f"weights of {name} are missing: give a folder or a hub id, such as {example}")
        extractor = load_vision_transformer(name, str(weights))
    return extractor.to(device)
