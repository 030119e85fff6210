"""The figures of an evaluation as rows, table and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.metrics import Estimate, FeatureExtractor, ReferenceStatistics

from ..bench.output import table
from .settings import EvaluatedCell

CONFIDENCE = 0.95
_HEADINGS = {"fid": "Frechet", "is": "inception score", "kid": "KID x 1000", "fid_infinity": "Frechet, infinity"}
_SCALES = {"kid": 1000.0}
_DIGITS = {"fid": 3, "is": 3, "kid": 3, "fid_infinity": 3}


def figures_of(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Value of each figure, bounds of its confidence interval, and half of that uncut, ready for JSON."""
    figures = {}
    for name, estimate in estimates.items():
        low, high = estimate.interval(CONFIDENCE)
        figures[name] = {"value": estimate.value, "low": low, "high": high, "half": estimate.half_width(CONFIDENCE)}
    return figures


def cell_row(
    cell: EvaluatedCell, calls: int, estimates: Mapping[str, Estimate], remarks: Sequence[str]
) -> dict[str, Any]:
    """The figures of a cell and what they are of, ready for JSON.

    Args:
        cell: that was measured.
        calls: of the network, for an image; a guided call counts once.
        estimates: of the figures.
        remarks: what should be said beside them.
    """
    settings = cell.settings
    return {
        "sampler": cell.cell.sampler,
        "steps": cell.cell.steps,
        "calls": calls,
        "guidance_scale": cell.guidance_scale,
        "number": settings.number,
        "seeds": [settings.seed_of(0), settings.seed_of(settings.number - 1)],
        "figures": figures_of(estimates),
        "remarks": list(remarks),
        "scheduler": cell.config,
    }


def reference_row(
    source: Mapping[str, Any], reference: ReferenceStatistics, extractor: FeatureExtractor
) -> dict[str, Any]:
    """What the figures are held against, and how sure their intervals are, ready for JSON."""
    return {
        "source": source,
        "fingerprint": reference.fingerprint,
        "data": reference.data,
        "count": reference.count,
        "features": extractor.name,
        "extractor": reference.extractor,
        "preprocessing": reference.preprocessing,
        "confidence": CONFIDENCE,
    }


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as text, a line a cell, with half of the confidence interval behind each."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    guided = any(row["guidance_scale"] is not None for row in rows)
    header = ["sampler", "steps", "calls", *(["guidance"] if guided else []), "images"]
    header += [f"{heading(name)} ({CONFIDENCE:.0%})" for name in names]
    lines = []
    for row in rows:
        scale = row["guidance_scale"]
        line = [Path(row["sampler"]).name, str(row["steps"]), str(row["calls"])]
        line += ["" if scale is None else f"{scale:g}"] if guided else []
        line += [str(row["number"]), *(figure_text(name, row["figures"].get(name)) for name in names)]
        lines.append(line)
    return table(header, lines)


def heading(name: str) -> str:
    """Of a figure's column."""
    return _HEADINGS.get(name, name)


def figure_text(name: str, figure: Mapping[str, float] | None) -> str:
    """A figure and half of its interval, which no bound of the figure cuts; empty where there is none."""
    if figure is None:
        return ""
    scale, digits = _SCALES.get(name, 1.0), _DIGITS.get(name, 4)
    half = figure.get("half", (figure["high"] - figure["low"]) / 2.0)
    return f"{scale * figure['value']:.{digits}f} +- {scale * half:.{digits}f}"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as CSV: a row a cell, and of each figure the value and the bounds of its interval."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["sampler", "steps", "calls", "guidance_scale", "number", "first_seed"]
    writer.writerow([*header, *(column for name in names for column in (name, f"{name}_low", f"{name}_high"))])
    for row in rows:
        figures = [row["figures"].get(name, {}) for name in names]
        values = [figure.get(key, "") for figure in figures for key in ("value", "low", "high")]
        scale = row["guidance_scale"]
        ours = [row["sampler"], row["steps"], row["calls"], "" if scale is None else scale, row["number"]]
        writer.writerow([*ours, row["seeds"][0], *values])
    return text.getvalue()
