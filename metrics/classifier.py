"""The feature extractor of the bundled digit models: a small convolutional classifier."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

BUNDLED_DIGITS = Path(__file__).parent / "digits"
"""Folder of the bundled classifier and of the reference statistics made with it."""


def add_weights(digest: Any, network: nn.Module) -> None:
    """Adds names, shapes and single-precision values of a network's tensors to a hash."""
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())


class DigitsClassifier(nn.Module):
    """A convolutional classifier of 32 x 32 images whose last hidden layer serves as features.

    Six 3 x 3 convolutions with group normalisation, three of them halving the resolution, then one
    hidden layer (the features) and the logits. Nothing depends on the batch: an image has the same
    features alone and among others, up to rounding.

    Args:
        channels: colour channels of the images.
        classes: number of classes.
        feature_size: size D of the last hidden layer.
    """

    def __init__(self, channels: int = 1, classes: int = 10, feature_size: int = 64) -> None:
        super().__init__()
        self.config = {"channels": channels, "classes": classes, "feature_size": feature_size}
        plan = [(channels, 24, 1), (24, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2)]
        layers: list[nn.Module] = []
        for inner, outer, stride in plan:
            layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.GroupNorm(8, outer), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(96 * 4 * 4, feature_size)
        self.head = nn.Linear(feature_size, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images.

        Args:
            images: ``(B, channels, 32, 32)``, floating point in [-1, 1], black at -1.

        Returns:
            ``(B, D)``, non-negative.

        Raises:
            ValueError: the images have another shape, or integer values.
        """
        expected = (self.config["channels"], 32, 32)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; the classifier takes (B, {', '.join(map(str, expected))})"
            )
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; give floating point in [-1, 1], as images / 127.5 - 1")
        hidden = self.convolutions(images.to(self.head.weight.dtype))
        return F.relu(self.hidden(hidden.flatten(1)))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, classes)`` of features ``(B, D)``."""
        return self.head(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, classes)`` of images; see `features` for their range and shape."""
        return self.classify(self.features(images))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the architecture and the weights, the same for half and single precision storage."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        add_weights(digest, self)
        return digest.hexdigest()

    def save_pretrained(self, path: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (half precision) into the folder ``path``.

        The weights in memory are rounded to half precision as well, so that what is in memory and
        what is on disk give the same features.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in self.state_dict().items()}
        self.load_state_dict(weights)
        (path / "model.safetensors.partial").write_bytes(save(weights))
        os.replace(path / "model.safetensors.partial", path / "model.safetensors")
        (path / "config.json.partial").write_text(json.dumps(self.config, indent=2) + "\n")
        os.replace(path / "config.json.partial", path / "config.json")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DigitsClassifier:
        """Loads a classifier in evaluation mode and single precision.

        Args:
            path: a folder written by `save_pretrained`.

        Raises:
            ValueError: the folder does not hold a classifier.
        """
        path = Path(path)
        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if missing:
            raise ValueError(f"path {path} holds no classifier: {' and '.join(missing)} missing")
        try:
            model = cls(**json.loads((path / "config.json").read_text()))
            model.load_state_dict(load_file(path / "model.safetensors"))
        except (TypeError, RuntimeError, json.JSONDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"path {path} holds another kind of model than DigitsClassifier: {reason}") from error
        return model.eval()

    @classmethod
    def bundled(cls) -> DigitsClassifier:
        """The classifier of 32 x 32 MNIST digits that comes with the package."""
        return cls.from_pretrained(BUNDLED_DIGITS)
