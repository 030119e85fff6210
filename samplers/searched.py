"""Searched solver schedules, S^3 (arXiv 2312.07243), as a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .builder import PlanBuilder
from .fixed_times import FixedTimesScheduler
from .grid import Grid
from .options import ScheduleConfig, scheduler_options
from .plan import Plan
from .rows import GuidedOutput
from .scheduler import Floats, PlanSchedulerOutput
from .usf.decisions import SolverSchedule
from .usf.rows import write_schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SearchedScheduler(FixedTimesScheduler):
    """A run whose times and solver were chosen step by step: USF with a schedule of S^3 (arXiv 2312.07243).

    ``search_schedule`` finds the decisions for a model, a guidance scale and a number of network calls;
    ``known_schedule`` gives those of known solvers, ``released_schedule`` reads the authors'. They are kept in the
    config, with the times, and are refused for another number of calls. The config's options of times (spacings,
    shifts, endings) have no effect.

    Args:
        decisions: ``SolverSchedule``, or its ``to_dict()``.
        schedule: options of ``ScheduleConfig``.

    Raises:
        ValueError: no or damaged decisions, or decisions for another kind of model.
    """

    _remedy = "search a schedule for that number with search_schedule"

    @scheduler_options()
    def __init__(
        self,
        *,
        decisions: SolverSchedule | Mapping[str, Any] | None = None,
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        if decisions is None:
            raise ValueError(
                "decisions are missing: what a SearchedScheduler does is searched for a model; find them with "
                "search_schedule, or take those of a known solver with known_schedule"
            )
        if not isinstance(decisions, SolverSchedule):
            decisions = SolverSchedule.from_dict(decisions)
        self.register_to_config(decisions=decisions.to_dict())
        self.solver_schedule = decisions
        self._made_for = decisions.calls
        self._setup()
        self._times_of_run()
        self._scaled: torch.Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Floats | None = None,
        mu: float | None = None,
        timesteps: Floats | None = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._scaled = None

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The network's input; after an analytic first step its first call sees the sample of the second node."""
        if self.solver_schedule.afs == "none" or self.schedule.kind == "edm":
            return super().scale_model_input(sample, timestep)
        if self._plan is None or timestep is None:
            raise ValueError("scale_model_input after an analytic step needs set_timesteps before it, and the timestep")
        if self._step_index is None:
            self._step_index = self._first_index(timestep)
        scale = self._plan.calls[self._step_index].in_scale
        self._scaled = sample if scale == 1.0 else sample * scale
        return self._scaled

    def step(
        self,
        model_output: torch.Tensor | GuidedOutput,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> PlanSchedulerOutput | tuple[torch.Tensor]:
        if self.solver_schedule.afs != "none" and self.schedule.kind != "edm":
            if self._scaled is None:
                raise ValueError(
                    "afs needs scale_model_input before every step, which this pipeline does not call; "
                    "search a schedule without an analytic first step for it"
                )
            assert self._plan is not None
            assert self._step_index is not None
            scale = self._plan.calls[self._step_index].in_scale
            if sample is self._scaled and scale != 1.0:
                # Some pipelines (DiT) go on with what the network saw.
                sample = sample / scale
            self._scaled = None
        return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)

    @property
    def is_plain(self) -> bool:
        # What step adds finds out whether a pipeline went on with the scaled sample.
        return self._guidance is None

    def _times_of_run(self) -> Grid:
        return self.solver_schedule.grid(self.schedule, fractional=self.config.fractional_timesteps)

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        return write_schedule(plan, self.solver_schedule)
