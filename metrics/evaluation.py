"""All figures of a set of generated images from one pass over them, with confidence intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from .extractors import FeatureExtractor
from .extrapolation import frechet_distance_infinity
from .frechet import FrechetDistance
from .intervals import Estimate, jackknife, jackknife_groups
from .kernel import kernel_distance_estimate
from .manifold import density_coverage_estimates, precision_recall_estimates
from .scores import inception_score
from .statistics import FeatureStatistics, ReferenceStatistics, moments

IMAGE_METRICS = ("fid", "is", "kid", "precision", "recall", "density", "coverage", "fid_infinity")
"""Names that ``ImageMetrics`` knows."""

_PAIRWISE = {"kid", "precision", "recall", "density", "coverage"}
_ROWS = 4096
"""Features that are summed at a time, so that float64 copies stay small."""


class ImageMetrics(Metric):
    """Figures of generated images, by name, held against a reference.

    A ``torchmetrics.Metric`` whose states are the features (and logits) of every image with the image's number. All
    figures are made from the features in the order of these numbers. So they do not depend on which process
    saw which image or in what order, to the last bit where the features do not: an image's features are equal
    bit by bit only in equal batches, so let batches be fixed ranges of numbers. Memory: ``4 N D`` bytes, 400 MB of
    50,000 images and 2048 features.

    ``fid`` is the Frechet distance, ``fid_infinity`` the same extrapolated to infinitely many images, ``is`` the
    inception score, ``kid`` the kernel distance (not times 1000), the others as of ``precision_recall`` and
    ``density_coverage``.

    Args:
        metrics: names of ``IMAGE_METRICS``.
        reference: that the images are held against; only the inception score does without.
        extractor: of the features; without it, `update` takes features only.
        splits: of the inception score.
        pairs: the metrics that compare pairs of images (``kid``, ``precision``, ``recall``, ``density``, ``coverage``)
            take so many images, the first by their numbers.

    Raises:
        ValueError: a name is unknown, the reference is missing or of another extractor, or holds no features where
            pairs are compared, or the extractor has no classes for the inception score.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    features: list[torch.Tensor]
    logits: list[torch.Tensor]
    numbers: list[torch.Tensor]

    def __init__(
        self,
        metrics: Sequence[str],
        reference: ReferenceStatistics | None = None,
        *,
        extractor: FeatureExtractor | None = None,
        splits: int = 10,
        pairs: int = 10000,
    ) -> None:
        super().__init__()
        unknown = [name for name in metrics if name not in IMAGE_METRICS]
        if unknown or not metrics:
            raise ValueError(f"metrics {', '.join(unknown) or 'is empty'}: use some of {', '.join(IMAGE_METRICS)}")
        if reference is None and set(metrics) != {"is"}:
            raise ValueError("reference is missing; only the inception score ('is') does without")
        if reference is not None and extractor is not None and reference.extractor != extractor.fingerprint:
            raise ValueError(
                f"reference was made with extractor {reference.extractor[:12]}, not {extractor.name} "
                f"{extractor.fingerprint[:12]}; compute it anew with this one"
            )
        if reference is not None and reference.features is None and _PAIRWISE & set(metrics):
            raise ValueError(
                f"reference holds no features, which {', '.join(sorted(_PAIRWISE & set(metrics)))} need; "
                "compute it with keep_features"
            )
        if extractor is not None and extractor.classes is None and "is" in metrics:
            raise ValueError(f"extractor {extractor.name} has no classes for 'is'; use digits or inception")
        if splits < 1 or pairs < 2:
            raise ValueError(f"splits {splits} must be at least 1 and pairs {pairs} at least 2")
        self.metrics, self.reference, self.extractor = tuple(dict.fromkeys(metrics)), reference, extractor
        self.splits, self.pairs = splits, pairs
        self._distance: FrechetDistance | None = None
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(
        self, images: torch.Tensor, numbers: Sequence[int] | torch.Tensor, *, logits: torch.Tensor | None = None
    ) -> None:
        """Adds images, or the features that the extractor made of them.

        Args:
            images: uint8 ``(B, 1 or 3, H, W)``, or features, floating point ``(B, D)``.
            numbers: of the images, each used once in all processes, ``B`` of them.
            logits: ``(B, classes)``, beside features where the inception score is asked for.

        Raises:
            ValueError: shapes disagree, images are of other channels than the reference's or given without an
                extractor, logits are missing or superfluous, or values are not finite; nothing is added then.
        """
        if images.dtype == torch.uint8:
            features, logits = self._extract(images, logits)
        elif images.ndim == 4:
            raise ValueError(f"images are {images.dtype}; give uint8 from 0 to 255, or their features (B, D)")
        else:
            features = images.detach()
        size = len(self.reference.mean) if self.reference is not None else features.shape[-1]
        if features.ndim != 2 or features.shape[1] != size:
            raise ValueError(f"features have shape {tuple(features.shape)}; give (B, {size})")
        number = torch.as_tensor(numbers, dtype=torch.long, device=self.device)
        if number.shape != features.shape[:1]:
            raise ValueError(f"numbers have shape {tuple(number.shape)}; give one for each of {len(features)} images")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("features have values that are not finite; check the images for NaN")
        if "is" in self.metrics:
            if logits is None or logits.ndim != 2 or len(logits) != len(features):
                shape = "missing" if logits is None else f"of shape {tuple(logits.shape)}"
                raise ValueError(f"logits are {shape}; 'is' needs (B, classes) beside the features")
            if len(self.logits) and logits.shape[1] != self.logits[0].shape[1]:
                raise ValueError(
                    f"logits have {logits.shape[1]} classes, those before {self.logits[0].shape[1]}; use one classifier"
                )
            if not bool(torch.isfinite(logits).all()):
                raise ValueError("logits have values that are not finite; check the images for NaN")
            self.logits.append(logits.detach().to(self.device, torch.float32))
        self.features.append(features.to(self.device, torch.float32))
        self.numbers.append(number)

    def compute(self) -> dict[str, float]:
        """The figures by name, and ``is_spread``, the standard deviation over the splits, where ``is`` is asked for.

        Warns of each of `remarks`.

        Raises:
            ValueError: no images, an image's number was used twice, or too few images for a metric.
        """
        features, probabilities = self._sorted()
        for remark in self._remarks(len(features)):
            warnings.warn(remark, stacklevel=1)
        found = {}
        for name in self.metrics:
            found[name] = self._statistic(name, features, probabilities)
            if name == "is":
                found["is_spread"] = inception_score(probabilities, self.splits).spread
        return found

    def estimates(self, groups: int = 20, *, turn: int = 1) -> dict[str, Estimate]:
        """The figures by name, each also without each of some groups of images; see ``Estimate.interval``.

        Two sets of images with the same numbers have the same groups, so the difference of their estimates is that of
        paired images where these come from the same seeds.

        Args:
            groups: how many.
            turn: number of classes or prompts that the images take in turn by their numbers, as of
                ``jackknife_groups``.

        Raises:
            ValueError: as of `compute`, or fewer than two images a group.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            features, probabilities = self._sorted()
        found: dict[str, Estimate] = {}
        for name in self.metrics:
            if name not in found:
                found.update(self._estimate(name, features, probabilities, groups, turn))
        return {name: found[name] for name in self.metrics}

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        # A process without images takes part with none: torchmetrics would send what has another shape and dtype.
        def gather_those_with_images(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
            return [part for part in dist_sync_fn(state, group=group) if len(part)] or [state]

        if not len(self.numbers):
            self.numbers = [torch.empty(0, dtype=torch.long, device=self.device)]
            self.features = [torch.empty(0, 0, device=self.device)]
            if "is" in self.metrics:
                self.logits = [torch.empty(0, 0, device=self.device)]
        super()._sync_dist(gather_those_with_images, process_group)

    def remarks(self) -> tuple[str, ...]:
        """What should be said beside the figures, a line each, of the images of all processes, which all call it.

        Covariances that cannot have full rank, and images that the metrics of pairs leave out.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._to_sync):
            return self._remarks(self._count())

    def _count(self) -> int:
        """Number of images that the states hold."""
        return len(dim_zero_cat(self.numbers)) if len(self.numbers) else 0

    def _remarks(self, count: int) -> tuple[str, ...]:
        said = []
        if self.reference is not None and {"fid", "fid_infinity"} & set(self.metrics):
            size = len(self.reference.mean)
            for whose, number in (("generated", count), ("reference", self.reference.count)):
                if number <= size:
                    said.append(
                        f"{number} {whose} images are too few for {size} features: their covariance is singular, and "
                        f"the Frechet distance says little; give more than {size}, best ten times as many"
                    )
        pairwise = [name for name in self.metrics if name in _PAIRWISE]
        if pairwise and count > self.pairs:
            said.append(f"{', '.join(pairwise)}: of the first {self.pairs} of {count} images (pairs={self.pairs})")
        return tuple(said)

    def _extract(self, images: torch.Tensor, logits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.extractor is None or logits is not None:
            raise ValueError("images need an extractor and no logits; or give features, with logits for 'is'")
        shape = None if self.reference is None else self.reference.image_shape
        if shape is not None and images.ndim == 4 and images.shape[1] != shape[0]:
            kinds = {1: "grey", 3: "RGB"}
            raise ValueError(
                f"images are {kinds.get(images.shape[1], images.shape[1])}, the reference's are {kinds[shape[0]]}; "
                "make them alike"
            )
        return self.extractor.features_and_logits(images)

    def _sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features, and probabilities of the classes (empty where not asked for), in the order of the numbers."""
        if not self._count():
            raise ValueError("no images were added; call update first")
        numbers, order = dim_zero_cat(self.numbers).cpu().sort()
        twice = numbers[1:][numbers[1:] == numbers[:-1]]
        if len(twice):
            raise ValueError(f"image number {int(twice[0])} was added twice; give each its own")
        features = dim_zero_cat(self.features).cpu()[order]
        if "is" not in self.metrics:
            return features, torch.empty(0)
        return features, dim_zero_cat(self.logits).cpu()[order].double().softmax(1)

    def _statistic(self, name: str, features: torch.Tensor, probabilities: torch.Tensor) -> float:
        if name == "is":
            return inception_score(probabilities, self.splits).mean
        if name == "fid":
            return self._to_reference()(*_sums(features).compute())
        if name == "fid_infinity":
            return frechet_distance_infinity(features, self._to_reference())
        return self._pairwise(name, features, torch.zeros(len(features), dtype=torch.long), 1)[name].value

    def _estimate(
        self, name: str, features: torch.Tensor, probabilities: torch.Tensor, groups: int, turn: int
    ) -> dict[str, Estimate]:
        count = len(features)
        if name in _PAIRWISE:
            count = min(count, self.pairs)
            return self._pairwise(name, features, jackknife_groups(count, groups, turn=turn), groups)
        if name == "fid":
            return {name: self._frechet_estimate(features, jackknife_groups(count, groups, turn=turn), groups)}
        if name == "is":

            def score(kept: torch.Tensor) -> float:
                return inception_score(probabilities, self.splits, kept=kept).mean

            return {name: jackknife(score, count, groups, turn=turn)}
        distance = self._to_reference()

        def infinite(kept: torch.Tensor) -> float:
            return frechet_distance_infinity(features, distance, kept)

        return {name: jackknife(infinite, count, groups, turn=turn)}

    def _frechet_estimate(self, features: torch.Tensor, group: torch.Tensor, groups: int) -> Estimate:
        """Moments without a group are all moments less the group's: one pass over the features instead of many."""
        distance, left_out = self._to_reference(), []
        total = _sums(features)
        for g in range(groups):
            part = _sums(features[group == g])
            rest = total.count - part.count, total.total - part.total, total.products - part.products
            left_out.append(distance(*moments(*rest)))
        return Estimate(distance(*total.compute()), tuple(left_out), lowest=0.0)

    def _pairwise(self, name: str, features: torch.Tensor, group: torch.Tensor, groups: int) -> dict[str, Estimate]:
        """The metric of that name, and the one that comes with it."""
        assert self.reference is not None  # checked with the names
        assert self.reference.features is not None
        real, fake = self.reference.features, features[: self.pairs]
        group = group[: len(fake)]
        if name == "kid":
            return {name: kernel_distance_estimate(real, fake, group, groups)}
        if name in ("precision", "recall"):
            precision, recall = precision_recall_estimates(real, fake, group, groups)
            return {"precision": precision, "recall": recall}
        density, coverage = density_coverage_estimates(real, fake, group, groups)
        return {"density": density, "coverage": coverage}

    def _to_reference(self) -> FrechetDistance:
        """Made at first use: its decomposition takes seconds of thousands of features."""
        if self._distance is None:
            assert self.reference is not None  # checked with the names
            self._distance = FrechetDistance(self.reference.mean, self.reference.covariance)
        return self._distance


def _sums(features: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], sync_on_compute=False)
    for part in features.split(_ROWS):
        statistics.update(part)
    return statistics
