"""Which backend executes a run, and the one that makes a pass of each call."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..noise import NoiseToDraw
from ..rows import GuidedOutput, Thresholding
from .compiled import compiled_pass, missing_compiler
from .operands import Kept, Operands, Results, guided, widened
from .table import HEAD, CallLayout, PlanTable

BACKENDS = ("torch", "compile", "triton")
VARIABLE = "FEWSTEP_BACKEND"

_MOST_ELEMENTS = 2**31 - 2**12
"""Of a sample: below the largest int32 by more than a program of the kernel does."""

Pass = Callable[[Operands, CallLayout], Results]


def check_backend(name: str | None) -> str | None:
    """The backend that was asked for, by an argument or else by the environment.

    Raises:
        ValueError: an unknown name.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; use one of {', '.join(BACKENDS)}, or None to have it chosen")
    if name is None:
        name = os.environ.get(VARIABLE) or None
        if name is not None and name not in BACKENDS:
            raise ValueError(
                f"{VARIABLE} is {name!r} in the environment; set it to {' or '.join(BACKENDS)}, or unset it"
            )
    return name


def pass_for(asked: str | None, device: torch.device) -> Pass | None:
    """What makes a pass of each call on a device, or ``None`` where torch's operations serve one by one.

    Args:
        asked: the checked backend.
        device: of the samples.

    Raises:
        ValueError: Triton or a compiled loop was asked for and what it takes is not there, or Triton for a device that
            it does not know.
    """
    if asked == "torch" or (asked is None and device.type != "cuda"):
        return None
    if asked == "compile":
        missing = missing_compiler(device)
        if missing:
            raise ValueError(f'backend "compile": {missing}')
        return compiled_pass
    missing = _missing()
    if asked is None:
        if missing:
            _warn(missing)
            return None
    elif missing:
        raise ValueError(f'backend "triton": {missing}')
    elif device.type != "cuda" and not _interpreted():
        raise ValueError(
            f'backend "triton" needs samples on a CUDA device, not on {device.type}; set TRITON_INTERPRET=1 before '
            "Python starts to interpret it there, slowly"
        )
    from .launch import triton_pass

    return triton_pass


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'fewstep[cuda]'"
    import triton

    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    if (major, minor) < (3, 3):
        return f"triton {triton.__version__} has no tuples as arguments; it takes 3.3 or later, which torch 2.7 brings"
    return None


@functools.cache
def _warn(missing: str) -> None:
    warnings.warn(f"steps on CUDA run as separate torch operations: {missing}", RuntimeWarning, stacklevel=6)


def _interpreted() -> bool:
    import triton

    return bool(
        triton.knobs.runtime.interpret if hasattr(triton, "knobs") else os.environ.get("TRITON_INTERPRET") == "1"
    )


class FusedRows:
    """Executes compiled calls in one pass each.

    Args:
        table: of the plan.
        thresholding: of the predicted clean sample.
        one_pass: the kernel, or ``torch_pass``.
        device: of the samples.
        dtype: of accumulation.
    """

    def __init__(
        self,
        table: PlanTable,
        thresholding: Thresholding | None,
        one_pass: Pass,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._layouts, self._thresholding, self._pass, self._dtype = table.layouts, thresholding, one_pass, dtype
        # The copy waits for nothing: its source is not pinned, so it was read when the call returns.
        self._numbers = torch.from_numpy(table.numbers).to(dtype).to(device, non_blocking=True)
        # Each at a multiple of 16 bytes, as all tensors of a fast launch are.
        indices = torch.arange(len(table.layouts), dtype=torch.int32, device=device)
        self._indices = indices[:, None].repeat(1, 4)[:, 0].unbind()
        self._scale: tuple[float, torch.Tensor] | None = None

    def load(self, table: PlanTable) -> None:
        """Takes the numbers of another plan of the same layouts, in the place of those before."""
        self._numbers.copy_(torch.from_numpy(table.numbers), non_blocking=True)

    def execute(
        self,
        position: int,
        values: list[Any],
        state: Kept | None,
        sample: torch.Tensor,
        model_output: torch.Tensor | GuidedOutput,
        noise: torch.Tensor | NoiseToDraw | None,
        *,
        clean: bool,
    ) -> Results:
        """Executes a call.

        Args:
            position: of the call.
            values: the tensors in the slots; brought up to date.
            state: the sample before rounding, where the last step knows it.
            sample: what the network saw.
            model_output: what it returned.
            noise: standard normal, where the call reads it.
            clean: whether the predicted clean sample is wanted.
        """
        layout = self._layouts[position]
        unconditional = scale = None
        if isinstance(model_output, GuidedOutput):
            scale, unconditional = self._scale_of(model_output.scale), model_output.unconditional
            model_output = model_output.conditional
        operands = Operands(
            sample=sample,
            model_output=model_output,
            unconditional=unconditional,
            scale=scale,
            noise=noise,
            kept=[values[slot] for slot in layout.reads],
            state=state,
            clip=self._thresholding is not None,
            bound=None,
            table=self._numbers,
            index=self._indices[position],
            clean=clean,
        )
        if self._thresholding is not None and self._thresholding.max_value != 1.0:
            p, q = self._numbers[position, :HEAD].unbind()
            operands.bound = self._thresholding.bound(widened(operands) * p + guided(operands) * q)
        results = self._pass(operands, layout)
        for slot, tensor in zip(layout.writes, results.kept, strict=True):
            values[slot] = tensor
        for slot in layout.drop:
            values[slot] = None
        return results

    def _scale_of(self, scale: float | torch.Tensor) -> torch.Tensor:
        """The guidance scale on the device."""
        if isinstance(scale, torch.Tensor):
            return scale.to(self._numbers.device, non_blocking=True)
        if self._scale is None or self._scale[0] != scale:
            self._scale = scale, torch.full((), scale, dtype=self._dtype, device=self._numbers.device)
        return self._scale[1]


def serves(sample: torch.Tensor, *others: Any) -> bool:
    """Whether a pass can take these: it knows no float64 and no gradients, and numbers elements in 32 bits."""
    grad = torch.is_grad_enabled()
    for tensor in (sample, *others):
        if isinstance(tensor, torch.Tensor) and (tensor.dtype is torch.float64 or (grad and tensor.requires_grad)):
            return False
    return sample.numel() < _MOST_ELEMENTS * max(len(sample), 1)
