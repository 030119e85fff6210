"""Cascade polynomial regression (arXiv 2409.03755, section 3.3): ratios for runs that were not searched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial, legendre

from .schedule import Array

DEGREES = (3, 2, 2)
"""In the position in the run, the guidance scale and the number of steps: those of the authors' released fits."""

_FORMAT, _VERSION = "fewstep.cascade", 1
Box = tuple[float, float]


@dataclass(frozen=True)
class CascadeRegression:
    """Compensation ratios as a polynomial in position, guidance scale and number of steps, inside a box.

    The ratio of step ``i`` (from 1) of a run of ``N`` is cubic in ``i / N``, quadratic in the guidance scale and
    quadratic in ``N``. Where the authors' code extrapolates (to ratios below 0), this refuses.

    Attributes:
        coefficients: of products of Legendre polynomials, ``[position][guidance scale][steps]``, whose arguments run
            from -1 to 1 over ``i / N`` in [0, 1] and over the box.
        steps: fewest and most steps that it may be asked for.
        guidance_scale: lowest and highest guidance scale.
        ratios: predictions are clipped to this range.
        dc_order: of the scheduler; so many first ratios are 1.
    """

    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    steps: tuple[int, int]
    guidance_scale: Box
    ratios: Box
    dc_order: int = 2

    @classmethod
    def fit(cls, searched: Mapping[tuple[int, float], Sequence[float]], *, dc_order: int = 2) -> CascadeRegression:
        """Least squares over searched ratios; the box is what they span.

        The degree in steps, and in the guidance scale, is at most one less than the number of their distinct values.

        Args:
            searched: ratios of a run by number of steps and guidance scale, one a step.
            dc_order: that they were searched with; the first so many are not fitted.

        Raises:
            ValueError: nothing to fit, or lists of the wrong length.
        """
        rows, values = [], []
        for (count, scale), ratios in searched.items():
            if len(ratios) != count:
                raise ValueError(f"searched[{count}, {scale:g}] has {len(ratios)} ratios; give one a step")
            rows += [((i + 1) / count, float(scale), float(count)) for i in range(dc_order, count)]
            values += [float(ratio) for ratio in ratios[dc_order:]]
        if not values:
            raise ValueError(
                f"searched holds no run of more than {dc_order} steps, so no ratio to fit; search longer runs"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"searched holds ratios that are not finite: {values}; search again")
        points = np.array(rows)
        boxes: list[Box] = [(0.0, 1.0), *((float(v.min()), float(v.max())) for v in points[:, 1:].T)]
        counts = [len(np.unique(v)) for v in points.T]
        degrees = [min(degree, count - 1) for degree, count in zip(DEGREES, counts, strict=True)]
        design = _products(points, boxes, degrees)
        # Of all best fits the smallest coefficients, where the runs do not determine them.
        fitted = np.linalg.lstsq(design, np.array(values), rcond=1e-10)[0]
        steps = (int(boxes[2][0]), int(boxes[2][1]))
        shape = [degree + 1 for degree in degrees]
        return cls(_nested(fitted.reshape(shape)), steps, boxes[1], (min(values), max(values)), dc_order)

    @classmethod
    def from_monomials(
        cls,
        coefficients: Sequence[float] | Array,
        *,
        steps: tuple[int, int],
        guidance_scale: Box,
        ratios: Box = (0.4, 1.4),
    ) -> CascadeRegression:
        """Reads the 36 numbers of the authors' files (``numpy.load`` of them): ``sum c[p][q][r] s^p g^(2-q) n^(2-r)``.

        ``s = i / N``, ``g = guidance_scale / 12``, ``n = N / 50``. The files do not say where they were fitted.

        Args:
            coefficients: ``(36,)`` or ``(4, 3, 3)``.
            steps: fewest and most steps that they may be used for.
            guidance_scale: lowest and highest guidance scale.
            ratios: predictions are clipped to this range.

        Raises:
            ValueError: another number of coefficients.
        """
        table = np.asarray(coefficients, np.float64)
        if table.size != 36:
            raise ValueError(f"coefficients has {table.size} numbers; the authors' files have 36")
        boxes: list[Box] = [(0.0, 1.0), guidance_scale, (float(steps[0]), float(steps[1]))]
        units = (1.0, 12.0, 50.0)
        # Powers rise along the first axis and fall along the others.
        table = table.reshape(4, 3, 3)[:, ::-1, ::-1]
        for axis, (unit, box) in enumerate(zip(units, boxes, strict=True)):
            table = np.moveaxis(np.tensordot(_change(table.shape[axis], unit, box), table, (1, axis)), 0, axis)
        regression = cls(_nested(table), (int(steps[0]), int(steps[1])), guidance_scale, ratios)
        return cls.from_dict(regression.to_dict())

    def predict(self, steps: int, guidance_scale: float | None) -> list[float]:
        """The ratios of a run, one a step.

        Args:
            steps: of the run.
            guidance_scale: of the run.

        Raises:
            ValueError: outside the box.
        """
        low, high = self.steps
        if not low <= steps <= high:
            raise ValueError(
                f"a run of {steps} steps lies outside the {low} to {high} steps that the compensation was fitted on; "
                "choose a number inside, or search ratios for this one"
            )
        self.check_guidance_scale(guidance_scale)
        assert guidance_scale is not None
        positions = np.arange(1, steps + 1) / steps
        points = np.stack([positions, np.full(steps, guidance_scale), np.full(steps, float(steps))], axis=1)
        table = np.array(self.coefficients)
        boxes: list[Box] = [(0.0, 1.0), self.guidance_scale, (float(low), float(high))]
        values = _products(points, boxes, [n - 1 for n in table.shape]) @ table.ravel()
        values = np.clip(values, *self.ratios)
        values[: self.dc_order] = 1.0
        ratios: list[float] = values.tolist()
        return ratios

    def check_guidance_scale(self, guidance_scale: float | None) -> None:
        """Refuses a guidance scale outside the box.

        Raises:
            ValueError: naming the box.
        """
        low, high = self.guidance_scale
        if guidance_scale is None:
            raise ValueError(f"guidance_scale is needed with regression; set it to the run's, {low:g} to {high:g}")
        if not low <= guidance_scale <= high:
            raise ValueError(
                f"guidance_scale {guidance_scale:g} lies outside the {low:g} to {high:g} that the compensation was "
                "fitted on; choose one inside, or search ratios for this one"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, for the config of a scheduler."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CascadeRegression:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: another format or version, or wrong fields.
        """
        if not isinstance(data, Mapping) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"regression is no {_FORMAT} of version {_VERSION}; take what to_dict returned")
        try:
            table = np.asarray(data["coefficients"], np.float64)
            steps, scales, ratios = (
                tuple(float(v) for v in data[key]) for key in ("steps", "guidance_scale", "ratios")
            )
            dc_order = int(data["dc_order"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"regression is damaged ({error}); take what to_dict returned") from None
        if table.ndim != 3 or table.size == 0 or not np.isfinite(table).all():
            raise ValueError(f"coefficients of regression must be a finite table of 3 axes, got shape {table.shape}")
        for name, box in (("steps", steps), ("guidance_scale", scales), ("ratios", ratios)):
            if len(box) != 2 or not all(map(math.isfinite, box)) or box[0] > box[1]:
                raise ValueError(f"{name} of regression is {box}; give lowest and highest")
        return cls(
            _nested(table),
            (int(steps[0]), int(steps[1])),
            (scales[0], scales[1]),
            (ratios[0], ratios[1]),
            dc_order,
        )


def _products(points: Array, boxes: Sequence[Box], degrees: Sequence[int]) -> Array:
    """Products of Legendre polynomials at ``(count, 3)`` points, ``(count, terms)``."""
    result = np.ones((len(points), 1))
    for values, (low, high), degree in zip(points.T, boxes, degrees, strict=True):
        width = high - low
        u = (2.0 * values - low - high) / width if width > 0.0 else np.zeros_like(values)
        factor = legendre.legvander(u, degree)
        result = (result[:, :, None] * factor[:, None, :]).reshape(len(points), -1)
    return result


def _change(count: int, unit: float, box: Box) -> Array:
    """The matrix from powers of ``value / unit`` to Legendre coefficients over the box."""
    low, high = box
    if high <= low:
        return np.array([[(low / unit) ** k for k in range(count)]])
    argument = Polynomial([(low + high) / (2 * unit), (high - low) / (2 * unit)])
    columns = [legendre.poly2leg((argument**k).coef) for k in range(count)]
    return np.stack([np.pad(column, (0, count - len(column))) for column in columns], axis=1)


def _nested(table: Array) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in plane) for plane in table.tolist())
