"""From tensors to the kernel: memory formats, outputs, the grid."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..noise import NoiseToDraw
from ..philox import LANE
from ..rows import accumulation_dtype
from .kernel import plan_call
from .operands import Gathered, Kept, Operands, Results, drawn
from .table import CallLayout

# Elements that a program does, of one sample; where it draws noise, four times LANE, so that no random word is wasted.
_BLOCK = 1024

_ROW_MAJOR, _OTHER_ORDER = 0, -1

_COMPILED: dict[tuple[Any, ...], Any] = {}
"""Kernels by the kinds of their arguments."""


class _Arguments(NamedTuple):
    """The kernel's, in its order."""

    outputs: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]
    input_strides: tuple[int, ...]
    ancestors: tuple[torch.Tensor | None, ...]
    state: torch.Tensor | None
    state_ancestors: torch.Tensor | None
    new_state: torch.Tensor | None
    unconditional: torch.Tensor | None
    unconditional_stride: int
    scale: torch.Tensor | None
    bound: torch.Tensor | None
    seeds: torch.Tensor | None
    first_step: int
    table: torch.Tensor
    row_index: torch.Tensor
    size: int
    blocks: int
    channels: int | None
    width: int
    index_stride: int
    clip: bool
    block: int
    lanes: int

    def kinds(self) -> tuple[Any, ...]:
        """Equal for arguments that Triton compiles the same kernel for, if all tensors begin at multiples of 16 bytes.

        Triton finds out by itself at every launch, in most of the time that one takes.
        """
        return (
            self.inputs[0].get_device(),
            tuple([t.dtype for t in self.outputs]),
            tuple([t.dtype for t in self.inputs]),
            self.input_strides,
            tuple([_dtype(t) for t in self.ancestors]),
            _dtype(self.state),
            _dtype(self.state_ancestors),
            _dtype(self.unconditional),
            self.unconditional_stride,
            _dtype(self.scale),
            self.bound is None,
            self.seeds is None,
            self.size,
            self.channels is None,
            self.width,
            self.index_stride,
            self.clip,
        )

    def begin_anywhere(self) -> bool:
        """Whether a tensor that others made does not begin at a multiple of 16 bytes; what is new here always does."""
        begins = 0
        foreign = (self.state, self.state_ancestors, self.unconditional, self.scale, self.row_index)
        for tensor in (*self.inputs, *self.ancestors, *foreign):
            if tensor is not None:
                begins |= tensor.data_ptr()
        return begins % 16 != 0


def triton_pass(operands: Operands, layout: CallLayout) -> Results:
    """One call by the kernel."""
    sample = operands.sample
    form = _form(sample.shape, sample.stride())
    if form is None:
        sample = sample.contiguous()
        form = _form(sample.shape, sample.stride())
        assert form is not None
    batch, size, order, strides, is_dense = form
    dtype, wide = sample.dtype, accumulation_dtype(sample.dtype)

    def empty(kind: torch.dtype) -> torch.Tensor:
        if is_dense:  # which is faster
            return torch.empty_like(sample) if kind is dtype else torch.empty_like(sample, dtype=kind)
        return torch.empty_strided(sample.shape, strides, dtype=kind, device=sample.device)

    def aligned(tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or a copy with its elements in the order of the sample's."""
        return tensor if tensor.stride()[1:] == strides[1:] else empty(tensor.dtype).copy_(tensor)

    noise, seeds, first_step = operands.noise, None, 0
    read: list[Kept] = [sample, operands.model_output]
    if layout.draws and isinstance(noise, NoiseToDraw) and order != _OTHER_ORDER:
        seeds, first_step = noise
    elif layout.draws:
        read.append(drawn(operands, wide))
    inputs, ancestors = _apart([*read, *operands.kept])
    input_strides = (size,) * len(inputs)
    if {t.stride() for t in inputs} != {strides}:
        inputs = [aligned(t) for t in inputs]
        input_strides = tuple([t.stride(0) for t in inputs])
    state = state_ancestors = unconditional = None
    if operands.state is not None:
        (state,), (state_ancestors,) = _apart([operands.state])
        state = aligned(state)
    if operands.unconditional is not None:
        unconditional = aligned(operands.unconditional)
    following, kept_now = empty(dtype), [empty(wide) for _ in layout.writes]
    new_state = None if wide is dtype else empty(wide)
    predicted = empty(dtype) if operands.clean else None
    outputs = [following, *kept_now] if predicted is None else [following, *kept_now, predicted]
    if size and batch:
        lanes, block = (4, LANE) if seeds is not None and order == _ROW_MAJOR else (1, _BLOCK)
        blocks = -(-size // (block * lanes))
        arguments = _Arguments(
            tuple(outputs),
            tuple(inputs),
            input_strides,
            tuple(ancestors),
            state,
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
            operands.table.shape[1],
            operands.index.ndim,
            operands.clip,
            block,
            lanes,
        )
        # A launch goes to the current device.
        with torch.cuda.device_of(sample):
            _launch((batch * blocks, 1, 1), arguments)  # a compiled kernel takes whole grids alone
    return Results(following, new_state, kept_now, predicted)


def _apart(read: Sequence[Kept]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The tensors, and the orders that their samples are to be read in."""
    tensors: list[torch.Tensor] = []
    ancestors: list[torch.Tensor | None] = []
    for kept in read:
        if isinstance(kept, Gathered):
            tensors.append(kept.tensor)
            ancestors.append(kept.ancestors)
        else:
            tensors.append(kept)
            ancestors.append(None)
    return tensors, ancestors


def _dtype(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _launch(grid: tuple[int, int, int], arguments: _Arguments) -> None:
    """Launches the kernel, past Triton's own search for it where that was done before."""
    if arguments.begin_anywhere():
        plan_call[grid](*arguments, enable_fp_fusion=True)
        return
    kinds = arguments.kinds()
    kernel = _COMPILED.get(kinds)
    if kernel is not None:
        kernel[grid](*arguments)
        return
    kernel = plan_call[grid](*arguments, enable_fp_fusion=True)
    if kernel is not None:  # an interpreter makes none
        _COMPILED[kinds] = kernel


class _Form(NamedTuple):
    """Where the elements of samples are in memory.

    Attributes:
        batch: number of samples.
        size: number of elements of each.
        order: ``_ROW_MAJOR``, the number of channels where they come last in memory, or ``_OTHER_ORDER``.
        strides: of samples that follow each other.
        is_dense: whether these do.
    """

    batch: int
    size: int
    order: int
    strides: tuple[int, ...]
    is_dense: bool


@functools.lru_cache(1024)
def _form(shape: torch.Size, strides: tuple[int, ...]) -> _Form | None:
    """The form of samples; ``None`` where the elements of one do not lie side by side."""
    dims = range(1, len(shape))
    expected = 1
    for dim in sorted(dims, key=lambda d: (strides[d], shape[d])):
        if shape[dim] != 1 and strides[dim] != expected:
            return None
        expected *= max(shape[dim], 1)
    outermost = [dim for dim in sorted(dims, key=lambda d: -strides[d]) if shape[dim] > 1]
    order = _OTHER_ORDER
    if outermost == sorted(outermost):
        order = _ROW_MAJOR
    elif outermost == [*sorted(outermost[:-1]), 1]:
        order = shape[1]
    size = shape[1:].numel()
    dense = (size, *strides[1:])
    return _Form(shape[0], size, order, dense, dense == strides)
