"""The decisions of a unified sampling framework, USF (arXiv 2312.07243): a solver that differs from step to step.

Every step chooses its target time, data or noise prediction, the node it starts from, the order of its Taylor
expansion, the nodes that estimate each derivative, a relaxation of the first derivative, and a corrector.
``rows.py`` writes such a schedule as rows, ``known.py`` has the known solvers as points of the space, and
``evolution.py`` searches it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ..grid import Grid
from ..json_fields import fields_of, integer, numbers
from ..schedule import NoiseSchedule
from ..weights import Measure

RELAXATIONS = ("none", "dpmsolver-2", "unipc-bh1", "unipc-bh2", "0.5exp", "-0.5exp", "linear")
"""Factors ``1 + O(h)`` on the first derivative; ``linear`` is ``1 + coefficient * h``."""

KINDS = ("vp", "flow", "edm")
MAX_ORDER = 4
CLOSEST = 1e-3
"""Nodes of one estimate are at least so far apart in half log-SNR."""

_FORMAT, _VERSION = "fewstep.usf", 1


@dataclass(frozen=True)
class Derivative:
    """How a derivative of the prediction at the start point is estimated.

    Attributes:
        active_points: nodes whose predictions are expanded around the start point, counted from the newest, which is
            -1; as many as the order of the estimate.
        relaxation: one of ``RELAXATIONS``; of the first derivative only.
        coefficient: of the ``linear`` relaxation.
    """

    active_points: tuple[int, ...]
    relaxation: str = "none"
    coefficient: float = 0.0


@dataclass(frozen=True)
class Correction:
    """A step that is taken once more with the prediction at its end, which becomes node -1.

    Attributes:
        start: start point, -2 or older: -2 is the node that was the newest before.
        derivatives: as in ``SolverStep``, counted with the new node.
        implicit: the network is called once more, at the corrected sample (the paper's implicit corrector); without
            it the prediction at the uncorrected sample is kept (the pseudo corrector, UniC).
    """

    start: int = -2
    derivatives: tuple[Derivative, ...] = ()
    implicit: bool = False


@dataclass(frozen=True)
class SolverStep:
    """The decisions of one step.

    Attributes:
        measure: ``data`` or ``noise`` prediction.
        start: node that the step starts from, -1 for the newest.
        derivatives: estimates of the first, second and third derivative; the Taylor order is one more than their
            number.
        correction: of its result, or ``None``.
    """

    measure: Measure = "data"
    start: int = -1
    derivatives: tuple[Derivative, ...] = ()
    correction: Correction | None = None

    @property
    def order(self) -> int:
        """The Taylor order, 1 to 4."""
        return 1 + len(self.derivatives)

    def own_correction(self, *, implicit: bool = False) -> Correction:
        """The correction that the paper gives this step: its order and estimates one higher, no relaxation."""
        points = [(*(p - 1 for p in derivative.active_points), -1) for derivative in self.derivatives]
        points.append(points[-1] if points else (-1,))
        return Correction(self.start - 1, tuple(Derivative(p) for p in points), implicit)


def newest(order: int, relaxation: str = "none", coefficient: float = 0.0) -> tuple[Derivative, ...]:
    """Estimates of full order from the ``order`` newest nodes, for a step that starts at the newest.

    Args:
        order: Taylor order, 1 to 4.
        relaxation: of the first derivative.
        coefficient: of its ``linear`` relaxation.
    """
    points = tuple(range(-2, -order - 1, -1))
    relaxed = (relaxation, coefficient)
    return tuple(Derivative(points, *(relaxed if j == 0 else ("none", 0.0))) for j in range(order - 1))


@dataclass(frozen=True)
class SolverSchedule:
    """A whole run: times and decisions.

    Attributes:
        kind: of the noise schedule that the levels belong to: ``vp``, ``flow`` or ``edm``.
        levels: N + 1 decreasing noise levels in diffusers' ``sigmas`` units, the last one where the run ends.
        steps: N decisions. A step that starts at ``alpha = 0`` or ends at ``sigma = 0`` is of first order, whatever it
            says: in half log-SNR it is infinitely long.
        timesteps: N labels for the network; ``None`` takes those of the levels.
        afs: the analytic first step: ``zero_x0`` takes 0 for the clean sample at the first node and saves its network
            call; ``none``.

    Raises:
        ValueError: decisions that contradict each other, naming field, step and value.
    """

    kind: str
    levels: tuple[float, ...]
    steps: tuple[SolverStep, ...]
    timesteps: tuple[float, ...] | None = None
    afs: str = "none"

    def __post_init__(self) -> None:
        self._check_times()
        if self.afs == "average_x0":
            raise ValueError(
                "afs 'average_x0' needs the mean image of the data, which a config cannot hold; use zero_x0"
            )
        if self.afs not in ("none", "zero_x0"):
            raise ValueError(f"afs {self.afs!r} is unknown; use none or zero_x0")
        if self.afs != "none" and len(self.steps) < 2:
            raise ValueError("afs 'zero_x0' leaves a schedule of one step without a network call; add a step")
        if self.afs != "none" and self.levels[-1] == 0.0 and self.steps[-1].start == -len(self.steps):
            raise ValueError(
                f"start of step {len(self.steps) - 1} is the analytic node, whose clean sample is 0, "
                "and so would be the result; start later"
            )
        for i, step in enumerate(self.steps):
            if step.measure not in ("data", "noise"):
                raise ValueError(f"measure of step {i} is {step.measure!r}; use data or noise")
            if step.order > MAX_ORDER:
                raise ValueError(
                    f"derivatives of step {i} make order {step.order}; use at most {MAX_ORDER - 1} of them"
                )
            self._check_update(f"step {i}", i + 1, step.start, -1, step.derivatives)
            if step.correction is not None:
                self._check_correction(i, step.correction)

    @property
    def calls(self) -> int:
        """Network calls of a run."""
        return len(self.steps) - (self.afs != "none") + sum(_is_implicit(step) for step in self.steps)

    @cached_property
    def half_logsnr(self) -> tuple[float, ...]:
        """``log(alpha / sigma)`` of every level, infinite at the ends."""
        with np.errstate(divide="ignore"):
            levels = np.array(self.levels)
            values = np.log1p(-levels) - np.log(levels) if self.kind == "flow" else -np.log(levels)
        return tuple(values.tolist())

    def grid(self, schedule: NoiseSchedule, *, fractional: bool = False) -> Grid:
        """The run's times.

        Args:
            schedule: of the model.
            fractional: of a VP model: labels that the levels give are not rounded.

        Raises:
            ValueError: a noise schedule of another kind, or levels that it does not have.
        """
        if schedule.kind != self.kind:
            raise ValueError(
                f"the schedule was made for a {self.kind} model and this one is {schedule.kind}; "
                "take one that was searched for this model"
            )
        # As all grids: the numbers of the float32 table that pipelines read.
        levels = np.array(self.levels, np.float32).astype(np.float64)
        if self.timesteps is not None:
            labels = np.array(self.timesteps)
        else:
            labels = schedule.timestep(levels[:-1])
            if self.kind == "vp" and not fractional:
                labels = labels.round()
        return Grid.of(schedule, levels, labels)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; Python's float representation makes it exact."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": self.kind,
            "levels": list(self.levels),
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "afs": self.afs,
            "steps": [_step_to_dict(step) for step in self.steps],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SolverSchedule:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: another format or version, or missing or wrong fields.
        """
        if not isinstance(data, Mapping) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
            found = f"format {data.get('format')!r}" if isinstance(data, Mapping) else f"{data!s:.80}"
            raise ValueError(f"decisions are no {_FORMAT} of version {_VERSION} ({found}); take what to_dict returned")
        fields = fields_of(data, "decisions", ("kind", "levels", "timesteps", "afs", "steps"), ("format", "version"))
        if not isinstance(fields["steps"], (list, tuple)):
            raise ValueError(f"steps of decisions is {fields['steps']!r:.80}; give a list")
        labels = fields["timesteps"]
        return cls(
            kind=fields["kind"],
            levels=numbers(fields["levels"], "levels"),
            steps=tuple(_step_from_dict(step, i) for i, step in enumerate(fields["steps"])),
            timesteps=None if labels is None else numbers(labels, "timesteps"),
            afs=fields["afs"],
        )

    def _check_times(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        levels = np.array(self.levels, np.float64)
        if not self.steps or len(levels) != len(self.steps) + 1:
            raise ValueError(
                f"{len(self.steps)} steps need {len(self.steps) + 1} levels and got {len(levels)}; add them"
            )
        if not np.isfinite(levels).all() or levels[-1] < 0.0 or (self.kind == "flow" and levels[0] > 1.0):
            bound = " and not above 1" if self.kind == "flow" else ""
            raise ValueError(f"levels must be finite, not negative{bound}, got {list(self.levels)}")
        if not (np.diff(levels) < 0).all():
            i = int(np.argmax(np.diff(levels) >= 0))
            raise ValueError(
                f"levels must decrease strictly, but number {i} is {levels[i]:.6g} and the next {levels[i + 1]:.6g}; "
                "leave one of them out"
            )
        if self.timesteps is not None and len(self.timesteps) != len(self.steps):
            raise ValueError(f"{len(self.steps)} steps need as many timesteps and got {len(self.timesteps)}")
        if self.timesteps is not None and not np.isfinite(self.timesteps).all():
            raise ValueError(f"timesteps must be finite, got {list(self.timesteps)}")

    def _check_correction(self, i: int, correction: Correction) -> None:
        if i == len(self.steps) - 1:
            raise ValueError(
                f"correction of step {i}, the last one, would need a network call at the end; leave it out"
            )
        if len(correction.derivatives) > MAX_ORDER:
            raise ValueError(
                f"derivatives of the correction of step {i} are {len(correction.derivatives)}; use at most 4"
            )
        if not any(-1 in derivative.active_points for derivative in correction.derivatives):
            raise ValueError(
                f"active_points of the correction of step {i} leave out -1, the new node; "
                "add it, or leave the correction out, which corrects nothing without"
            )
        self._check_update(f"the correction of step {i}", i + 2, correction.start, -2, correction.derivatives)

    def _check_update(self, name: str, known: int, start: int, latest: int, derivatives: Sequence[Derivative]) -> None:
        """Start and active points lie among the ``known`` nodes, and every derivative can be solved for."""
        if not -known <= start <= latest:
            raise ValueError(f"start of {name} is {start}; use {latest} to {-known}, which are the nodes before it")
        for j, derivative in enumerate(derivatives, 1):
            points = derivative.active_points
            where = f"active_points of derivative {j} of {name}"
            if len(points) < j:
                raise ValueError(f"{where} are {list(points)}; give at least {j}, or a lower order")
            if len(set(points)) < len(points) or start in points:
                raise ValueError(f"{where} are {list(points)}; give distinct ones, without the start {start}")
            if any(not -known <= p <= -1 for p in points):
                raise ValueError(f"{where} are {list(points)}; only -1 to {-known} are known there")
            near = sorted(self.half_logsnr[known + p] for p in (start, *points))
            if any(after - before < CLOSEST for before, after in pairwise(near)):
                raise ValueError(
                    f"{where} are {list(points)}, two of them within {CLOSEST} in half log-SNR; move a level apart, "
                    "or leave one out"
                )
            if derivative.relaxation not in RELAXATIONS:
                raise ValueError(
                    f"relaxation of derivative {j} of {name} is {derivative.relaxation!r}; "
                    f"use one of {', '.join(RELAXATIONS)}"
                )
            if j > 1 and derivative.relaxation != "none":
                raise ValueError(
                    f"relaxation of derivative {j} of {name} is {derivative.relaxation!r}; only the first has one"
                )
            coefficient = derivative.coefficient
            if not math.isfinite(coefficient) or (coefficient != 0.0 and derivative.relaxation != "linear"):
                raise ValueError(
                    f"coefficient of derivative {j} of {name} is {coefficient}; "
                    "give a finite number, and 0 unless the relaxation is linear"
                )


def _is_implicit(step: SolverStep) -> bool:
    return step.correction is not None and step.correction.implicit


def _step_to_dict(step: SolverStep) -> dict[str, Any]:
    correction = step.correction
    return {
        "measure": step.measure,
        "start": step.start,
        "derivatives": [_derivative_to_dict(derivative) for derivative in step.derivatives],
        "correction": None
        if correction is None
        else {
            "start": correction.start,
            "derivatives": [_derivative_to_dict(derivative) for derivative in correction.derivatives],
            "implicit": correction.implicit,
        },
    }


def _derivative_to_dict(derivative: Derivative) -> dict[str, Any]:
    return {
        "active_points": list(derivative.active_points),
        "relaxation": derivative.relaxation,
        "coefficient": derivative.coefficient,
    }


def _step_from_dict(data: Any, i: int) -> SolverStep:
    name = f"step {i}"
    fields = fields_of(data, name, ("measure", "start", "derivatives", "correction"))
    correction = fields["correction"]
    if correction is not None:
        within = f"the correction of {name}"
        parts = fields_of(correction, within, ("start", "derivatives", "implicit"))
        if not isinstance(parts["implicit"], bool):
            raise ValueError(f"implicit of {within} is {parts['implicit']!r}; use true or false")
        correction = Correction(
            integer(parts["start"], f"start of {within}"),
            _derivatives_from_list(parts["derivatives"], within),
            parts["implicit"],
        )
    return SolverStep(
        fields["measure"],
        integer(fields["start"], f"start of {name}"),
        _derivatives_from_list(fields["derivatives"], name),
        correction,
    )


def _derivatives_from_list(data: Any, name: str) -> tuple[Derivative, ...]:
    if not isinstance(data, (list, tuple)):
        raise ValueError(f"derivatives of {name} is {data!r:.80}; give a list")
    derivatives = []
    for j, entry in enumerate(data, 1):
        within = f"derivative {j} of {name}"
        fields = fields_of(entry, within, ("active_points", "relaxation", "coefficient"))
        points = fields["active_points"]
        if not isinstance(points, (list, tuple)):
            raise ValueError(f"active_points of {within} is {points!r:.80}; give a list")
        derivatives.append(
            Derivative(
                tuple(integer(p, f"an active point of {within}") for p in points),
                fields["relaxation"],
                *numbers([fields["coefficient"]], f"coefficient of {within}"),
            )
        )
    return tuple(derivatives)
