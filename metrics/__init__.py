"""Measures of generated images: features, the Frechet distance, the inception score, agreement with labels, rarity."""

from .artifacts import STABLE_DIFFUSION_LATENTS, ChannelNormalization, magnitude_score
from .classifier import DigitsClassifier
from .frechet import frechet_distance
from .mixture import GaussianMixture, GuidedPair
from .rarity import average_knn_distance, local_outlier_factor, rarity_score
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
    "average_knn_distance",
    "class_agreement",
    "digits_statistics",
    "frechet_distance",
    "inception_score",
    "local_outlier_factor",
    "magnitude_score",
    "rarity_score",
]
