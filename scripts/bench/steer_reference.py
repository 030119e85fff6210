"""What steered digits are held against: real images of their target, by features that the reward does not know too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.metrics import DigitsClassifier, FeatureStatistics, frechet_distance

from .digits import real_digits

_COMPONENTS = 40
_FITTED = 10_000
"""Images that suffice for these components and the second classifier: it is right on 96.0 % of MNIST's test images, and
on 96.3 % after all 60,000."""

_CHUNK = 100
# Variance of a pixel from its rounding is far below; without it, few images of a class have a singular covariance.
_RIDGE = 1e-2


@dataclass(frozen=True)
class Measure:
    """A figure of a set of images.

    Attributes:
        title: in the table.
        best: 1 where more is better, -1 where less is, 0 where neither.
        digits: behind the decimal point.
    """

    title: str
    best: int
    digits: int


MEASURES = {
    "frechet": Measure("Frechet", -1, 2),
    "pixels": Measure("pixel Frechet", -1, 2),
    "reward": Measure("reward", 1, 3),
    "agreement": Measure("agreement", 1, 3),
    "distinct": Measure("distinct", 1, 0),
}
"""Distances of the reward classifier's features and of principal components of pixels, the mean reward, the share of
images that a second classifier takes for the target, and how many images are not copies of one another."""


class PixelModel:
    """Principal components of real digits, and the classifier that follows from a Gaussian for each class there.

    Knows nothing of the reward's network.

    Args:
        images: of all ten classes, float ``(count, 1, 32, 32)`` in [-1, 1].
        labels: ``(count,)``.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        flat = images.flatten(1)
        self._mean = flat.mean(0)
        _, vectors = torch.linalg.eigh((flat - self._mean).T @ (flat - self._mean) / len(flat))
        self._basis = vectors[:, -_COMPONENTS:]
        features = self.features(images)
        self._gaussians = []
        for label in range(10):
            own = features[labels == label].double()
            covariance = own.T.cov() + _RIDGE * torch.eye(_COMPONENTS, dtype=torch.float64)
            gaussian = torch.distributions.MultivariateNormal(own.mean(0), covariance)
            self._gaussians.append((gaussian, math.log(len(own) / len(labels))))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """``(count, 40)`` of images in [-1, 1]."""
        return (images.flatten(1) - self._mean) @ self._basis

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The most probable class of each image, ``(count,)``."""
        scores = [gaussian.log_prob(features.double()) + prior for gaussian, prior in self._gaussians]
        return torch.stack(scores).argmax(0)


class Reference:
    """Real digits, and the figures of others beside them.

    Args:
        data: path of MNIST, for ``load_images``.
        targets: classes of each target, by name.
        count: of images in a set.

    Raises:
        ValueError: no grey images of ten classes, or fewer of a target's than are needed.
    """

    def __init__(self, data: Path, targets: Mapping[str, Sequence[int]], count: int) -> None:
        train, self._test = (real_digits(data, split) for split in ("train", "test"))
        self._targets = {name: torch.tensor(labels) for name, labels in targets.items()}
        for name, labels in self._targets.items():
            for split, images in (("training", train), ("test", self._test)):
                found = int(torch.isin(images.labels, labels).sum())
                if found < count:
                    raise ValueError(f"--data {data} has {found} {split} images of target {name}; needed are {count}")
        self._classifier = DigitsClassifier.bundled()
        some = torch.arange(0, len(train), max(1, len(train) // _FITTED))
        self._pixels = PixelModel(train.float_images(some), train.labels[some])
        self._statistics = {}
        for name, labels in self._targets.items():
            own = train.float_images(torch.isin(train.labels, labels))
            self._statistics[name] = [_moments(features) for features in self._features(own)]

    def real(self, target: str, count: int, seed: int) -> torch.Tensor:
        """Test images of a target, drawn without replacement, ``(count, 1, 32, 32)`` in [-1, 1]."""
        own = torch.isin(self._test.labels, self._targets[target]).nonzero().flatten()
        chosen = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:count]
        return self._test.float_images(own[chosen])

    def figures(self, target: str, images: torch.Tensor) -> dict[str, float]:
        """All figures but the copies, by the keys of ``MEASURES``.

        Args:
            target: name.
            images: ``(count, 1, 32, 32)`` in [-1, 1], of 8 bits.
        """
        labels, features = self._targets[target], self._features(images)
        distances = [
            frechet_distance(*_moments(own), *real)
            for own, real in zip(features, self._statistics[target], strict=True)
        ]
        with torch.no_grad():
            answers = self._classifier.classify(features[0]).log_softmax(1)
        return {
            "frechet": distances[0],
            "pixels": distances[1],
            "reward": float(answers[:, labels].logsumexp(1).double().mean()),
            "agreement": float(torch.isin(self._pixels.classify(features[1]), labels).double().mean()),
        }

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.cat([self._classifier.features(part) for part in images.split(_CHUNK)])
        return seen, self._pixels.features(images)


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gathered = FeatureStatistics(features.shape[1])
    gathered.update(features)
    return gathered.compute()
