"""One step of a plan over tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .plan import NOISE, PREDICTION, SAMPLE, Call, Plan

_FIXED = {SAMPLE: 0, PREDICTION: 1, NOISE: 2}


@functools.cache
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype of the sample where it is wider."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Thresholding:
    """Clipping of the predicted clean sample.

    Attributes:
        ratio: quantile of ``|x_0|`` per sample that sets the bound (Imagen, arXiv 2205.11487, section 2.3).
        max_value: upper limit of the bound, at least 1, or ``None``.
    """

    ratio: float
    max_value: float | None

    def __call__(self, clean: torch.Tensor) -> torch.Tensor:
        """Clips each sample of the batch to its bound ``s >= 1`` and divides by it."""
        bound = torch.quantile(clean.abs().flatten(1), self.ratio, dim=1).clamp(min=1.0, max=self.max_value)
        bound = bound.view(-1, *[1] * (clean.ndim - 1))
        return clean.clamp(-bound, bound).div_(bound)


class _Step:
    """A call with its slots as numbers; a row is its target, its first term and the others.

    A prediction ``p x + q u`` that is kept is computed as ``x + (q / p) u``, one operation instead of two: ``p`` goes
    into the coefficients of whoever reads it. One that a single row reads is not computed at all: the row reads ``x``
    and ``u``.

    Args:
        call: of the plan.
        numbers: of the slots.
        scales: what the tensor in a slot must be multiplied by; brought up to date.
        fold: whether this is allowed: thresholding needs the prediction itself.
    """

    __slots__ = (
        "alpha",
        "clean",
        "drop",
        "is_data",
        "keep_prediction",
        "keep_sample",
        "prediction",
        "rows",
        "scale",
        "sigma",
    )

    def __init__(self, call: Call, numbers: dict[str, int], scales: dict[int, float], fold: bool) -> None:
        p, q = call.prediction
        inlined = fold and call.keep_prediction is None and len(call.rows) == 1
        self.scale = p if fold and p != 0.0 and not inlined else 1.0
        self.prediction = (0.0, 1.0) if inlined else (p / self.scale, q / self.scale)
        self.clean, self.is_data = call.clean, call.measure == "data" and not inlined
        self.alpha, self.sigma = call.alpha, call.sigma
        self.keep_sample = None if call.keep_sample is None else numbers[call.keep_sample]
        self.keep_prediction = None if call.keep_prediction is None else numbers[call.keep_prediction]
        scales[_FIXED[PREDICTION]] = self.scale
        self.rows = []
        for row in call.rows:
            terms: dict[int, float] = {}
            for name, c in row.terms:
                if inlined and name == PREDICTION:
                    terms[_FIXED[SAMPLE]] = terms.get(_FIXED[SAMPLE], 0.0) + c * p
                    c *= q
                terms[numbers[name]] = terms.get(numbers[name], 0.0) + c * scales.get(numbers[name], 1.0)
            (slot, factor), *others = ((number, c) for number, c in terms.items() if c != 0.0)
            self.rows.append((numbers[row.out], slot, factor, others))
            scales.pop(numbers[row.out], None)
        if self.keep_sample is not None:
            scales.pop(self.keep_sample, None)
        if self.keep_prediction is not None:
            scales[self.keep_prediction] = self.scale
        self.drop = [numbers[slot] for slot in call.drop]

    def factors(self) -> Iterator[float]:
        """The coefficients that multiply a tensor, rather than add to one."""
        yield from (self.prediction[0], self.clean[0], self.scale)
        yield from (factor for _, _, factor, _ in self.rows)


class PlanRun:
    """The tensors of one run of a plan.

    Coefficients are float64 numbers; tensors are accumulated in float32 or better. The state between steps
    is kept in that precision too: where the caller hands back what the last step returned in half precision, the
    unrounded state is used in its place.

    Args:
        plan: what to execute.
        thresholding: applied to the predicted clean sample.

    Attributes:
        plan: what is executed.
        position: number of the next call.
    """

    def __init__(self, plan: Plan, thresholding: Thresholding | None = None) -> None:
        numbers = dict(_FIXED)
        for call in plan:
            for name in (call.keep_sample, call.keep_prediction, *(row.out for row in call.rows)):
                if name is not None:
                    numbers.setdefault(name, len(numbers))
        scales: dict[int, float] = {}
        self._steps = [_Step(call, numbers, scales, fold=thresholding is None) for call in plan]
        self._stochastic = [call.is_stochastic for call in plan]
        self._factors = {factor for step in self._steps for factor in step.factors()}
        self._bind(torch.float32)
        self._thresholding = thresholding
        self.plan = plan
        self._values: list[torch.Tensor | None] = [None] * len(numbers)
        self._state: torch.Tensor | None = None
        self._before: tuple[list[torch.Tensor | None], torch.Tensor | None] = (self._values, None)
        self.position = 0

    @property
    def is_stochastic(self) -> bool:
        """Whether the next step reads noise."""
        return self._stochastic[self.position]

    @property
    def is_over(self) -> bool:
        """Whether all calls were executed."""
        return self.position == len(self._steps)

    def undo(self) -> None:
        """Takes the last step back."""
        self._values, self._state = self._before
        self.position -= 1

    def reorder(self, ancestors: torch.Tensor) -> None:
        """Gathers every kept tensor along the batch: particle ``b`` goes on from particle ``ancestors[b]``."""
        self._values = [None if v is None else v.index_select(0, ancestors) for v in self._values]
        if self._state is not None:
            self._state = self._state.index_select(0, ancestors)

    def step(
        self, sample: torch.Tensor, model_output: torch.Tensor, noise: torch.Tensor | None = None, *, clean: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Executes the next call.

        Args:
            sample: what the network saw (before ``in_scale``), ``(batch, ...)``.
            model_output: what it returned, of the same shape.
            noise: standard normal, needed where ``is_stochastic``.
            clean: whether the predicted clean sample is wanted.

        Returns:
            the next input of the network (after the last call: the result), and the predicted clean sample or ``None``.
        """
        step = self._steps[self.position]
        values: list[Any] = self._values
        self._before = (values.copy(), self._state)
        x = sample if sample.dtype is self._dtype else self.widened(sample)
        predicted: torch.Tensor | None = None
        if self._thresholding is None:
            m = self._affine(step.prediction, x, model_output)
            if clean:
                predicted = self._clean(step, x, model_output, m)
        else:
            predicted = self._thresholding(self._affine(step.clean, x, model_output))
            m = predicted if step.is_data else self._affine((1.0 / step.sigma, -step.alpha / step.sigma), x, predicted)
            if clean and step.is_data and step.keep_prediction is not None:
                predicted = predicted.clone()
        values[0], values[1], values[2] = x, m, noise
        following = x
        for out, slot, factor, others in step.rows:
            result = values[slot] * self._scalars[factor]
            for slot, coefficient in others:
                result.add_(values[slot], alpha=coefficient)
            if out == 0:
                following = result
            else:
                values[out] = result
        if step.keep_sample is not None:
            # The caller may go on writing to its tensors, the kept ones must stay.
            values[step.keep_sample] = x.clone() if x is sample else x
        if step.keep_prediction is not None:
            values[step.keep_prediction] = m.clone() if m is model_output else m
        values[0] = values[1] = values[2] = None
        for slot in step.drop:
            values[slot] = None
        self.position += 1
        if following.dtype is sample.dtype:
            return following, predicted
        self._state = following
        return following.to(sample.dtype), None if predicted is None else predicted.to(sample.dtype)

    def predicted(self, sample: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
        """The clean sample that the next call's output means, clipped where this is configured.

        Args:
            sample: what the network saw, ``(batch, ...)``.
            model_output: of the same shape.
        """
        clean = self._affine(self._steps[self.position].clean, self.widened(sample), model_output)
        return clean if self._thresholding is None else self._thresholding(clean)

    def _clean(self, step: _Step, x: torch.Tensor, model_output: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        if not step.is_data:
            return self._affine(step.clean, x, model_output)
        if step.scale == 1.0 and step.keep_prediction is None:
            return m
        return m * self._scalars[step.scale]

    def _bind(self, dtype: torch.dtype) -> None:
        """Makes the factors tensors of no dimensions: torch would wrap a Python number anew at every product."""
        self._dtype = dtype
        # Not as inference tensors, which autograd refuses in a later call.
        with torch.inference_mode(False):
            scalars = torch.tensor([*self._factors], dtype=dtype, device="cpu").unbind()
        self._scalars = dict(zip(self._factors, scalars, strict=True))

    def widened(self, sample: torch.Tensor) -> torch.Tensor:
        """The sample in the dtype of accumulation, unrounded where the last step knows it."""
        dtype = accumulation_dtype(sample.dtype)
        if dtype is not self._dtype:
            self._bind(dtype)
        if dtype is sample.dtype:
            return sample
        wide = sample.to(dtype)
        if self._state is None or self._state.shape != sample.shape:
            return wide
        # Elementwise, without asking the device: what a callback changed is taken, the rest stays exact.
        return torch.where(self._state.to(sample.dtype) == sample, self._state, wide)

    def _affine(self, pair: tuple[float, float], x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """``p x + q u`` in the dtype of ``x``."""
        p, q = pair
        if p == 0.0:
            u = u.to(x.dtype)
            return u if q == 1.0 else u * q
        if p == 1.0:
            return torch.add(x, u, alpha=q)
        return (x * self._scalars.get(p, p)).add_(u, alpha=q)
