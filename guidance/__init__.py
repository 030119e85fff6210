"""What steers a sampler: rewards, gradient guidance, populations of particles."""

from fewstep.samplers.guided import Guidance, GuidedRun, GuidedStep

from .corrector import FeynmanKacCorrector, GuidanceBranches
from .feynman_kac import FeynmanKacSteering
from .learned_value import LearnedValue, TransitionRecorder, Transitions, ValueNetwork, fit_value
from .masked import MaskedSampler, MaskedSVDD, sample_categorical
from .populations import SCHEMES, Population, effective_sample_size, resample
from .potentials import Potential, RewardTilt
from .rewards import (
    Reward,
    brightness,
    class_log_probability,
    clip_score,
    compressibility,
    decoder_of,
    metric_reward,
)
from .scheduler import FeynmanKacScheduler, finite_variance_churn
from .svdd import SVDD, PosteriorMeanValue

__all__ = [
    "SCHEMES",
    "SVDD",
    "FeynmanKacCorrector",
    "FeynmanKacScheduler",
    "FeynmanKacSteering",
    "Guidance",
    "GuidanceBranches",
    "GuidedRun",
    "GuidedStep",
    "LearnedValue",
    "MaskedSVDD",
    "MaskedSampler",
    "Population",
    "PosteriorMeanValue",
    "Potential",
    "Reward",
    "RewardTilt",
    "TransitionRecorder",
    "Transitions",
    "ValueNetwork",
    "brightness",
    "class_log_probability",
    "clip_score",
    "compressibility",
    "decoder_of",
    "effective_sample_size",
    "finite_variance_churn",
    "fit_value",
    "metric_reward",
    "resample",
    "sample_categorical",
]
