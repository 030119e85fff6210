"""Diffusion samplers as drop-in diffusers schedulers.

``pipe.scheduler = UniPCScheduler.from_config(pipe.scheduler.config)`` is the whole installation. Importing this
package is also what lets ``from_pretrained`` load pipelines that were saved with these schedulers.
"""

from .deis import DEISScheduler
from .dpm_solver import DPMSolverPPScheduler
from .plan import Call, Plan, Row
from .registry import SAMPLERS, Sampler, register
from .schedule import DiscreteVPSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from .scheduler import PlanScheduler, PlanSchedulerOutput
from .unipc import UniPCScheduler

__all__ = [
    "SAMPLERS",
    "Call",
    "DEISScheduler",
    "DPMSolverPPScheduler",
    "DiscreteVPSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "Plan",
    "PlanScheduler",
    "PlanSchedulerOutput",
    "Row",
    "Sampler",
    "UniPCScheduler",
    "register",
]
