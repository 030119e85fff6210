"""The report of a replication: Markdown, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..bench.output import environment
from .claims import HOLDS, IN_PART, NOT_HERE, Finding
from .run import Outcome

_COLOURS = {HOLDS: "#009E73", IN_PART: "#E69F00", NOT_HERE: "#D55E00"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { background: #f4f4f4; padding: 0 .25rem; } img { max-width: 100%; } h2 { margin-top: 2.5rem; }
"""


def _sentence(quick: bool) -> str:
    size = "at few noises and on the small model: a smoke test, not a measurement" if quick else "in full"
    return (
        f"Measured {size}. A claim holds where the 95 % intervals of all its numbers keep what it says, and holds in "
        "part where those of some do, or where an effect is significant and less than claimed."
    )


def _machine() -> str:
    here = environment()
    return (
        f"{here['processor'] or here['machine']}, {here['torch_threads']} thread(s), {here['system']}, "
        f"Python {here['python']}, torch {here['torch']}, diffusers {here['diffusers']}, fewstep {here['fewstep']}"
    )


def number(finding: Finding) -> str:
    """Value and interval, as in ``-19.5 % (-21.1 to -18.0)``."""
    unit = f" {finding.unit}" if finding.unit else ""
    digits = 1 if finding.unit == "%" else 3
    return f"{finding.value:+.{digits}f}{unit} ({finding.low:+.{digits}f} to {finding.high:+.{digits}f})"


def needed(finding: Finding) -> str:
    """What the claim says of the number."""
    unit = f" {finding.unit}" if finding.unit else ""
    if finding.rule == "no more than":
        return f"{finding.bound:g}{unit} not excluded"
    return f"{finding.rule} {finding.bound:g}{unit}"


def markdown(outcomes: Sequence[Outcome], *, quick: bool) -> str:
    """A summary, then every number."""
    lines = ["# Replication", "", _sentence(quick), "", _machine() + ".", ""]
    lines += ["| Method | Paper | Claim | Verdict | Minutes |", "| --- | --- | --- | --- | ---: |"]
    for one in outcomes:
        row = (one.claim.method, _link(one), one.claim.says, f"**{one.measurement.verdict}**", f"{one.minutes:.1f}")
        lines.append(f"| {' | '.join(row)} |")
    for one in outcomes:
        lines += ["", f"## {one.claim.method}: {one.measurement.verdict}", "", one.claim.says]
        if _why(one):
            lines += ["", _why(one)]
        lines += ["", "| Setting | Measured (95 %) | Claimed | |", "| --- | ---: | --- | --- |"]
        for finding in one.measurement.findings:
            lines.append(f"| {finding.setting} | {number(finding)} | {needed(finding)} | {finding.verdict} |")
        lines += ["", f"`fewstep replicate --claims {one.claim.key}`; at length: `{one.claim.command}`"]
    return "\n".join(lines) + "\n"


def page(outcomes: Sequence[Outcome], *, quick: bool) -> str:
    """The same with plots and pictures, all inside the page."""
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>fewstep: replication</title>",
        f"<style>{_STYLE}</style></head><body><h1>Replication</h1><p>{_sentence(quick)}</p>",
        f"<p>{html.escape(_machine())}.</p>",
        "<table><tr><th>Method</th><th>Claim</th><th>Verdict</th><th>Minutes</th></tr>",
    ]
    for one in outcomes:
        method = f"<a href='#{one.claim.key}'>{html.escape(one.claim.method)}</a>"
        cells = (method, html.escape(one.claim.says), _badge(one.measurement.verdict))
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        parts.append(f"<tr>{row}<td class='number'>{one.minutes:.1f}</td></tr>")
    parts.append("</table>")
    parts += [_section(one) for one in outcomes]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def report(outcomes: Sequence[Outcome], *, quick: bool) -> dict[str, Any]:
    """The JSON form, without pictures."""
    entries: dict[str, Mapping[str, Any]] = {}
    for one in outcomes:
        entries[one.claim.key] = {
            "paper": one.claim.paper,
            "says": one.claim.says,
            "verdict": one.measurement.verdict,
            "findings": [{**vars(finding), "verdict": finding.verdict} for finding in one.measurement.findings],
            "minutes": one.minutes,
        }
    return {"quick": quick, "environment": environment(), "claims": entries}


def _section(one: Outcome) -> str:
    claim, measurement = one.claim, one.measurement
    rows = "".join(
        f"<tr><td>{html.escape(finding.setting)}</td><td class='number'>{number(finding)}</td>"
        f"<td>{needed(finding)}</td><td>{_badge(finding.verdict)}</td></tr>"
        for finding in measurement.findings
    )
    source = f" (<a href='https://arxiv.org/abs/{claim.paper}'>arXiv {claim.paper}</a>)" if claim.paper else ""
    pictures = "".join(
        f"<figure><img src='data:image/png;base64,{data}' alt='{html.escape(title)}'>"
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, data in one.pictures.items()
    )
    return (
        f"<h2 id='{claim.key}'>{html.escape(claim.method)} {_badge(measurement.verdict)}</h2>"
        f"<p>{html.escape(claim.says)}{source}</p><p>{html.escape(_why(one))}</p>"
        "<table><tr><th>Setting</th><th>Measured (95 %)</th><th>Claimed</th><th></th></tr>"
        f"{rows}</table><img src='data:image/png;base64,{_plot(measurement.findings)}' alt='The numbers above'>"
        f"{pictures}<p><code>fewstep replicate --claims {claim.key}</code>; at length: "
        f"<code>{html.escape(claim.command)}</code></p>"
    )


def _badge(verdict: str) -> str:
    return f"<strong style='color: {_COLOURS[verdict]}'>{verdict}</strong>"


def _link(one: Outcome) -> str:
    paper = one.claim.paper
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "ours"


def _why(one: Outcome) -> str:
    return "" if one.measurement.verdict == HOLDS else one.claim.why


def _plot(findings: Sequence[Finding]) -> str:
    """Numbers with their intervals and what is claimed, a panel a unit; PNG in base 64."""
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(finding.unit for finding in findings))
    height = 0.9 * len(units) + 0.3 * len(findings)
    figure = Figure(figsize=(8.0, height), layout="constrained")
    counts = [sum(finding.unit == unit for finding in findings) for unit in units]
    panels = figure.subplots(len(units), 1, squeeze=False, gridspec_kw={"height_ratios": counts})[:, 0]
    names = {id(finding): k + 1 for k, finding in enumerate(findings)}
    for panel, unit in zip(panels, units, strict=True):
        chosen = [finding for finding in findings if finding.unit == unit]
        for row, finding in enumerate(chosen):
            colour = _COLOURS[finding.verdict]
            panel.plot([finding.low, finding.high], [row, row], color=colour, linewidth=3, alpha=0.5)
            panel.plot(finding.value, row, "o", color=colour)
            panel.plot([finding.bound] * 2, [row - 0.4, row + 0.4], color="black", linestyle=":", linewidth=1)
        panel.set_yticks(range(len(chosen)), [f"row {names[id(finding)]}" for finding in chosen])
        panel.set_ylim(len(chosen) - 0.5, -0.5)
        panel.axvline(0.0, color="grey", linewidth=0.8)
        panel.set_xlabel("change in percent; dots: what is claimed" if unit == "%" else "difference; dots: claimed")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return base64.b64encode(data.getvalue()).decode()
