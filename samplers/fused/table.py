"""A plan as matrices: what one pass over memory reads, multiplies and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..rows import CompiledCall

HEAD = 2
"""Entries of a table's row before the matrix: the pair that makes the predicted clean sample, where it is clipped."""

_FIRST_KEPT = 3


@dataclass(frozen=True)
class CallLayout:
    """Which tensors a call reads and writes, without a number: calls of equal layouts are one kernel.

    The columns of the matrix are the sample, the model's output (the clipped clean sample, where it is clipped), the
    noise if it ``draws``, and the slots in ``reads``. Its rows are the next sample, the slots in ``writes``, and the
    predicted clean sample.

    Attributes:
        draws: whether noise is read.
        reads: slots of the kept tensors that are read.
        writes: slots of the kept tensors that are written.
        drop: slots that nobody reads afterwards.
        terms: columns of each row that are not zero.
    """

    draws: bool
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    drop: tuple[int, ...]
    terms: tuple[tuple[int, ...], ...]

    @property
    def columns(self) -> int:
        """Number of tensors that are read."""
        return 2 + self.draws + len(self.reads)


class PlanTable:
    """The matrices of a plan's calls, one a row.

    Prediction, rows and predicted clean sample are linear in what a call reads, so each output is one sum of it; the
    products of coefficients are made here, in float64.

    Args:
        calls: of the plan.
        slots: their number.
        clip: whether the predicted clean sample is clipped; the matrices then read it in the place of the output.

    Attributes:
        layouts: of the calls.
        numbers: ``(calls, width)``, float64.
    """

    def __init__(self, calls: Sequence[CompiledCall], slots: int, *, clip: bool) -> None:
        self.layouts: list[CallLayout] = []
        rows = []
        for call in calls:
            layout, matrix = _layout(call, slots, clip)
            self.layouts.append(layout)
            rows.append([*call.clean, *matrix.ravel()])
        self.numbers = np.zeros((len(rows), max(map(len, rows))))
        for k, row in enumerate(rows):
            self.numbers[k, : len(row)] = row


def _layout(call: CompiledCall, slots: int, clip: bool) -> tuple[CallLayout, np.ndarray]:
    """Follows a call over unit vectors in the place of tensors."""
    x, u, noise, *kept = np.eye(slots)
    values = dict(enumerate(kept, _FIRST_KEPT))
    if not clip:
        m = call.prediction[0] * x + call.prediction[1] * u
        clean = call.scale * m if call.is_data else call.clean[0] * x + call.clean[1] * u
    else:
        clean = u
        m = u if call.is_data else (x - call.alpha * u) / call.sigma
    before = values.copy()
    values |= {0: x, 1: m, 2: noise}
    following = x
    for out, slot, factor, others in call.rows:
        result = np.sum([factor * values[slot], *(c * values[other] for other, c in others)], axis=0)
        if out == 0:
            following = result
        else:
            values[out] = result
    if call.keep_sample is not None:
        values[call.keep_sample] = x
    if call.keep_prediction is not None:
        values[call.keep_prediction] = m
    writes = tuple(slot for slot, v in before.items() if values[slot] is not v and slot not in call.drop)
    matrix = np.stack([following, *(values[slot] for slot in writes), clean])
    columns = np.flatnonzero(matrix.any(axis=0)).tolist()
    draws, reads = 2 in columns, tuple(s for s in columns if s >= _FIRST_KEPT)
    matrix = matrix[:, [0, 1, *((2,) if draws else ()), *reads]]
    terms = tuple(tuple(np.flatnonzero(row).tolist()) for row in matrix)
    return CallLayout(draws, reads, writes, tuple(call.drop), terms), matrix
