"""What a claim is, and how measurements decide on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from fewstep.metrics import Estimate

from ..generation.pictures import image_grid

HOLDS, IN_PART, NOT_HERE = "holds", "holds in part", "not here"
VERDICTS = (NOT_HERE, IN_PART, HOLDS)
"""From worst to best."""

Rule = Literal["at most", "at least", "no more than"]


@dataclass(frozen=True)
class Finding:
    """One measured number of a claim.

    Attributes:
        setting: model, guidance and calls, for people.
        value: the number, mostly a relative change in percent; less than 0 is better with ``at most``.
        low: 95 % interval.
        high: 95 % interval.
        bound: what the claim says.
        rule: ``at most`` and ``at least`` are kept where the whole interval keeps the bound; ``no more than`` where
            the interval does not exclude it: no loss shows.
        unit: of the number.
    """

    setting: str
    value: float
    low: float
    high: float
    bound: float = 0.0
    rule: Rule = "at most"
    unit: str = "%"

    @property
    def verdict(self) -> str:
        """Of this number alone; a significant effect that misses its bound is one in part."""
        if self.rule == "no more than":
            return HOLDS if self.low <= self.bound else NOT_HERE
        sign = 1.0 if self.rule == "at most" else -1.0
        worst, bound = max(sign * self.low, sign * self.high), sign * self.bound
        if worst <= bound:
            return HOLDS
        return IN_PART if worst < 0.0 else NOT_HERE


@dataclass(frozen=True)
class Measurement:
    """What was measured for a claim.

    Attributes:
        findings: at least one.
        pictures: captions and images for the HTML page.
    """

    findings: Sequence[Finding]
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Holds where all numbers do, not here where none does."""
        found = {finding.verdict for finding in self.findings}
        return found.pop() if len(found) == 1 else IN_PART


@dataclass(frozen=True)
class Scale:
    """How much is measured, and where work is kept.

    Attributes:
        quick: few noises and the small model; else the figures that the README states.
        folder: of fitted samplers.
        data: an ``.npz`` of MNIST, for claims that need real images; ``None`` where there is none.
    """

    quick: bool
    folder: Path
    data: Path | None = None

    @property
    def model(self) -> str:
        """The bundled model of digits that is measured."""
        return "digits-small" if self.quick else "digits-large"

    @property
    def noises(self) -> int:
        """Held-out noises of errors."""
        return 40 if self.quick else 200

    @property
    def images(self) -> int:
        """Images of a Frechet distance."""
        return 200 if self.quick else 2000


@dataclass(frozen=True)
class Claim:
    """Something that a paper says.

    Attributes:
        key: short name.
        paper: arXiv id; empty for a claim of ours.
        method: its name.
        says: the claim, as it is measured here.
        command: one that measures it at length.
        measure: does so.
        why: of verdicts other than ``holds``: the reason, as far as it is known.
    """

    key: str
    paper: str
    method: str
    says: str
    command: str
    measure: Callable[[Scale], Measurement]
    why: str = ""


def percent(old: Estimate, new: Estimate) -> tuple[float, float, float]:
    """Relative change of a figure in percent, with its 95 % interval from pairs of left-out groups."""
    value = 100.0 * (new.value / old.value - 1.0)
    pairs = zip(old.left_out, new.left_out, strict=True)
    return value, *Estimate(value, tuple(100.0 * (b / a - 1.0) for a, b in pairs)).interval()


def digit_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """Grey images ``(B, 1, H, W)`` in [0, 1] side by side."""
    pixels = images.mul(255.0).round().to(torch.uint8).cpu().numpy()
    return image_grid([Image.fromarray(one[0]) for one in pixels], columns)
