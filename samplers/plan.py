"""A plan: what a sampler does between network calls, as a table of float64 coefficients.

A *call* is one evaluation of the network. After it, rows combine the retained tensors linearly:

    prediction = p * sample + q * model_output
    slot       = sum of coefficient * slot,      slots: sample, prediction, noise, kept0, kept1, ...

The row that writes ``sample`` is the next input of the network (after the last call: the result).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .files import replaced
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
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: another format or version, missing or wrong fields, or rows that read what no row wrote.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
            found = (
                f"format {data.get('format')!r}, version {data.get('version')!r}" if isinstance(data, Mapping) else data
            )
            raise ValueError(f"this is no plan of version {_VERSION} ({found!s:.80})")
        try:
            calls = tuple(_call(entry) for entry in data["calls"])
            ends = (_number(data[key], key) for key in ("final_level", "final_alpha", "final_sigma"))
            plan = cls(str(data["name"]), calls, *ends)
            _check(plan)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"the plan is damaged: {reason}; save it again") from None
        return plan

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, atomically."""
        with replaced(Path(path)) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan that ``save`` wrote, bit-exactly.

        Raises:
            ValueError: the file holds no plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a finite number")
    return float(value)


def _pair(entry: Mapping[str, Any], name: str) -> tuple[float, float]:
    values = entry[name]
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise ValueError(f"{name} is {values!r}, not a pair of numbers")
    return _number(values[0], name), _number(values[1], name)


def _call(entry: Mapping[str, Any]) -> Call:
    unknown = sorted(set(entry) - {field.name for field in fields(Call)})
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)} of a call")
    if entry["measure"] not in ("data", "noise"):
        raise ValueError(f"measure is {entry['measure']!r}, not 'data' or 'noise'")
    rows = []
    for row in entry["rows"]:
        terms = tuple((str(slot), _number(c, f"the coefficient of {slot}")) for slot, c in row["terms"])
        rows.append(Row(str(row["out"]), terms))
    numbers = {key: _number(entry[key], key) for key in ("timestep", "level", "alpha", "sigma", "in_scale")}
    return Call(
        **numbers,
        measure=entry["measure"],
        prediction=_pair(entry, "prediction"),
        clean=_pair(entry, "clean"),
        keep_sample=entry["keep_sample"],
        keep_prediction=entry["keep_prediction"],
        rows=tuple(rows),
        drop=tuple(entry["drop"]),
    )


def _check(plan: Plan) -> None:
    """Follows the slots through the run: each must be written before it is read."""
    if not plan.calls:
        raise ValueError("it has no calls")
    kept: set[str] = set()
    for k, call in enumerate(plan):
        for row in call.rows:
            missing = [slot for slot, _ in row.terms if slot not in kept and slot not in (SAMPLE, PREDICTION, NOISE)]
            if missing or not row.terms:
                raise ValueError(
                    f"call {k} makes {row.out} of {missing[0] if missing else 'nothing'}, which is not there"
                )
            if row.out in (PREDICTION, NOISE):
                raise ValueError(f"call {k} overwrites {row.out}")
            kept |= {row.out} - {SAMPLE}
        if [row.out for row in call.rows].count(SAMPLE) != 1:
            raise ValueError(f"call {k} must write sample exactly once")
        kept |= {slot for slot in (call.keep_sample, call.keep_prediction) if slot is not None}
        kept -= set(call.drop)
