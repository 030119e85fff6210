"""T-Stitch on two digit models: distance and time against the share of the steps that the small one makes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from tqdm import tqdm

from fewstep.metrics import DigitsClassifier, Estimate, class_agreement, digits_statistics
from fewstep.samplers import SAMPLERS
from fewstep.samplers.stitch import StitchedDenoiser

from ..generation.model import load_model
from ..generation.stitched import check_interchangeable
from ..plots import save_figure
from .digits import features_of, generate
from .estimates import frechet_estimate, from_json, to_json
from .output import environment, read_entries, table

_TIMED_ON = ("processor", "torch_threads")
_CLAIM = 0.4
"""Share of early steps that arXiv 2402.14167 finds to cost no quality on DiT."""


@dataclass(frozen=True)
class Settings:
    """What the points of one curve have in common.

    Attributes:
        small: model of the early steps, a bundled name or a folder.
        large: model of the others.
        sampler: name.
        steps: sampling steps.
        count: images a point, the ten classes in turn.
        guidance_scale: 1 is none.
        batch_size: images at a time.
        seed: of image 0; image ``k`` has ``seed + k``.
        device: cpu, cuda or mps.
    """

    small: str
    large: str
    sampler: str
    steps: int
    count: int
    guidance_scale: float
    batch_size: int
    seed: int
    device: str


@dataclass(frozen=True)
class Point:
    """The images of one fraction.

    Attributes:
        fraction: of the steps, that the small model makes.
        small_steps: how many these are.
        frechet: distance of the bundled classifier's features to MNIST's training set.
        class_agreement: share of images of the class asked for.
        seconds: per image, the median over the batches; the decoder included.
    """

    fraction: float
    small_steps: int
    frechet: Estimate
    class_agreement: float
    seconds: float


class Curve:
    """Two models, stitched at any fraction.

    Args:
        settings: of the measurement.

    Raises:
        ValueError: the models are no pipelines of digits, or know other latents or another noise schedule.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        small, large = (load_model(name, "float32", settings.device) for name in (settings.small, settings.large))
        for option, model in (("small", small), ("large", large)):
            grey = isinstance(model.pipeline, DiTPipeline) and model.pipeline.vae.config.out_channels == 1
            if not grey or model.classes[:10] != tuple(range(10)):
                raise ValueError(f"--{option} {model.name} is no DiTPipeline of digits; give one of classes 0 to 9")
        check_interchangeable(small.pipeline, large.pipeline, small.name, large.name)
        self._networks = [small.pipeline.transformer, large.pipeline.transformer]
        self._pipeline = large.pipeline
        self._pipeline.scheduler = SAMPLERS[settings.sampler].build(large.scheduler_config)
        self._classifier = DigitsClassifier.bundled()
        self._reference = digits_statistics("train", self._classifier)

    def warm_up(self) -> None:
        """Runs both models once, so that no point's time holds what only the first call does."""
        self._stitch(0.5)
        generate(self._pipeline, range(self.settings.batch_size), steps=2, scale=self.settings.guidance_scale, seed=0)

    def measure(self, fraction: float) -> Point:
        """Generates and measures the images of one fraction.

        Args:
            fraction: of the steps, that the small model makes; in 0 to 1.
        """
        settings = self.settings
        stitched = self._stitch(fraction)
        features, logits, seconds = [], [], []
        for begin in tqdm(
            range(0, settings.count, settings.batch_size), desc=f"fraction {fraction:g}", unit="batch", leave=False
        ):
            indices = range(begin, min(begin + settings.batch_size, settings.count))
            clock = time.perf_counter()
            images = generate(
                self._pipeline, indices, steps=settings.steps, scale=settings.guidance_scale, seed=settings.seed
            ).cpu()
            seconds.append((time.perf_counter() - clock) / len(indices))
            with torch.no_grad():
                features.append(features_of(self._classifier, images))
                logits.append(self._classifier.classify(features[-1]))
        steps = self._pipeline.scheduler.num_inference_steps
        return Point(
            fraction=fraction,
            small_steps=sum(stitched.model_of_step(i, steps) == 0 for i in range(steps)),
            frechet=frechet_estimate(torch.cat(features), self._reference),
            class_agreement=class_agreement(torch.cat(logits), torch.arange(settings.count) % 10).rate,
            seconds=statistics.median(seconds),
        )

    def _stitch(self, fraction: float) -> StitchedDenoiser:
        stitched = StitchedDenoiser(self._networks, [fraction, 1.0 - fraction], by="step").follow(self._pipeline)
        self._pipeline.transformer = stitched
        return stitched


