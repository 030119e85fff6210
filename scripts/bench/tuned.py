"""Samplers that were fitted to a model, against the best of diffusers' at as few network calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fewstep.metrics import (
    DigitsClassifier,
    FeatureStatistics,
    GaussianMixture,
    GuidedPair,
    digits_statistics,
    frechet_distance,
)
from fewstep.samplers import SAMPLERS, PlanScheduler
from fewstep.samplers.plan_numbers import FREE

from ..generation.model import load_model
from ..tuning.compensated import fit_ratios
from ..tuning.learned import fit_table
from ..tuning.searched import error_fitness, search
from ..tuning.task import STATISTICS, Batch, Conditions, Inputs, change, ends, errors, followed, noises
from .accuracy import MIXTURE
from .digits import features_of
from .output import STABLE_DIFFUSION, read_entries, table
from .rivals import Rival, rivals

METHODS = ("unipc", "dc", "s3", "learned")
_SEEN = {"dc": 10, "s3": 40}
_CHOOSE, _HELD_OUT, _IMAGES = 50, 10_000, 20_000
"""First seeds of the noises that choose among diffusers' schedulers, and of those that nothing was fitted to."""


class Subject(Protocol):
    """A model with a guidance scale."""

    config: Mapping[str, Any]
    sample_calls: int
    """Noises times calls that a learned plan is fitted to: derivatives are the dearer the more calls there are."""

    def inputs(self, seeds: range) -> list[Inputs]:
        """Noises, one a seed, and the network."""

    def features(self, samples: torch.Tensor) -> torch.Tensor:
        """What the Frechet distance compares, ``(B, F)``."""

    def reference(self, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance that it compares with; ``truth`` are features of exact ends."""


class Digits:
    """A bundled model of digits."""

    sample_calls = 250

    def __init__(self, name: str, guidance_scale: float) -> None:
        self.model = load_model(name, "float32", "cpu")
        self.config = self.model.scheduler_config
        self._conditions = Conditions(self.model, (), guidance_scale)
        self._classifier = DigitsClassifier.bundled()
        self._reference = digits_statistics("train", self._classifier)

    def inputs(self, seeds: range) -> list[Inputs]:
        return self._conditions.inputs(seeds)

    @torch.no_grad()
    def images(self, samples: torch.Tensor) -> torch.Tensor:
        """Decoded latents, ``(B, 1, 32, 32)`` in [0, 1]."""
        vae = self.model.pipeline.vae
        decoded: torch.Tensor = vae.decode(samples / vae.config.scaling_factor).sample
        return decoded.mul(0.5).add(0.5).clamp(0.0, 1.0)

    @torch.no_grad()
    def features(self, samples: torch.Tensor) -> torch.Tensor:
        return features_of(self._classifier, self.images(samples))

    def reference(self, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._reference.mean, self._reference.covariance


class Mixture:
    """The mixture of Gaussians of ``bench accuracy``, whose predictions are exact."""

    config: Mapping[str, Any] = {**STABLE_DIFFUSION, "timestep_spacing": "trailing"}
    sample_calls = 1000

    def __init__(self, guidance_scale: float) -> None:
        mixture = GaussianMixture.random(seed=MIXTURE)
        self._schedule = SAMPLERS["ddim"].build(self.config).schedule
        self._model = mixture if guidance_scale == 1.0 else GuidedPair(mixture.component(0), mixture, guidance_scale)

    def inputs(self, seeds: range) -> list[Inputs]:
        return [Inputs(self._network, noises(seeds, (64,), torch.float64))]

    def features(self, samples: torch.Tensor) -> torch.Tensor:
        return samples

    def reference(self, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return truth.mean(0), truth.T.cov()

    def _network(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        level = float(self._schedule.level(float(timestep)))
        alpha, sigma = (float(v) for v in self._schedule.alpha_sigma(level))
        x = x.double()
        return (x - alpha * self._model.clean(x, alpha, sigma)) / sigma


@dataclass(frozen=True)
class Result:
    """One method at one number of calls.

    Attributes:
        guidance_scale: 1 is none.
        calls: of the network.
        method: ``diffusers`` or one of ``METHODS``.
        detail: which scheduler of diffusers was the best.
        errors: statistics of the distances to the exact ends, each with its change against ``diffusers``.
        frechet: the Frechet distance.
        frechet_interval: 95 %, from resampled images.
    """

    guidance_scale: float
    calls: int
    method: str
    detail: str
    errors: Mapping[str, Mapping[str, Any]]
    frechet: float
    frechet_interval: tuple[float, float]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        held_out: noises of the errors.
        images: samples of the Frechet distances.
        iterations: of learned plans.
        rounds: of searches.
        polish: evaluations of continuous changes in searches.
    """

    held_out: int = 200
    images: int = 1000
    iterations: int = 30
    rounds: int = 8
    polish: int = 400


class Comparison:
    """All methods on one model and guidance scale.

    Args:
        subject: the model.
        guidance_scale: which its networks have.
        size: how much is measured.
        folder: of the fitted schedulers, which are read where they exist.
    """

    def __init__(self, subject: Subject, guidance_scale: float, size: Size, folder: Path) -> None:
        self.subject, self.guidance_scale, self.size, self.folder = subject, guidance_scale, size, folder
        start = self._build("ddim", 3)
        self._choose = self._batches(start, range(_CHOOSE, _CHOOSE + 20))
        self._held_out = self._batches(start, range(_HELD_OUT, _HELD_OUT + size.held_out))
        self._images = subject.inputs(range(_IMAGES, _IMAGES + size.images))
        exact = [subject.features(batch.truth.samples[-1]) for batch in self._held_out]
        self._reference = subject.reference(torch.cat(exact).double())

    def measure(self, calls: int, methods: Sequence[str]) -> Iterator[Result]:
        """The best of diffusers first, then the methods in turn."""
        best = self.best(calls)
        theirs = self.errors(best.scheduler, best.steps)
        yield self._result(calls, "diffusers", best.name, theirs, theirs, best.scheduler, best.steps)
        for method in methods:
            scheduler = self.fitted(method, calls)
            ours = self.errors(scheduler, calls)
            yield self._result(calls, method, type(scheduler).__name__, theirs, ours, scheduler, calls)

    def best(self, calls: int) -> Rival:
        """The best of diffusers, by the median on noises of its own."""

        def median(rival: Rival) -> float:
            found = torch.cat([errors(rival.scheduler, batch, rival.steps) for batch in self._choose])
            return float(found.median()) if found.isfinite().all() else float("inf")

        return min(rivals(dict(self.subject.config), calls), key=median)

    def fitted(self, method: str, calls: int) -> PlanScheduler:
        """The scheduler of one of ``METHODS``, fitted now or read from the folder."""
        if method == "unipc":
            return self._build("unipc", calls)
        folder = self.folder / f"{method}-{calls}-guidance-{self.guidance_scale:g}"
        if (folder / "scheduler_config.json").exists():
            found: PlanScheduler = PlanScheduler.from_pretrained(folder)
            return found
        folder.mkdir(parents=True, exist_ok=True)
        start = self._build("dc-solver" if method == "dc" else "ddim", calls)
        count = _SEEN.get(method, self.subject.sample_calls // calls)
        seen = self._batches(start, range(100_000, 100_000 + count))
        validation = self._batches(start, range(200_000, 200_000 + count // 2))
        if method == "dc":
            found, _ = fit_ratios(start, seen[0], refinement=40)
        elif method == "s3":
            found, _ = search(
                start,
                error_fitness(seen[0]),
                error_fitness(validation[0]),
                rounds=self.size.rounds,
                refinement=self.size.polish,
                seed=0,
                archive=folder / "schedules.jsonl",
            )
        else:
            found, _ = fit_table(
                start, seen, validation, free=FREE, iterations=self.size.iterations, checkpoint=folder / "fit.json"
            )
        found.save_pretrained(folder)
        return found

    def _batches(self, scheduler: PlanScheduler, seeds: range) -> list[Batch]:
        return followed(scheduler, self.subject.inputs(seeds))

    def _build(self, name: str, calls: int) -> Any:
        scheduler = SAMPLERS[name].build(self.subject.config, timestep_spacing="trailing")
        scheduler.set_timesteps(calls)
        return scheduler

    def errors(self, scheduler: Any, steps: int) -> torch.Tensor:
        """Each held-out noise's distance to its exact end."""
        return torch.cat([errors(scheduler, batch, steps) for batch in self._held_out])

    def _result(
        self, calls: int, method: str, detail: str, theirs: torch.Tensor, ours: torch.Tensor, scheduler: Any, steps: int
    ) -> Result:
        features = [self.subject.features(ends(scheduler, inputs, steps)).double() for inputs in self._images]
        frechet, interval = _frechet(torch.cat(features), self._reference)
        figures = {name: change(theirs, ours, name) for name in STATISTICS}
        return Result(self.guidance_scale, calls, method, detail, figures, frechet, interval)


def _frechet(
    features: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor], resamplings: int = 100
) -> tuple[float, tuple[float, float]]:
    """The distance, and the middle 95 % of those of resampled images, moved by the bias that resampling adds."""
    generator = torch.Generator().manual_seed(0)

    def distance(rows: torch.Tensor) -> float:
        statistics = FeatureStatistics(features.shape[1])
        statistics.update(rows)
        return frechet_distance(*statistics.compute(), *reference)

    value = distance(features)
    draws = [torch.randint(len(features), (len(features),), generator=generator) for _ in range(resamplings)]
    found = torch.tensor([distance(features[draw]) for draw in draws], dtype=torch.float64)
    spread = found - found.mean()
    return value, (value + float(spread.quantile(0.025)), value + float(spread.quantile(0.975)))


def tuned_table(results: Sequence[Result]) -> str:
    """The results as text, a block a guidance scale."""
    blocks = []
    for scale in dict.fromkeys(result.guidance_scale for result in results):
        title = "no guidance" if scale == 1.0 else f"guidance {scale:g}"
        header = [title, "calls", "median error", "mean error", "RMSE", "Frechet distance", "scheduler"]
        rows = []
        for result in results:
            if result.guidance_scale == scale:
                low, high = result.frechet_interval
                cells = [_cell(result.errors[name], result.method) for name in ("median", "mean", "root_mean_square")]
                detail = result.detail if result.method == "diffusers" else ""
                rows.append(
                    [
                        result.method,
                        str(result.calls),
                        *cells,
                        f"{result.frechet:.2f} ({low:.2f} to {high:.2f})",
                        detail,
                    ]
                )
        blocks.append(table(header, rows))
    return "\n\n".join(blocks)


def _cell(figures: Mapping[str, Any], method: str) -> str:
    if method == "diffusers":
        return f"{figures['after']:.4f}"
    low, high = figures["change_interval"]
    return f"{figures['after']:.4f} ({low:+.0%} to {high:+.0%})"


def report(settings: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """The JSON form."""
    return {"settings": settings, "results": [asdict(result) for result in results]}


def read_results(path: Path, settings: Mapping[str, Any]) -> list[Result]:
    """What a file of ``report`` holds; nothing where there is none.

    Raises:
        ValueError: the file holds something else, or results of other settings.
    """
    return read_entries(
        path,
        "results",
        settings,
        lambda content: [
            Result(**{**one, "frechet_interval": tuple(one["frechet_interval"])}) for one in content["results"]
        ],
    )
