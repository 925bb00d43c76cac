"""How good samples are: distances between sets of features, and a classifier's verdict."""

from flowturbo_jax.metrics.classifier import DigitsClassifier
from flowturbo_jax.metrics.frechet import Moments, Statistics, frechet_distance, statistics
from flowturbo_jax.metrics.pixels import PIXELS, FeatureNetwork, pixel_features

__all__ = [
    "PIXELS",
    "DigitsClassifier",
    "FeatureNetwork",
    "Moments",
    "Statistics",
    "frechet_distance",
    "pixel_features",
    "statistics",
]