def report(settings: Settings, points: Sequence[Point]) -> dict[str, Any]:
    """The content of the JSON file, from which a curve goes on."""
    ordered = sorted(points, key=lambda point: point.fraction)
    return {
        "environment": environment(),
        "settings": asdict(settings),
        "points": [{**vars(point), "frechet": to_json(point.frechet)} for point in ordered],
    }


def read_points(path: Path, settings: Settings) -> list[Point]:
    """The points that a file of an earlier run holds; none where there is no file.

    Raises:
        ValueError: the file is none of this benchmark, or of other settings, or of another machine.
    """
    return read_entries(
        path,
        "curve",
        asdict(settings),
        lambda content: [Point(**{**one, "frechet": from_json(one["frechet"])}) for one in content["points"]],
        same_machine=_TIMED_ON,
    )


def stitch_table(points: Sequence[Point]) -> str:
    """The curve as text, a line a fraction; what changes is against the large model alone, where it was measured."""
    alone = next((point for point in points if point.fraction == 0.0), None)
    rows = []
    for point in sorted(points, key=lambda p: p.fraction):
        row = [
            f"{point.fraction:g}",
            str(point.small_steps),
            f"{point.frechet.value:.3f} +- {point.frechet.half_width():.3f}",
            "",
            f"{point.class_agreement:.4f}",
            f"{1e3 * point.seconds:.2f}",
            "",
        ]
        if alone is not None and point is not alone:
            change = point.frechet - alone.frechet
            row[3] = f"{change.value:+.3f} +- {change.half_width():.3f}"
            row[6] = f"{alone.seconds / point.seconds:.2f}"
        rows.append(row)
    header = ["fraction", "small steps", "Frechet (95 %)", "change (95 %)", "agreement", "ms/image", "speed-up"]
    return table(header, rows)


def plot_stitch(settings: Settings, points: Sequence[Point], path: Path) -> None:
    """Draws distance and time over the fraction.

    Args:
        settings: for the title.
        points: of the curve.
        path: of the picture, ending in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    ordered = sorted(points, key=lambda point: point.fraction)
    fractions = [point.fraction for point in ordered]
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    distance, duration = figure.subplots(1, 2)
    distance.errorbar(
        fractions,
        [point.frechet.value for point in ordered],
        yerr=[point.frechet.half_width() for point in ordered],
        color="#0072B2",
        marker="o",
        capsize=3,
    )
    distance.axvline(_CLAIM, color="grey", linestyle="--", linewidth=1)
    distance.annotate(
        "no loss up to here\n(arXiv 2402.14167, DiT)",
        (_CLAIM, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )
    distance.set(ylabel="Frechet distance (95 %)", ylim=(0, None))
    duration.plot(fractions, [1e3 * point.seconds for point in ordered], color="#D55E00", marker="s")
    duration.set(ylabel="milliseconds an image", ylim=(0, None))
    for panel in (distance, duration):
        panel.set(xlabel="share of the steps by the small model", xlim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    guidance = "" if settings.guidance_scale == 1.0 else f", guidance {settings.guidance_scale:g}"
    names = f"{Path(settings.small).name} then {Path(settings.large).name}"
    figure.suptitle(f"{names}: {settings.sampler}, {settings.steps} steps, {settings.count} images{guidance}")
    save_figure(figure, path)
