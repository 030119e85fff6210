"""One step of a plan over tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plan import NOISE, PREDICTION, SAMPLE, Call, Plan

_FIXED = {SAMPLE: 0, PREDICTION: 1, NOISE: 2}


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
    """A call with its slots as numbers."""

    __slots__ = ("alpha", "clean", "drop", "keep_prediction", "keep_sample", "measure", "prediction", "rows", "sigma")

    def __init__(self, call: Call, numbers: dict[str, int]) -> None:
        self.prediction, self.clean, self.measure = call.prediction, call.clean, call.measure
        self.alpha, self.sigma = call.alpha, call.sigma
        self.keep_sample = None if call.keep_sample is None else numbers[call.keep_sample]
        self.keep_prediction = None if call.keep_prediction is None else numbers[call.keep_prediction]
        self.rows = [(numbers[row.out], [(numbers[slot], c) for slot, c in row.terms]) for row in call.rows]
        self.drop = [numbers[slot] for slot in call.drop]


class PlanRun:
    """The tensors of one run of a plan.

    Coefficients are float64 numbers; tensors are accumulated in float32 or better. The state between steps
    is kept in that precision too: where the caller hands back what the last step returned in half precision, the
    unrounded state is used in its place.

    Args:
        plan: what to execute.
        thresholding: applied to the predicted clean sample.
    """

    def __init__(self, plan: Plan, thresholding: Thresholding | None = None) -> None:
        numbers = dict(_FIXED)
        for call in plan:
            for name in (call.keep_sample, call.keep_prediction, *(row.out for row in call.rows)):
                if name is not None:
                    numbers.setdefault(name, len(numbers))
        self._steps = [_Step(call, numbers) for call in plan]
        self._stochastic = [call.is_stochastic for call in plan]
        self._thresholding = thresholding
        self._values: list[torch.Tensor | None] = [None] * len(numbers)
        self._state: torch.Tensor | None = None
        self._before: tuple[list[torch.Tensor | None], torch.Tensor | None] = (self._values, None)
        self.position = 0

    @property
    def is_stochastic(self) -> bool:
        """Whether the next step reads noise."""
        return self._stochastic[self.position]

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
        self, sample: torch.Tensor, model_output: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Executes the next call.

        Args:
            sample: what the network saw (before ``in_scale``), ``(batch, ...)``.
            model_output: what it returned, of the same shape.
            noise: standard normal, needed where ``is_stochastic``.

        Returns:
            the next input of the network (after the last call: the result) and the predicted clean sample.
        """
        step = self._steps[self.position]
        self._before = (self._values.copy(), self._state)
        values = self._values
        accumulate = torch.promote_types(sample.dtype, torch.float32)
        x = sample if sample.dtype == accumulate else self._unrounded(sample, accumulate)
        if self._thresholding is None:
            m = _affine(step.prediction, x, model_output)
            clean = m if step.measure == "data" else _affine(step.clean, x, model_output)
        else:
            clean = self._thresholding(_affine(step.clean, x, model_output))
            m = clean if step.measure == "data" else _affine((1.0 / step.sigma, -step.alpha / step.sigma), x, clean)
        values[0], values[1], values[2] = x, m, noise
        following = x
        for out, terms in step.rows:
            result = _combine(values, terms)
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
        if following.dtype == sample.dtype:
            return following, clean
        self._state = following
        return following.to(sample.dtype), clean.to(sample.dtype)

    def _unrounded(self, sample: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        wide = sample.to(dtype)
        if self._state is None or self._state.shape != sample.shape:
            return wide
        # Elementwise, without asking the device: what a callback changed is taken, the rest stays exact.
        return torch.where(self._state.to(sample.dtype) == sample, self._state, wide)


def _affine(pair: tuple[float, float], x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``p x + q u`` in the dtype of ``x``."""
    p, q = pair
    if p == 0.0:
        u = u.to(x.dtype)
        return u if q == 1.0 else torch.mul(u, q)
    if p == 1.0:
        return torch.add(x, u, alpha=q)
    return torch.mul(x, p).add_(u, alpha=q)


def _combine(values: list[torch.Tensor | None], terms: list[tuple[int, float]]) -> torch.Tensor:
    slot, coefficient = terms[0]
    first = values[slot]
    assert first is not None
    total = torch.mul(first, coefficient)
    for slot, coefficient in terms[1:]:
        total.add_(values[slot], alpha=coefficient)  # type: ignore[arg-type]
    return total
