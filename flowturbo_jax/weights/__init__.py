"""Everybody's weight files, read without PyTorch and without running anything they hold."""

from flowturbo_jax.weights.files import Weights, open_folder, open_weights, sha256_of
from flowturbo_jax.weights.tensor import Tensor

__all__ = ["Tensor", "Weights", "open_folder", "open_weights", "sha256_of"]
