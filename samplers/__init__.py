"""Diffusion samplers as drop-in diffusers schedulers.

``pipe.scheduler = UniPCScheduler.from_config(pipe.scheduler.config)`` is the whole installation. Importing this
package is also what lets ``from_pretrained`` load pipelines that were saved with these schedulers.
"""

import typing

from .cascade import CascadeRegression
from .compensation import RatioSearch, search_ratios, search_ratios_over
from .dc_solver import DCSolverScheduler
from .deis import DEISScheduler
from .denoiser import Denoiser
from .dpm_solver import DPMSolverPPScheduler
from .ghvb import GHVBScheduler
from .heavy_ball import HeavyBallScheduler
from .loop import sample
from .mean_reverting import MeanRevertingSchedule
from .mr_sampler import MRSamplerScheduler
from .plan import Call, Plan, Row
from .pndm import FPNDMScheduler
from .registry import SAMPLERS, Sampler, register
from .schedule import DiscreteVPSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from .scheduler import PlanScheduler, PlanSchedulerOutput
from .stability import stability_limit
from .time_shift import TimeShiftScheduler
from .trajectory import Trajectory, fine_trajectory
from .unipc import UniPCScheduler

if typing.TYPE_CHECKING:
    from .denoiser_branched import BranchedDenoiser
    from .denoiser_driven import DrivenDenoiser
    from .restoration import RestorationPipeline
    from .stitch import StitchedDenoiser

__all__ = [
    "SAMPLERS",
    "BranchedDenoiser",
    "Call",
    "CascadeRegression",
    "DCSolverScheduler",
    "DEISScheduler",
    "DPMSolverPPScheduler",
    "Denoiser",
    "DiscreteVPSchedule",
    "DrivenDenoiser",
    "EDMSchedule",
    "FPNDMScheduler",
    "FlowSchedule",
    "GHVBScheduler",
    "HeavyBallScheduler",
    "MRSamplerScheduler",
    "MeanRevertingSchedule",
    "NoiseSchedule",
    "Plan",
    "PlanScheduler",
    "PlanSchedulerOutput",
    "RatioSearch",
    "RestorationPipeline",
    "Row",
    "Sampler",
    "StitchedDenoiser",
    "TimeShiftScheduler",
    "Trajectory",
    "UniPCScheduler",
    "fine_trajectory",
    "register",
    "sample",
    "search_ratios",
    "search_ratios_over",
    "stability_limit",
]


def __getattr__(name: str) -> typing.Any:
    # diffusers' networks and pipelines bring accelerate and transformers, which schedulers do without. A pipeline that
    # loads a stitched denoiser asks for both names.
    if name in ("ModelMixin", "StitchedDenoiser"):
        from . import stitch

        return getattr(stitch, name)
    if name == "RestorationPipeline":
        from .restoration import RestorationPipeline

        return RestorationPipeline
    if name == "BranchedDenoiser":
        from .denoiser_branched import BranchedDenoiser

        return BranchedDenoiser
    if name == "DrivenDenoiser":
        from .denoiser_driven import DrivenDenoiser

        return DrivenDenoiser
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
