"""Measures of generated images: features, the Frechet distance, the inception score, agreement with labels."""

from .artifacts import STABLE_DIFFUSION_LATENTS, ChannelNormalization, magnitude_score
from .classifier import DigitsClassifier
from .frechet import frechet_distance
from .mixture import GaussianMixture, GuidedPair
from .scores import Agreement, InceptionScore, class_agreement, inception_score
from .statistics import FeatureStatistics, ReferenceStatistics, digits_statistics

__all__ = [
    "STABLE_DIFFUSION_LATENTS",
    "Agreement",
    "ChannelNormalization",
    "DigitsClassifier",
    "FeatureStatistics",
    "GaussianMixture",
    "GuidedPair",
    "InceptionScore",
    "ReferenceStatistics",
    "class_agreement",
    "digits_statistics",
    "frechet_distance",
    "inception_score",
    "magnitude_score",
]
