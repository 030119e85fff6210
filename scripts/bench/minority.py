"""Guidance towards rare digits: how rare they become among real ones, and whether they stay the digits asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fewstep.guidance import Guidance, MinorityClassifier, MinorityGuidance, SelfMinorityGuidance
from fewstep.metrics import (
    DigitsClassifier,
    Estimate,
    average_knn_distance,
    jackknife,
    local_outlier_factor,
    rarity_score,
)
from fewstep.samplers import SAMPLERS, PlanScheduler

from ..plots import save_figure
from ..training.data import LabelledImages
from ..tuning.task import Inputs, ends
from .estimates import from_json, to_json
from .output import read_entries, table
from .tuned import Digits

METHODS = ("minority", "self-minority")
"""By the bundled classifier, and by the model alone."""

REAL = "real"
"""Stands for real digits where a method is named."""

TOLERANCE = 0.01
"""Loss of agreement that counts as none."""

REFERENCE = 5000
"""Real images among which others are rare: distances between all of them are taken."""

_SECOND_LEVEL = 800
_SEEDS = 50_000
_CHUNK = 500


@dataclass(frozen=True)
class Measure:
    """A figure of a set of images, the mean over them.

    Attributes:
        title: in the table and the picture.
        digits: behind the decimal point.
    """

    title: str
    digits: int


RARITY = {
    "knn": Measure("kNN distance", 3),
    "lof": Measure("outlier factor", 3),
    "rarity": Measure("rarity score", 3),
}
"""Larger is rarer; ``knn`` is the average distance to the five nearest real images."""

MEASURES = {**RARITY, "outside": Measure("outside", 3), "agreement": Measure("agreement", 3)}
"""Also the share of images outside of all balls around real ones, which have no rarity score, and of those that the
bundled classifier takes for the digit asked for."""


@dataclass(frozen=True)
class Point:
    """The images of one method at one scale.

    Attributes:
        method: one of ``METHODS``, or ``real``.
        guidance_scale: classifier-free; 1 is none.
        scale: of the method; 0 is the model without it, for all methods the same.
        figures: by the keys of ``MEASURES``.
    """

    method: str
    guidance_scale: float
    scale: float
    figures: Mapping[str, Estimate]


def real_features(data: LabelledImages, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bundled classifier's features ``(count, 64)`` of real digits drawn at random, and their labels."""
    classifier = DigitsClassifier.bundled()
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
    with torch.no_grad():
        features = torch.cat([classifier.features(data.float_images(part)) for part in chosen.split(_CHUNK)])
    return features, data.labels[chosen]


class Bench:
    """A model of digits, and what is common.

    Args:
        model: a bundled name.
        sampler: name.
        steps: sampling steps.
        count: images a point, the ten classes in turn.
        target: class or classes of the minority classifier.
        reference: features ``(N, 64)`` of the images among which others are rare.
    """

    def __init__(
        self, model: str, sampler: str, steps: int, count: int, target: Sequence[int], reference: torch.Tensor
    ) -> None:
        self.model, self.sampler, self.steps, self.count = model, sampler, steps, count
        self._target, self._reference = list(target), reference
        self._minority = MinorityClassifier.bundled()
        self._classifier = DigitsClassifier.bundled().requires_grad_(False)

    def measure(self, method: str, guidance_scale: float, scale: float) -> Point:
        """Makes and measures the images of one point, from the same noises for all.

        Args:
            method: one of ``METHODS``.
            guidance_scale: classifier-free; 1 is none.
            scale: of the method.
        """
        features = self.features(method, guidance_scale, scale)
        return Point(method, guidance_scale, scale, self.figures(features, torch.arange(self.count) % 10))

    def features(self, method: str, guidance_scale: float, scale: float) -> torch.Tensor:
        """The classifier's features of images of 8 bits, ``(count, 64)``; arguments as of ``measure``."""
        digits = Digits(self.model, guidance_scale)
        scheduler: PlanScheduler = SAMPLERS[self.sampler].build(digits.config)
        found, seed = [], _SEEDS
        inputs = digits.inputs(range(_SEEDS, _SEEDS + self.count))
        title = f"{method} {scale:g}, guidance {guidance_scale:g}"
        for one in tqdm(inputs, desc=title, unit="batch", leave=False):
            scheduler.manual_seed(list(range(seed, seed + len(one.noise))))
            scheduler.guide(self._guidance(method, scale, one, scheduler, seed) if scale else None)
            found.append(digits.features(ends(scheduler, one, self.steps)))
            seed += len(one.noise)
        return torch.cat(found)

    def figures(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, Estimate]:
        """Figures of images with features ``(count, 64)`` that should be digits ``(count,)``."""
        rarity = rarity_score(self._reference, features)
        values = {
            "knn": average_knn_distance(self._reference, features),
            "lof": local_outlier_factor(self._reference, features),
            "rarity": rarity,
            "outside": rarity.isnan().double(),
            "agreement": (self._classifier.classify(features).argmax(1) == labels).double(),
        }
        return {name: jackknife(partial(_mean, v), len(v)) for name, v in values.items()}

    def _guidance(self, method: str, scale: float, one: Inputs, scheduler: PlanScheduler, seed: int) -> Guidance:
        if method == "minority":
            return MinorityGuidance(self._minority, self._target, scale)
        return SelfMinorityGuidance(one.network, scheduler, scale=scale, timestep=_SECOND_LEVEL, seeds=seed)


