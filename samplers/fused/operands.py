"""What one pass reads, and the pass in torch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..noise import NoiseToDraw
from ..rows import accumulation_dtype
from .table import HEAD, CallLayout


class Gathered(NamedTuple):
    """A kept tensor whose samples are to be read in another order: sample ``b`` is ``tensor[ancestors[b]]``."""

    tensor: torch.Tensor
    ancestors: torch.Tensor

    def gathered(self) -> torch.Tensor:
        """The tensor in this order."""
        return self.tensor.index_select(0, self.ancestors)


Kept = torch.Tensor | Gathered


def reordered(kept: Kept, ancestors: torch.Tensor) -> Gathered:
    """Puts the reading of a kept tensor off, in another order."""
    if isinstance(kept, Gathered):
        return Gathered(kept.tensor, kept.ancestors.index_select(0, ancestors))
    return Gathered(kept, ancestors)


def gathered(kept: Any) -> Any:
    """The tensor itself, in its order."""
    return kept.gathered() if isinstance(kept, Gathered) else kept


@dataclass
class Operands:
    """What a pass reads; tensors are ``(batch, ...)`` of any floating dtype.

    Attributes:
        sample: what the network saw.
        model_output: what it returned; with guidance, for the prompt.
        unconditional: what it returned without the prompt.
        scale: of classifier-free guidance, ``()``.
        noise: standard normal, or how to draw it.
        kept: the kept tensors that are read.
        state: the sample of a half-precision run before it was rounded.
        clip: whether the predicted clean sample is clipped.
        bound: to what, one a sample; 1 where it is ``None``.
        table: coefficients, ``(calls, width)``.
        index: row of the table, ``()`` or one a sample, int32.
        clean: whether the predicted clean sample is wanted.
    """

    sample: torch.Tensor
    model_output: torch.Tensor
    unconditional: torch.Tensor | None
    scale: torch.Tensor | None
    noise: torch.Tensor | NoiseToDraw | None
    kept: Sequence[Kept]
    state: Kept | None
    clip: bool
    bound: torch.Tensor | None
    table: torch.Tensor
    index: torch.Tensor
    clean: bool


class Results(NamedTuple):
    """What a pass writes.

    Attributes:
        following: the next sample, in the dtype of the sample.
        state: the same before rounding, of half precision.
        kept: the tensors to keep, in the dtype of accumulation.
        predicted: the predicted clean sample, in the dtype of the sample.
    """

    following: torch.Tensor
    state: torch.Tensor | None
    kept: list[torch.Tensor]
    predicted: torch.Tensor | None


def torch_pass(operands: Operands, layout: CallLayout) -> Results:
    """One call by torch's operations, with the table's numbers read on the device, so that graphs may change them."""
    sample = operands.sample
    dtype = accumulation_dtype(sample.dtype)
    ones = [1] * (sample.ndim - 1)
    # (calls, width) at () or (batch,): a number, or one a sample.
    row = operands.table.index_select(0, operands.index.view(-1).long())
    row = row.t().reshape(row.shape[1], -1, *ones) if operands.index.ndim else row[0]
    x, u = widened(operands), guided(operands)
    if operands.clip:
        clean = row[0] * x + row[1] * u
        if operands.bound is None:
            u = clean.clamp(-1.0, 1.0)
        else:
            bound = operands.bound.view(-1, *ones)
            u = clean.clamp(-bound, bound) / bound
    sources = [x, u]
    if layout.draws:
        sources.append(drawn(operands, dtype))
    sources += [gathered(kept) for kept in operands.kept]
    results = []
    for k, terms in enumerate(layout.terms if operands.clean else layout.terms[:-1]):
        total: Any = None
        for column in terms:
            c = row[HEAD + k * layout.columns + column]
            total = sources[column] * c if total is None else torch.addcmul(total, sources[column], c)
        results.append(torch.zeros_like(x) if total is None else total)
    predicted = results.pop().to(sample.dtype) if operands.clean else None
    following, *kept_now = results
    half = dtype != sample.dtype
    return Results(following.to(sample.dtype), following if half else None, kept_now, predicted)


def widened(operands: Operands) -> torch.Tensor:
    """The sample in the dtype of accumulation, unrounded where the state knows it."""
    sample = operands.sample
    wide = sample.to(accumulation_dtype(sample.dtype))
    if operands.state is None:
        return wide
    state = gathered(operands.state)
    return torch.where(state.to(sample.dtype) == sample, state, wide)


def guided(operands: Operands) -> torch.Tensor:
    """The model's output in the dtype of accumulation, guidance in it."""
    dtype = accumulation_dtype(operands.sample.dtype)
    output = operands.model_output.to(dtype)
    if operands.unconditional is None:
        return output
    assert operands.scale is not None
    unconditional = operands.unconditional.to(dtype)
    return unconditional + operands.scale * (output - unconditional)


def drawn(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    """The noise of the call.

    Raises:
        ValueError: there is none.
    """
    noise = operands.noise
    if noise is None:
        raise ValueError("noise is None, and the plan's call reads noise; give standard normal noise")
    if isinstance(noise, NoiseToDraw):
        return noise.draw(operands.index, operands.sample.shape, dtype)
    return noise.to(dtype)
