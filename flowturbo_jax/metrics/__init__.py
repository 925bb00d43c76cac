"""How good samples are: distances between sets of features, and a classifier's verdict."""

from flowturbo_jax.metrics.classifier import DigitsClassifier
from flowturbo_jax.metrics.frechet import Moments, Statistics, frechet_distance, statistics
from flowturbo_jax.metrics.inception import inception_network
from flowturbo_jax.metrics.inception_score import inception_score, inception_score_of_probabilities
from flowturbo_jax.metrics.manifold import PrecisionRecall, precision_recall
from flowturbo_jax.metrics.network import FeatureNetwork, Features
from flowturbo_jax.metrics.pixels import PIXELS, pixel_features
from flowturbo_jax.metrics.reference import Reference, read_reference, write_reference

__all__ = [
    "PIXELS",
    "DigitsClassifier",
    "FeatureNetwork",
    "Features",
    "Moments",
    "PrecisionRecall",
    "Reference",
    "Statistics",
    "frechet_distance",
    "inception_network",
    "inception_score",
    "inception_score_of_probabilities",
    "pixel_features",
    "precision_recall",
    "read_reference",
    "statistics",
    "write_reference",
]
