"""The calls of a plan on numbered slots, and their execution with torch's own operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .plan import NOISE, PREDICTION, SAMPLE, Call, Plan

FIXED = {SAMPLE: 0, PREDICTION: 1, NOISE: 2}
"""Numbers of the slots that every call has; those of the kept tensors follow."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype of the sample where it is wider."""
    return dtype if dtype is torch.float64 else torch.float32


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
        bound = self.bound(clean)
        if bound is None:
            return clean.clamp(-1.0, 1.0)
        bound = bound.view(-1, *[1] * (clean.ndim - 1))
        return clean.clamp(-bound, bound).div_(bound)

    def bound(self, clean: torch.Tensor) -> torch.Tensor | None:
        """The bounds, ``(batch,)``; ``None`` where all are 1, whatever the samples."""
        if self.max_value == 1.0:
            return None
        return torch.quantile(clean.abs().flatten(1), self.ratio, dim=1).clamp(min=1.0, max=self.max_value)


class GuidedOutput(NamedTuple):
    """A model's two outputs, for classifier-free guidance in the step.

    Attributes:
        conditional: with the prompt, shaped like the sample.
        unconditional: without it.
        scale: of guidance; or a tensor ``()`` that holds it.
    """

    conditional: torch.Tensor
    unconditional: torch.Tensor
    scale: float | torch.Tensor

    def combined(self) -> torch.Tensor:
        """One output, as pipelines make it."""
        return self.unconditional + self.scale * (self.conditional - self.unconditional)


class CompiledCall:
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
        scales[FIXED[PREDICTION]] = self.scale
        self.rows = []
        for row in call.rows:
            terms: dict[int, float] = {}
            for name, c in row.terms:
                if inlined and name == PREDICTION:
                    terms[FIXED[SAMPLE]] = terms.get(FIXED[SAMPLE], 0.0) + c * p
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


def compiled(plan: Plan, *, fold: bool) -> tuple[list[CompiledCall], int]:
    """The plan's calls, and the number of their slots.

    Args:
        plan: to compile.
        fold: as of ``CompiledCall``.
    """
    numbers = dict(FIXED)
    for call in plan:
        for name in (call.keep_sample, call.keep_prediction, *(row.out for row in call.rows)):
            if name is not None:
                numbers.setdefault(name, len(numbers))
    scales: dict[int, float] = {}
    return [CompiledCall(call, numbers, scales, fold) for call in plan], len(numbers)


class TorchRows:
    """Executes compiled calls in as few passes over memory as eager torch allows.

    Args:
        calls: of the plan.
        thresholding: of the predicted clean sample.

    Attributes:
        dtype: of accumulation, that the coefficients are ready for.
    """

    def __init__(self, calls: Sequence[CompiledCall], thresholding: Thresholding | None) -> None:
        self._calls, self._thresholding = calls, thresholding
        self._factors = {factor for call in calls for factor in call.factors()}
        self.bind(torch.float32)

    def bind(self, dtype: torch.dtype) -> None:
        """Makes the factors tensors of no dimensions: torch would wrap a Python number anew at every product."""
        self.dtype = dtype
        # Not as inference tensors, which autograd refuses in a later call.
        with torch.inference_mode(False):
            scalars = torch.tensor([*self._factors], dtype=dtype, device="cpu").unbind()
        self._scalars = dict(zip(self._factors, scalars, strict=True))

    def execute(
        self,
        position: int,
        values: list[Any],
        x: torch.Tensor,
        model_output: torch.Tensor,
        noise: torch.Tensor | None,
        *,
        owned: bool,
        clean: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Executes a call.

        Args:
            position: of the call.
            values: the tensors in the slots; brought up to date.
            x: the sample in the dtype of accumulation.
            model_output: of the network.
            noise: standard normal, where the call reads it.
            owned: whether ``x`` is no tensor of the caller's, who may go on writing to it.
            clean: whether the predicted clean sample is wanted.

        Returns:
            the next sample, and the predicted clean sample or ``None``.
        """
        call = self._calls[position]
        predicted: torch.Tensor | None = None
        if self._thresholding is None:
            m = self._affine(call.prediction, x, model_output)
            if clean:
                predicted = self._clean(call, x, model_output, m)
        else:
            predicted = self._thresholding(self._affine(call.clean, x, model_output))
            m = predicted if call.is_data else self._affine((1.0 / call.sigma, -call.alpha / call.sigma), x, predicted)
            if clean and call.is_data and call.keep_prediction is not None:
                predicted = predicted.clone()
        values[0], values[1], values[2] = x, m, noise
        following = x
        for out, slot, factor, others in call.rows:
            result = values[slot] * self._scalars[factor]
            for slot, coefficient in others:
                result.add_(values[slot], alpha=coefficient)
            if out == 0:
                following = result
            else:
                values[out] = result
        if call.keep_sample is not None:
            values[call.keep_sample] = x if owned else x.clone()
        if call.keep_prediction is not None:
            values[call.keep_prediction] = m.clone() if m is model_output else m
        values[0] = values[1] = values[2] = None
        for slot in call.drop:
            values[slot] = None
        return following, predicted

    def predicted(self, position: int, x: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
        """The predicted clean sample of a call, clipped where this is configured; arguments as of ``execute``."""
        clean = self._affine(self._calls[position].clean, x, model_output)
        return clean if self._thresholding is None else self._thresholding(clean)

    def _clean(self, call: CompiledCall, x: torch.Tensor, model_output: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        if not call.is_data:
            return self._affine(call.clean, x, model_output)
        if call.scale == 1.0 and call.keep_prediction is None:
            return m
        return m * self._scalars[call.scale]

    def _affine(self, pair: tuple[float, float], x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """``p x + q u`` in the dtype of ``x``."""
        p, q = pair
        if p == 0.0:
            u = u.to(x.dtype)
            return u if q == 1.0 else u * q
        if p == 1.0:
            return torch.add(x, u, alpha=q)
        return (x * self._scalars.get(p, p)).add_(u, alpha=q)
