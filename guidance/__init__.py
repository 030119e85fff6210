"""What steers a sampler: rewards, gradient guidance, populations of particles."""

from fewstep.samplers.guided import Guidance, GuidedRun, GuidedStep

from .corrector import FeynmanKacCorrector, GuidanceBranches
from .feynman_kac_scheduler import FeynmanKacScheduler, finite_variance_churn
from .feynman_kac_steering import FeynmanKacSteering
from .learned_value import LearnedValue, TransitionRecorder, Transitions, ValueNetwork, fit_value
from .masked import EnergyChoice, MaskedSampler, MaskedSVDD, sample_categorical
from .minority import MinorityGuidance, NoisyClassifier, SelfMinorityGuidance
from .minority_classifier import MinorityClassifier
from .minority_scores import (
    MinorityClasses,
    absolute_distance,
    feature_distance,
    minority_scores,
    squared_distance,
)
from .noise_search import NoiseSearch, SearchResult, SearchRound
from .path_search import PathSearch
from .populations import SCHEMES, Population, effective_sample_size, resample
from .potentials import Potential, RewardTilt
from .random_search import RandomSearch
from .rewards import (
    Reward,
    brightness,
    class_log_probability,
    clip_score,
    compressibility,
    decoder_of,
    metric_reward,
)
from .svdd import SVDD, PosteriorMeanValue
from .tree_sampling import DiffusionTreeSampling, DiffusionTreeSearch
from .verifiers import VerifierEnsemble
from .zero_order_search import ZeroOrderSearch

__all__ = [
    "SCHEMES",
    "SVDD",
    "DiffusionTreeSampling",
    "DiffusionTreeSearch",
    "EnergyChoice",
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
    "MinorityClasses",
    "MinorityClassifier",
    "MinorityGuidance",
    "NoiseSearch",
    "NoisyClassifier",
    "PathSearch",
    "Population",
    "PosteriorMeanValue",
    "Potential",
    "RandomSearch",
    "Reward",
    "RewardTilt",
    "SearchResult",
    "SearchRound",
    "SelfMinorityGuidance",
    "TransitionRecorder",
    "Transitions",
    "ValueNetwork",
    "VerifierEnsemble",
    "ZeroOrderSearch",
    "absolute_distance",
    "brightness",
    "class_log_probability",
    "clip_score",
    "compressibility",
    "decoder_of",
    "effective_sample_size",
    "feature_distance",
    "finite_variance_churn",
    "fit_value",
    "metric_reward",
    "minority_scores",
    "resample",
    "sample_categorical",
    "squared_distance",
]
