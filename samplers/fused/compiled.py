"""The pass in torch's operations as one loop over memory, made by ``torch.compile``."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from .operands import Operands, Results, torch_pass
from .table import CallLayout

_NUMBERS = itertools.count()


def compiled_pass(operands: Operands, layout: CallLayout) -> Results:
    """One call by a loop that is compiled the first time."""
    o = operands
    loop = _loop(layout, o.clip, o.clean)
    return loop(
        o.sample, o.model_output, o.unconditional, o.scale, o.noise, [*o.kept], o.state, o.bound, o.table, o.index
    )


@functools.cache
def _loop(layout: CallLayout, clip: bool, clean: bool) -> Callable[..., Results]:
    def loop(
        sample: torch.Tensor,
        model_output: torch.Tensor,
        unconditional: Any,
        scale: Any,
        noise: Any,
        kept: list[Any],
        state: Any,
        bound: Any,
        table: torch.Tensor,
        index: torch.Tensor,
    ) -> Results:
        return torch_pass(
            Operands(sample, model_output, unconditional, scale, noise, kept, state, clip, bound, table, index, clean),
            layout,
        )

    # torch.compile counts compilations by the code object, and gives up after eight: every layout gets its own.
    code = loop.__code__.replace(co_name=f"loop_{next(_NUMBERS)}")
    return torch.compile(FunctionType(code, loop.__globals__, code.co_name, None, loop.__closure__))


def missing_compiler(device: torch.device) -> str | None:
    """What is to be done before loops can be compiled for a device, or ``None``."""
    if device.type != "cpu" or any(
        shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name
    ):
        return None
    return "there is no C++ compiler; install g++, or name one in CXX"
