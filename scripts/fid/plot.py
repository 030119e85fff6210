"""The picture of an evaluation: distance over network calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import save_figure

# Colours that stay apart with any colour vision (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"
_LABELS = {"fid": "Frechet distance", "is": "inception score", "kid": "kernel distance"}


def plot_results(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the first figure over the network calls: a panel a guidance scale, a line a sampler.

    Args:
        rows: the figures of the cells; those without the first one's first figure are left out.
        path: of the picture, ending in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    name = next(iter(rows[0]["figures"]))
    rows = [row for row in rows if name in row["figures"]]
    scales = sorted({row["guidance_scale"] for row in rows}, key=lambda scale: -1.0 if scale is None else scale)
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    figure = Figure(figsize=(max(5.2 * len(scales), 5.2), 4.6), layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False, sharey=True)[0]
    for panel, scale in zip(panels, scales, strict=True):
        for number, sampler in enumerate(samplers):
            cells = [row for row in rows if (row["sampler"], row["guidance_scale"]) == (sampler, scale)]
            cells.sort(key=lambda row: row["calls"])
            figures = [row["figures"][name] for row in cells]
            aside = 1.0 + 0.015 * (number - (len(samplers) - 1) / 2.0)  # else bars of equal calls hide each other
            panel.errorbar(
                [aside * row["calls"] for row in cells],
                [f["value"] for f in figures],
                yerr=[[f["value"] - f["low"] for f in figures], [f["high"] - f["value"] for f in figures]],
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                capsize=3,
                label=Path(sampler).name,
            )
        ticks = sorted({row["calls"] for row in rows})
        panel.set(xscale="log", xlabel="network calls", title="" if scale is None else f"guidance {scale:g}")
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{_LABELS.get(name, name)} (95 %)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)
