"""diffusers' own schedulers in all the settings that suit few network calls, to take the best of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

_UNIFORM = ("trailing", "linspace", "leading")
_RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_SOLVERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("DDIMScheduler", {"clip_sample": False}),
    *(
        ("DPMSolverMultistepScheduler", {**solver, "final_sigmas_type": ending})
        for solver in (
            {"solver_order": 2},
            {"solver_order": 2, "solver_type": "heun"},
            {"solver_order": 3},
        )
        for ending in ("zero", "sigma_min")
    ),
    ("DPMSolverSinglestepScheduler", {"solver_order": 2, "lower_order_final": True}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}),
    ("DEISMultistepScheduler", {"solver_order": 2}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    *(
        ("UniPCMultistepScheduler", {"solver_order": order, "solver_type": kind})
        for order in (2, 3)
        for kind in ("bh1", "bh2")
    ),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("LMSDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
)


@dataclass(frozen=True)
class Rival:
    """A scheduler of diffusers with options.

    Attributes:
        name: class and options, for people.
        scheduler: of the model.
        steps: what to ask it for.
    """

    name: str
    scheduler: Any
    steps: int


def rivals(config: Mapping[str, Any], calls: int) -> Iterator[Rival]:
    """All that make exactly so many network calls.

    Args:
        config: noise schedule and prediction type.
        calls: of the network.
    """
    for solver, options in _SOLVERS:
        cls = getattr(diffusers, solver)
        known = inspect.signature(cls).parameters
        model = {key: value for key, value in config.items() if key in known}
        for times in _times(known):
            chosen = {**options, **times}
            try:
                scheduler = cls(**{**model, **chosen})
                steps = next((n for n in range(1, calls + 1) if _calls(scheduler, n) == calls), None)
            except (ValueError, IndexError):  # what diffusers itself refuses
                continue
            if steps is not None:
                told = " ".join(f"{key}={value}" for key, value in chosen.items())
                yield Rival(f"{solver} {told}", scheduler, steps)


def _times(known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for spacing in _UNIFORM:
        if "timestep_spacing" in known:
            yield {"timestep_spacing": spacing}
    for respacing in _RESPACINGS:
        if respacing in known:
            yield {respacing: True, **({"timestep_spacing": "trailing"} if "timestep_spacing" in known else {})}


def _calls(scheduler: Any, steps: int) -> int:
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)