def _mean(values: torch.Tensor, chosen: torch.Tensor) -> float:
    """Of those that have one."""
    return float(values[chosen].nanmean())


# ---------------------------------------------------------------- what follows


def base_of(points: Sequence[Point], point: Point) -> Point | None:
    """The point without the method, of the same noises; none where it was not measured."""
    same = (one for one in points if one.method != REAL and one.guidance_scale == point.guidance_scale)
    return next((one for one in same if one.scale == 0.0), None)


def rises(point: Point, base: Point) -> bool:
    """Whether the 95 % intervals of the paired changes of all three measures of rarity are above 0."""
    return all((point.figures[name] - base.figures[name]).interval()[0] > 0.0 for name in RARITY)


def agrees(point: Point, base: Point) -> bool:
    """Whether agreement holds: the interval of its change has 0, or the loss is below ``TOLERANCE``."""
    loss = base.figures["agreement"] - point.figures["agreement"]
    return loss.value < max(TOLERANCE, loss.half_width())


def minority_table(points: Sequence[Point]) -> str:
    """A line a point, with 95 % intervals, and the changes against scale 0 on the same noises."""
    rows = []
    for point in _ordered(points):
        base = None if point.method == REAL or point.scale == 0.0 else base_of(points, point)
        if point.method == REAL:
            row = [REAL, "", ""]
        else:
            row = [point.method if point.scale else "none", f"{point.guidance_scale:g}", f"{point.scale:g}"]
        for name, measure in MEASURES.items():
            figure = point.figures[name]
            row.append(_cell(figure, f".{measure.digits}f") if base is None else f"{figure.value:.{measure.digits}f}")
            if name != "outside":
                moved = "" if base is None else _cell(figure - base.figures[name], f"+.{measure.digits}f")
                row.append(moved)
        row.append("" if base is None else _words(rises(point, base), agrees(point, base)))
        rows.append(row)
    header = ["steered by", "guidance", "scale"]
    for name, measure in MEASURES.items():
        header += [measure.title] if name == "outside" else [measure.title, "change (95 %)"]
    return table([*header, ""], rows)


def _words(rarer: bool, same: bool) -> str:
    return f"{'rarer' if rarer else 'no rarer'}, {'agrees' if same else 'agrees less'}"


def _cell(figure: Estimate, form: str) -> str:
    return f"{figure.value:{form}} +- {figure.half_width():{form.lstrip('+')}}"


def _ordered(points: Sequence[Point]) -> list[Point]:
    """Real digits, then a block a guidance scale: without a method, then each method by its scales."""
    methods = (REAL, *METHODS)
    return sorted(
        points, key=lambda p: (p.method != REAL, p.guidance_scale, p.scale > 0.0, methods.index(p.method), p.scale)
    )


def report(settings: Mapping[str, Any], points: Sequence[Point]) -> dict[str, Any]:
    """The JSON form, from which a table goes on."""
    return {"settings": dict(settings), "points": [_entry(point) for point in _ordered(points)]}


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
            Point(
                one["method"], one["guidance_scale"], one["scale"], {k: from_json(one["figures"][k]) for k in MEASURES}
            )
            for one in content["points"]
        ],
    )


def _entry(point: Point) -> dict[str, Any]:
    figures = {name: to_json(figure) for name, figure in point.figures.items()}
    return {"method": point.method, "guidance_scale": point.guidance_scale, "scale": point.scale, "figures": figures}


def plot_minority(settings: Mapping[str, Any], points: Sequence[Point], path: Path) -> None:
    """Draws the measures over the scale, a row a method; the dotted line is of real digits.

    Args:
        settings: for the title.
        points: of the table.
        path: of the picture, ending in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    methods = [name for name in METHODS if any(one.method == name and one.scale for one in points)]
    shown = [name for name in MEASURES if name != "outside"]
    figure = Figure(figsize=(13.0, 3.1 * max(1, len(methods)) + 0.4), layout="constrained")
    panels = figure.subplots(max(1, len(methods)), len(shown), squeeze=False)
    real = next((one for one in points if one.method == REAL), None)
    for row, method in zip(panels, methods, strict=False):
        for panel, name in zip(row, shown, strict=True):
            for weight in sorted({one.guidance_scale for one in points if one.method != REAL}):
                own = [one for one in _ordered(points) if one.method != REAL and one.guidance_scale == weight]
                line = [one for one in own if one.method == method or one.scale == 0.0]
                panel.errorbar(
                    [one.scale for one in line],
                    [one.figures[name].value for one in line],
                    yerr=[one.figures[name].half_width() for one in line],
                    label="no guidance" if weight == 1.0 else f"guidance {weight:g}",
                    marker="o",
                    capsize=3,
                )
            if real is not None:
                panel.axhline(real.figures[name].value, color="grey", linestyle=":", label="real digits")
            panel.set(title=f"{method}: {MEASURES[name].title}", xlabel="scale", ylim=_limits(name))
            panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"{settings['model']}: {settings['sampler']}, {settings['steps']} steps, {settings['count']} images (95 %)"
    )
    save_figure(figure, path)


def _limits(name: str) -> tuple[float | None, float | None]:
    return (None, 1.005) if name == "agreement" else (None, None)
