"""The simplest features: the pixels themselves."""

import hashlib

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float64

from flowturbo_jax.metrics.network import FeatureNetwork, Features, byte_images


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
    return rearrange(byte_images(images), "n h w c -> n (h w c)") / 127.5 - 1.0


def _extract(images: jax.Array | np.ndarray) -> Features:
    return Features(pixel_features(images))


PIXELS = FeatureNetwork(
    name="pixels in [-1, 1]",
    fingerprint=hashlib.sha256(b"byte / 127.5 - 1, n h w c -> n (h w c)").hexdigest(),
    extract=_extract,
)
