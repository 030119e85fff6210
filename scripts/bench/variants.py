"""Samplers against one that they vary, on the same noises: distance to real digits, and divergence artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fewstep.metrics import (
    ChannelNormalization,
    DigitsClassifier,
    Estimate,
    ReferenceStatistics,
    digits_statistics,
    jackknife,
    magnitude_score,
)
from fewstep.samplers import SAMPLERS, PlanScheduler

from ..generation.choices import unknown
from ..generation.options import parse_options
from ..generation.schedulers import check_options
from ..tuning.task import ends
from .estimates import frechet_estimate, from_json, to_json
from .output import read_entries, table
from .tuned import Digits

_CLEAN, _IMAGES = 40_000, 20_000
"""First seeds of the images that say what clean latents are, and of those that are measured."""


@dataclass(frozen=True)
class Point:
    """The images of one sampler at one guidance scale.

    Attributes:
        sampler: as it was named.
        guidance_scale: 1 is none.
        calls: of the network, an image.
        frechet: distance of the bundled classifier's features to MNIST's training set.
        magnitude: mean magnitude score of the latents.
    """

    sampler: str
    guidance_scale: float
    calls: int
    frechet: Estimate
    magnitude: Estimate


def parse_sampler(words: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``NAME`` or ``NAME:KEY=VALUE:...``.

    Raises:
        ValueError: no sampler of that name, or options that it does not have.
    """
    name, *pairs = words.split(":")
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    options = parse_options(pairs)
    check_options(SAMPLERS[name].scheduler, options, name)
    return name, options


class Variants:
    """A model of digits and noises for it.

    Args:
        model: a bundled name.
        steps: sampling steps.
        count: images a sampler, the ten classes in turn.
    """

    def __init__(self, model: str, steps: int, count: int) -> None:
        self.model, self.steps, self.count = model, steps, count
        self._reference: ReferenceStatistics = digits_statistics("train", DigitsClassifier.bundled())
        plain = Digits(model, 1.0)
        sampler = SAMPLERS["dpm++"].build(plain.config)
        clean = [ends(sampler, inputs, 50) for inputs in plain.inputs(range(_CLEAN, _CLEAN + 500))]
        self._normalization = ChannelNormalization.of_data(clean)

    def measure(self, words: str, guidance_scale: float) -> Point:
        """Makes and measures the images of one sampler.

        Args:
            words: as for `parse_sampler`.
            guidance_scale: 1 is none.
        """
        name, options = parse_sampler(words)
        digits = Digits(self.model, guidance_scale)
        scheduler: PlanScheduler = SAMPLERS[name].build(digits.config, **options)
        features, scores = [], []
        inputs = digits.inputs(range(_IMAGES, _IMAGES + self.count))
        for one in tqdm(inputs, desc=f"{words}, guidance {guidance_scale:g}", unit="batch", leave=False):
            samples = ends(scheduler, one, self.steps)
            features.append(digits.features(samples))
            scores.append(magnitude_score(samples, self._normalization))
        score = torch.cat(scores)
        return Point(
            sampler=words,
            guidance_scale=guidance_scale,
            calls=len(scheduler.timesteps),
            frechet=frechet_estimate(torch.cat(features), self._reference),
            magnitude=jackknife(lambda kept: float(score[kept].mean()), self.count),
        )


def variants_table(points: Sequence[Point]) -> str:
    """A line a sampler, a block a guidance scale; changes are against the first line of the block."""
    blocks = []
    for scale in dict.fromkeys(point.guidance_scale for point in points):
        block = [point for point in points if point.guidance_scale == scale]
        rows = []
        for point in block:
            row = [point.sampler, str(point.calls)]
            for name in ("magnitude", "frechet"):
                figure, base = getattr(point, name), getattr(block[0], name)
                row += [_cell(figure, ".3f"), "" if point is block[0] else _cell(figure - base, "+.3f")]
            rows.append(row)
        title = "no guidance" if scale == 1.0 else f"guidance {scale:g}"
        blocks.append(table([title, "calls", "magnitude score (95 %)", "change", "Frechet (95 %)", "change"], rows))
    return "\n\n".join(blocks)


def _cell(figure: Estimate, form: str) -> str:
    return f"{figure.value:{form}} +- {figure.half_width():.3f}"


def report(settings: Mapping[str, Any], points: Sequence[Point]) -> dict[str, Any]:
    """The JSON form."""
    return {
        "settings": dict(settings),
        "points": [
            {**vars(point), "frechet": to_json(point.frechet), "magnitude": to_json(point.magnitude)}
            for point in points
        ],
    }


def read_points(path: Path, settings: Mapping[str, Any]) -> list[Point]:
    """The points that a file of ``report`` holds; none where there is no file.

    Raises:
        ValueError: the file holds something else, or points of other settings.
    """
    return read_entries(
        path,
        "points",
        settings,
        lambda content: [
            Point(**{**one, **{name: from_json(one[name]) for name in ("frechet", "magnitude")}})
            for one in content["points"]
        ],
    )
