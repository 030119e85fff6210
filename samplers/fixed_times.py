"""Schedulers whose times are part of what was found for a model, and stand in the config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .grid import Grid
from .options import RESPACINGS
from .plan import Plan
from .scheduler import Floats, PlanScheduler

# What the config says about times must not stand in the way of those that were found.
_PLAIN: Mapping[str, Any] = {
    **dict.fromkeys(RESPACINGS, False),
    "timestep_spacing": "trailing",
    "use_dynamic_shifting": False,
    "flow_shift": 1.0,
    "shift_terminal": None,
    "lambda_min_clipped": -math.inf,
    "fractional_timesteps": True,
}


class FixedTimesScheduler(PlanScheduler):
    """Base of schedulers that know their own times; the config's options of times have no effect.

    A subclass gives ``_times_of_run``, and ``_made_for`` and ``_remedy`` for the message that refuses other numbers.
    """

    _made_for: int
    """Network calls of a run."""
    _remedy: str
    """How to get a run of another number of calls."""

    def _times_of_run(self) -> Grid:
        """The times."""
        raise NotImplementedError

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Floats | None = None,
        mu: float | None = None,
        timesteps: Floats | None = None,
    ) -> None:
        """Takes the times from the config and compiles the plan.

        Args:
            num_inference_steps: number of network calls, which must be the one that was fitted; may be omitted.
            device: where ``self.timesteps`` goes.
            sigmas: those that some flow pipelines always hand over; only their number counts, as with re-spacings.
            mu: has no effect.
            timesteps: must be left out.

        Raises:
            ValueError: custom timesteps, or another number of calls.
        """
        if timesteps is not None:
            raise ValueError("timesteps are part of this scheduler; leave them out, or use another scheduler")
        wanted = num_inference_steps if sigmas is None else len(sigmas)
        if wanted is not None and wanted != self._made_for:
            raise ValueError(
                f"num_inference_steps {wanted}: this scheduler was made for {self._made_for} network calls; "
                f"use {self._made_for}, or {self._remedy}"
            )
        super().set_timesteps(self._times_of_run().steps, device)
        self.num_inference_steps = self._made_for

    def _options(self, steps: int | None) -> dict[str, Any]:
        return {**super()._options(steps), **_PLAIN}

    def _compile(self, first: int) -> Plan:
        self._grid = self._times_of_run()
        return super()._compile(first)
