"""From tensors to the kernel: memory formats, outputs, the grid."""

from __future__ import annotations

import functools

import torch
import triton

from ..noise import NoiseToDraw
from ..philox import LANE
from ..rows import accumulation_dtype
from .kernel import plan_call
from .operands import Gathered, Operands, Results, drawn
from .table import CallLayout

# Elements that a program does, of one sample; where it draws noise, four times LANE, so that no random word is wasted.
_BLOCK = 1024

_ROW_MAJOR, _OTHER_ORDER = 0, -1


def triton_pass(operands: Operands, layout: CallLayout) -> Results:
    """One call by the kernel."""
    sample, order = _dense(operands.sample)
    batch, shape, dtype = len(sample), sample.shape, sample.dtype
    size = sample.numel() // batch if batch else 0
    strides = (size, *sample.stride()[1:])
    wide = accumulation_dtype(dtype)

    def aligned(tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or a copy with its elements in the order of the sample's."""
        if tensor.stride()[1:] == strides[1:]:
            return tensor
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    def empty(kind: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=kind, device=sample.device)

    inputs = [sample, aligned(operands.model_output)]
    noise, seeds, first_step = operands.noise, None, 0
    if layout.draws and isinstance(noise, NoiseToDraw) and order != _OTHER_ORDER:
        seeds, first_step = noise.seeds, noise.first_step
    elif layout.draws:
        inputs.append(aligned(drawn(operands, wide)))
    ancestors: list[torch.Tensor | None] = [None] * len(inputs)
    for kept in operands.kept:
        inputs.append(aligned(kept.tensor if isinstance(kept, Gathered) else kept))
        ancestors.append(kept.ancestors if isinstance(kept, Gathered) else None)
    state = operands.state
    state_ancestors = state.ancestors if isinstance(state, Gathered) else None
    state_tensor = state.tensor if isinstance(state, Gathered) else state
    following, kept_now = empty(dtype), [empty(wide) for _ in layout.writes]
    new_state = None if wide is dtype else empty(wide)
    predicted = empty(dtype) if operands.clean else None
    outputs = [following, *kept_now] if predicted is None else [following, *kept_now, predicted]
    unconditional = None if operands.unconditional is None else aligned(operands.unconditional)
    if size:
        lanes, block = (4, LANE) if seeds is not None and order == _ROW_MAJOR else (1, _BLOCK)
        blocks = triton.cdiv(size, block * lanes)
        # A launch goes to the current device.
        with torch.cuda.device_of(sample):
            plan_call[(batch * blocks,)](
                tuple(outputs),
                tuple(t.stride(0) for t in outputs),
                tuple(inputs),
                tuple(t.stride(0) for t in inputs),
                tuple(ancestors),
                None if state_tensor is None else aligned(state_tensor),
                state_ancestors,
                new_state,
                unconditional,
                0 if unconditional is None else unconditional.stride(0),
                operands.scale,
                operands.bound,
                seeds,
                first_step,
                operands.table,
                operands.index,
                size,
                blocks,
                None if order == _ROW_MAJOR else order,
                WIDTH=operands.table.shape[1],
                INDEX_STRIDE=operands.index.ndim,
                CLIP=operands.clip,
                BLOCK=block,
                LANES=lanes,
                enable_fp_fusion=True,
            )
    return Results(following, new_state, kept_now, predicted)


def fits(sample: torch.Tensor) -> bool:
    """Whether elements of a sample can be numbered in 32 bits."""
    return sample.numel() < (2**31 - 4 * LANE) * max(len(sample), 1)


def _dense(sample: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The samples, copied unless the elements of each lie side by side, and their order."""
    order = _order(sample.shape, sample.stride())
    return (sample.contiguous(), _ROW_MAJOR) if order is None else (sample, order)


@functools.lru_cache(1024)
def _order(shape: torch.Size, strides: tuple[int, ...]) -> int | None:
    """``_ROW_MAJOR``, the number of channels where they come last in memory, ``_OTHER_ORDER``, or ``None`` for gaps."""
    expected, dense = 1, True
    dims = range(1, len(shape))
    for dim in sorted(dims, key=lambda d: (strides[d], shape[d])):
        dense &= shape[dim] == 1 or strides[dim] == expected
        expected *= shape[dim]
    if not dense:
        return None
    order = [dim for dim in sorted(dims, key=lambda d: -strides[d]) if shape[dim] > 1]
    if order == sorted(order):
        return _ROW_MAJOR
    return shape[1] if order == [*sorted(order[:-1]), 1] else _OTHER_ORDER
