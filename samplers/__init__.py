"""Diffusion samplers as drop-in diffusers schedulers.

``pipe.scheduler = UniPCScheduler.from_config(pipe.scheduler.config)`` is the whole installation. Importing this
package is also what lets ``from_pretrained`` load pipelines that were saved with these schedulers.
"""

import typing

from .cascade import CascadeRegression
from .compensation import RatioSearch, search_ratios, search_ratios_over
from .dc_solver import DCSolverScheduler
from .deis import DEISScheduler
from .denoisers.denoiser import Denoiser
from .dpm_solver import DPMSolverPPScheduler
from .fitting import FitStep, PlanFit, Problem, fit_plan, problem_of
from .ghvb import GHVBScheduler
from .guided import Guidance, GuidedRun, GuidedStep
from .heavy_ball import HeavyBallScheduler
from .learned import LearnedScheduler, LearnedTable
from .loop import sample
from .loop_graph import clear_graphs
from .mean_reverting import MeanRevertingSchedule
from .mr_sampler import MRSamplerScheduler
from .per_sample import DenoisingChain
from .plan import Call, Plan, Row
from .pndm import FPNDMScheduler
from .registry import SAMPLERS, Sampler, register
from .rows import GuidedOutput
from .schedule import DiscreteVPSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from .scheduler import PlanScheduler, PlanSchedulerOutput
from .searched import SearchedScheduler
from .stability import stability_limit
from .time_shift import TimeShiftScheduler
from .trajectory import Trajectory, fine_trajectory
from .unipc import UniPCScheduler
from .usf.archive import Evaluation
from .usf.decisions import Correction, Derivative, SolverSchedule, SolverStep
from .usf.evolution import ScheduleSearch, SearchSettings, search_schedule, trajectory_fitness
from .usf.known import KNOWN_SOLVERS, known_schedule, released_schedule
from .usf.mutation import MutationSettings
from .usf.ranking import RankingSettings

if typing.TYPE_CHECKING:
    from .denoisers.branched import BranchedDenoiser
    from .denoisers.driven import DrivenDenoiser
    from .restoration import RestorationPipeline
    from .stitch import StitchedDenoiser

__all__ = [
    "KNOWN_SOLVERS",
    "SAMPLERS",
    "BranchedDenoiser",
    "Call",
    "CascadeRegression",
    "Correction",
    "DCSolverScheduler",
    "DEISScheduler",
    "DPMSolverPPScheduler",
    "Denoiser",
    "DenoisingChain",
    "Derivative",
    "DiscreteVPSchedule",
    "DrivenDenoiser",
    "EDMSchedule",
    "Evaluation",
    "FPNDMScheduler",
    "FitStep",
    "FlowSchedule",
    "GHVBScheduler",
    "Guidance",
    "GuidedOutput",
    "GuidedRun",
    "GuidedStep",
    "HeavyBallScheduler",
    "LearnedScheduler",
    "LearnedTable",
    "MRSamplerScheduler",
    "MeanRevertingSchedule",
    "MutationSettings",
    "NoiseSchedule",
    "Plan",
    "PlanFit",
    "PlanScheduler",
    "PlanSchedulerOutput",
    "Problem",
    "RankingSettings",
    "RatioSearch",
    "RestorationPipeline",
    "Row",
    "Sampler",
    "ScheduleSearch",
    "SearchSettings",
    "SearchedScheduler",
    "SolverSchedule",
    "SolverStep",
    "StitchedDenoiser",
    "TimeShiftScheduler",
    "Trajectory",
    "UniPCScheduler",
    "clear_graphs",
    "fine_trajectory",
    "fit_plan",
    "known_schedule",
    "problem_of",
    "register",
    "released_schedule",
    "sample",
    "search_ratios",
    "search_ratios_over",
    "search_schedule",
    "stability_limit",
    "trajectory_fitness",
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
        from .denoisers.branched import BranchedDenoiser

        return BranchedDenoiser
    if name == "DrivenDenoiser":
        from .denoisers.driven import DrivenDenoiser

        return DrivenDenoiser
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
