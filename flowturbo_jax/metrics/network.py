"""What every metric reads: features of images, and the networks that give them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from flowturbo_jax.interfaces import InputError


class Features(NamedTuple):
    """Features of N images.

    Attributes:
      pooled: `[N, D]` float32 or float64, one vector for each image.
      spatial: `[N, S]` float32, a vector that keeps where in the image things are; or None.
    """

    pooled: np.ndarray
    spatial: np.ndarray | None = None


class FeatureNetwork(NamedTuple):
    """What turns images into features, with what a protocol card must say about it.

    Attributes:
      name: what a card calls it.
      fingerprint: sha256 of what defines it, in hexadecimal.
      extract: `(images [N, H, W, C] uint8) -> Features`.
      probabilities: `(pooled [N, D]) -> [N, K]` float64, of K classes, for the Inception Score; or
        None.
      dimensions: D, where it does not depend on the image; None otherwise.
    """

    name: str
    fingerprint: str
    extract: Callable[[jax.Array | np.ndarray], Features]
    probabilities: Callable[[np.ndarray], np.ndarray] | None = None
    dimensions: int | None = None


def byte_images(images: jax.Array | np.ndarray) -> np.ndarray:
    """The images as a numpy array, if features can be taken from them.

    Args:
      images: `[N, H, W, C]` uint8.

    Raises:
      InputError: they are not such an array.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise InputError(
            f"features are taken from [N, H, W, C] uint8 images, got {images.shape} "
            f"{images.dtype}: convert pixels in [-1, 1] with to_uint8."
        )
    return images


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of classes, in float64.

        p = exp(logit) / sum of exp(logits)

    Args:
      logits: `[N, K]`, any real dtype.

    Returns:
      `[N, K]` float64.
    """
    logits = np.asarray(logits).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
