"""A caller's own loop over a scheduler, with an elementwise stand-in for the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, SchedulerMixin

from fewstep.samplers import (
    SAMPLERS,
    DEISScheduler,
    DPMSolverPPScheduler,
    PlanScheduler,
    TimeShiftScheduler,
    UniPCScheduler,
)
from pipelines.tiny import flow_euler, pndm, seeded

CLASSES: list[Any] = [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler]
CONFIGS: dict[str, Callable[[], SchedulerMixin]] = {
    "vp": pndm,
    "flow": flow_euler,
    "edm": EDMDPMSolverMultistepScheduler,
}
LEVELS = {"vp": [10.0, 3.0, 1.0, 0.3], "flow": [0.9, 0.6, 0.3, 0.1], "edm": [40.0, 10.0, 1.0, 0.1]}
STOCHASTIC = [name for name, entry in SAMPLERS.items() if entry.stochastic]
SHIFTED = [name for name, entry in SAMPLERS.items() if issubclass(entry.scheduler, TimeShiftScheduler)]
"""The network hears other times than those of the samples, chosen by the whole batch."""
STEPS = 6

every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_kind = pytest.mark.parametrize("kind", ["vp", "flow"])
every_kind_and_edm = pytest.mark.parametrize("kind", CONFIGS)


def build(name: str, kind: str, steps: int | None = STEPS, **options: Any) -> PlanScheduler:
    scheduler = SAMPLERS[name].build(CONFIGS[kind]().config, **options)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def network(x: torch.Tensor) -> torch.Tensor:
    """Stands for a model: nonlinear, and each number by itself, so that batches do not mix."""
    return torch.tanh(1.5 * x) * 0.5


def predict(scheduler: PlanScheduler, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return network(scheduler.scale_model_input(x, t))


def start(batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return seeded(batch, 4, 4, 4, seed=1).to(dtype)


def run(
    scheduler: PlanScheduler, x: torch.Tensor, begin: int = 0, end: int | None = None, seed: int = 3
) -> torch.Tensor:
    """The loop of a pipeline, with the noise of every step fixed."""
    for k, t in list(enumerate(scheduler.timesteps))[begin:end]:
        noise = seeded(*x.shape, seed=seed + k).to(x.dtype)
        x = scheduler.step(predict(scheduler, x, t), t, x, variance_noise=noise, return_dict=False)[0]
    return x
