"""A plan: what a sampler does between network calls, as a table of float64 coefficients.

A *call* is one evaluation of the network. After it, rows combine the retained tensors linearly:

    prediction = p * sample + q * model_output
    slot       = sum of coefficient * slot,      slots: sample, prediction, noise, kept0, kept1, ...

The row that writes ``sample`` is the next input of the network (after the last call: the result).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .weights import Measure

SAMPLE, PREDICTION, NOISE = "sample", "prediction", "noise"
_FORMAT = "fewstep.plan"
_VERSION = 1


@dataclass(frozen=True)
class Row:
    """``out = sum(coefficient * slot)``."""

    out: str
    terms: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Call:
    """One evaluation of the network and what follows it.

    Attributes:
        timestep: label for the network.
        level: noise level in diffusers' ``sigmas`` units.
        alpha: signal coefficient there.
        sigma: noise coefficient there.
        in_scale: factor on the network's input.
        measure: whether ``prediction`` is the clean sample (``"data"``) or the noise.
        prediction: ``(p, q)`` that makes the prediction of sample and model output.
        clean: ``(p, q)`` that makes the predicted clean sample.
        keep_sample: slot that keeps this call's sample, or ``None``.
        keep_prediction: slot that keeps this call's prediction, or ``None``.
        rows: executed in order; the last one writes ``sample``.
        drop: slots that nobody reads after this call.
    """

    timestep: float
    level: float
    alpha: float
    sigma: float
    in_scale: float
    measure: Measure
    prediction: tuple[float, float]
    clean: tuple[float, float]
    keep_sample: str | None
    keep_prediction: str | None
    rows: tuple[Row, ...]
    drop: tuple[str, ...]

    @property
    def is_stochastic(self) -> bool:
        """Whether a row reads fresh noise."""
        return any(slot == NOISE for row in self.rows for slot, _ in row.terms)


@dataclass(frozen=True)
class Plan:
    """A compiled sampler: ``len(plan)`` network calls.

    Attributes:
        name: what made it, for people.
        calls: in order of execution.
        final_level: noise level of the result.
        final_alpha: signal coefficient of the result.
        final_sigma: noise coefficient of the result.
    """

    name: str
    calls: tuple[Call, ...]
    final_level: float
    final_alpha: float
    final_sigma: float

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    @property
    def is_stochastic(self) -> bool:
        """Whether any call reads fresh noise."""
        return any(call.is_stochastic for call in self.calls)

    @property
    def slots(self) -> int:
        """Number of tensors kept between calls, at most."""
        names = {name for call in self.calls for name in (call.keep_sample, call.keep_prediction) if name}
        names |= {row.out for call in self.calls for row in call.rows if row.out != SAMPLE}
        return len(names)

    @property
    def amplification(self) -> float:
        """Largest sum of absolute prediction weights in a row: how far errors of the network are multiplied."""
        sums = [
            sum(abs(c) for slot, c in row.terms if slot not in (SAMPLE, NOISE))
            for call in self.calls
            for row in call.rows
        ]
        return max(sums, default=0.0)

    def __str__(self) -> str:
        head = f"{self.name}: {len(self)} calls, {self.slots} kept tensors, ends at sigma {self.final_sigma:.6g}"
        lines = [head, f"{'call':>4} {'timestep':>9} {'alpha':>9} {'sigma':>9}  rows"]
        for k, call in enumerate(self.calls):
            lead = f"{k:>4} {call.timestep:>9.6g} {call.alpha:>9.6f} {call.sigma:>9.6f}"
            p, q = call.prediction
            lines.append(f"{lead}  {PREDICTION} ({call.measure}) = {p:+.6f} sample {q:+.6f} output")
            for slot, source in ((call.keep_sample, SAMPLE), (call.keep_prediction, PREDICTION)):
                if slot:
                    lines.append(f"{'':>34}  {slot} = {source}")
            lines.extend(
                f"{'':>34}  {row.out} = " + " ".join(f"{c:+.6f} {slot}" for slot, c in row.terms) for row in call.rows
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; Python's float representation makes it exact."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: another format or version, or missing fields.
        """
        if data.get("format") != _FORMAT or data.get("version") != _VERSION:
            found = f"format {data.get('format')!r}, version {data.get('version')!r}"
            raise ValueError(f"this is no plan of version {_VERSION} ({found})")
        try:
            calls = []
            for entry in data["calls"]:
                rows = tuple(Row(r["out"], tuple((s, float(c)) for s, c in r["terms"])) for r in entry["rows"])
                pairs = {key: tuple(map(float, entry[key])) for key in ("prediction", "clean")}
                calls.append(Call(**{**entry, **pairs, "rows": rows, "drop": tuple(entry["drop"])}))
            return cls(data["name"], tuple(calls), data["final_level"], data["final_alpha"], data["final_sigma"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the plan is damaged: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, atomically."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan that ``save`` wrote, bit-exactly.

        Raises:
            ValueError: the file holds no plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        return cls.from_dict(data)
