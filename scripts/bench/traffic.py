"""How fast memory is, and how much of it a step must move."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from math import prod

import torch

from fewstep.samplers import Plan
from fewstep.samplers.fused.table import PlanTable
from fewstep.samplers.rows import compiled

_COPIED = {"cpu": 2**25, "cuda": 2**28}
"""Bytes that are copied to measure a device: beyond its caches."""

_COPIES = 20
"""In a row, as steps run: launching them and waiting for the last is no part of the bandwidth."""


def synchronise(device: str) -> None:
    """Waits for what a device was told to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: str, seconds: float, *, least: int = 3) -> list[float]:
    """Times a piece of work again and again, the device's part in it too.

    Args:
        work: what is done.
        device: where.
        seconds: how long, at least.
        least: how often, at least.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        synchronise(device)
        clock = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - clock)
    return times


def copy_bandwidth(device: str, seconds: float = 0.2) -> float:
    """Bytes a second that a copy reads and writes; of the device's fastest copies, since others may share it."""
    source = torch.ones(_COPIED[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)

    def copy() -> None:
        for _ in range(_COPIES):
            target.copy_(source)

    times = sorted(seconds_of(copy, device, seconds, least=5))
    return _COPIES * 2 * 4 * source.numel() / statistics.median(times[: max(1, len(times) // 4)])


def bytes_of_step(plan: Plan, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
    """Bytes that a step must move on average: each tensor that it reads once, each that it writes once.

    Args:
        plan: of a run, whose predicted clean samples nobody wants.
        shape: of the sample.
        dtype: of sample and model output; what is kept between steps, and noise, is float32.
    """
    calls, slots = compiled(plan, fold=True)
    layouts = PlanTable(calls, slots, clip=False).layouts
    own = dtype.itemsize
    # Of half precision the unrounded sample is kept too: read by all but the first, written by all.
    state = 0.0 if own >= 4 else 4.0 * (2 * len(layouts) - 1)
    moved = sum(3 * own + 4 * (layout.columns - 2 + len(layout.writes)) for layout in layouts) + state
    return prod(shape) * moved / len(layouts)
