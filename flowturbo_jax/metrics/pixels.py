"""Feature networks, and the simplest of them: the pixels themselves."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float64

from flowturbo_jax.interfaces import InputError


class FeatureNetwork(NamedTuple):
    """What turns images into features, with what a protocol card must say about it.

    Attributes:
      name: what a card calls it.
      fingerprint: sha256 of what defines it, in hexadecimal.
      extract: `(images [N, H, W, C] uint8) -> features [N, D]`.
    """

    name: str
    fingerprint: str
    extract: Callable[[jax.Array | np.ndarray], np.ndarray]


def pixel_features(images: jax.Array | np.ndarray) -> Float64[np.ndarray, "n d"]:
    """Lays every image out as a vector of pixels in [-1, 1].

        feature = byte / 127.5 - 1

    A Fréchet distance between them compares pixel means and covariances: enough for small images
    of one kind such as the digits, no measure of how natural a photograph looks.

    Args:
      images: `[N, H, W, C]` uint8.

    Returns:
      `[N, H W C]` float64.

    Raises:
      InputError: the images are not such an array.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise InputError(
            f"features are taken from [N, H, W, C] uint8 images, got {images.shape} "
            f"{images.dtype}: convert pixels in [-1, 1] with to_uint8."
        )
    return rearrange(images, "n h w c -> n (h w c)") / 127.5 - 1.0


PIXELS = FeatureNetwork(
    name="pixels in [-1, 1]",
    fingerprint=hashlib.sha256(b"byte / 127.5 - 1, n h w c -> n (h w c)").hexdigest(),
    extract=pixel_features,
)
