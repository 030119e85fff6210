"""Measures of generated images: features by name, distances, scores and neighbours of features, with intervals."""

from .artifacts import STABLE_DIFFUSION_LATENTS, ChannelNormalization, magnitude_score
from .classifier import DigitsClassifier
from .evaluation import IMAGE_METRICS, ImageMetrics
from .extractors import EXTRACTORS, FeatureExtractor, feature_extractor
from .extrapolation import frechet_distance_infinity
from .frechet import FrechetDistance, class_frechet_distances, frechet_distance
from .images import images_fingerprint, reference_images
from .inception import InceptionV3, convert_inception
from .intervals import Estimate, jackknife, jackknife_groups
from .kernel import kernel_distance
from .manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from .mixture import GaussianMixture, GuidedPair
from .rarity import average_knn_distance, local_outlier_factor, rarity_score
from .reference import compute_reference
from .restoration import RestorationScores, restoration_scores
from .scores import Agreement, InceptionScore, class_agreement, inception_score
from .statistics import FeatureStatistics, ReferenceStatistics, digits_statistics

__all__ = [
    "EXTRACTORS",
    "IMAGE_METRICS",
    "STABLE_DIFFUSION_LATENTS",
    "Agreement",
    "ChannelNormalization",
    "DensityCoverage",
    "DigitsClassifier",
    "Estimate",
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetDistance",
    "GaussianMixture",
    "GuidedPair",
    "ImageMetrics",
    "InceptionScore",
    "InceptionV3",
    "PrecisionRecall",
    "ReferenceStatistics",
    "RestorationScores",
    "average_knn_distance",
    "class_agreement",
    "class_frechet_distances",
    "compute_reference",
    "convert_inception",
    "density_coverage",
    "digits_statistics",
    "feature_extractor",
    "frechet_distance",
    "frechet_distance_infinity",
    "images_fingerprint",
    "inception_score",
    "jackknife",
    "jackknife_groups",
    "kernel_distance",
    "local_outlier_factor",
    "magnitude_score",
    "precision_recall",
    "rarity_score",
    "reference_images",
    "restoration_scores",
]
