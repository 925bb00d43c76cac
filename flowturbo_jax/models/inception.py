"""The Inception v3 that FID is measured with: images to features.

Source: Szegedy et al., arXiv 1512.00567; the network of pytorch-fid inception.py, which carries the
weights of Heusel et al. 2017 over from TensorFlow.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models.inception_blocks import BLOCKS, STEM, Branch, Conv, Pool

Pixels = Float[Array, "batch height width 3"]
Maps = Float[Array, "batch height width channels"]
NewMaps = Float[Array, "batch rows columns features"]

SIDE = 299  # pytorch-fid inception.py: every image is resized to it
NORM_EPSILON = 1e-3  # torchvision inception.py, BasicConv2d
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7  # its first branch: ADM's mixed_6/conv:0[..., :7]
FEATURES = 2048
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
MAX_CLASSES = 65536  # far above any model; a wrong config would hang instead


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """Hyper-parameters of the network, validated at construction.

    Attributes:
      num_classes: of the logits; FID's network has 1008, torchvision's other one 1000.
    """

    num_classes: int = 1008

    def __post_init__(self):
        if type(self.num_classes) is not int or not 1 <= self.num_classes <= MAX_CLASSES:
            raise InputError(
                f"Inception num_classes is {self.num_classes!r:.99}; it must be an integer in "
                f"1..{MAX_CLASSES}"
            )


class Activations(NamedTuple):
    """What the network says of images.

    Attributes:
      pool3: features that FID compares, `[B, 2048]` float32.
      spatial: features that sFID compares, `[B, 17, 17, 7]` float32.
      logits: of the classes, `[B, num_classes]` float32.
    """

    pool3: Float[Array, "batch features"]
    spatial: Maps
    logits: Float[Array, "batch classes"]


class Inception(nn.Module):
    """Inception v3 with stored batch statistics, as FID uses it.

    Attributes:
      config: the hyper-parameters.
      dtype: dtype of the convolutions; parameters are float32, and batch norm computes in it.
    """

    config: InceptionConfig = InceptionConfig()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Pixels) -> Activations:
        """Extracts features.

        Args:
          images: `[B, H, W, 3]` float32 in [0, 1], of any size: see `resized`.

        Returns:
          Features and logits.

        Source: pytorch-fid inception.py; `spatial` as FlowTurbo evaluation/inception.py takes it,
          for the ADM evaluator's "mixed_6/conv:0". The evaluator's TensorFlow graph resizes without
          half-pixel centres, so its features of images of another size differ.
        """
        with _numerics(self.dtype):
            x = (2 * resized(images) - 1).astype(self.dtype)
            h, spatial = _apply(STEM, x, self.dtype), None
            for name in BLOCKS:
                parts = MixedBlock(self.dtype, name=name)(h)
                if name == SPATIAL_BLOCK:
                    spatial = parts[0][..., :SPATIAL_CHANNELS].astype(jnp.float32)
                h = jnp.concatenate(parts, axis=-1)
            pool3 = jnp.mean(h, axis=(1, 2), dtype=jnp.float32)
            logits = nn.Dense(self.config.num_classes, dtype=self.dtype, name="fc")(pool3)
            return Activations(pool3, spatial, logits.astype(jnp.float32))

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Fresh parameters, a nested dict of float32: useful for their shapes alone."""
        return self.init(key, jnp.zeros((1, SIDE, SIDE, 3)))["params"]


def resized(images: Maps) -> NewMaps:
    """Images of 299 x 299, by bilinear interpolation between pixel centres.

    Without antialiasing, also where images shrink: of those more than twice as large, pixels are
    left out.

    Args:
      images: `[B, H, W, C]` float.

    Returns:
      `[B, 299, 299, C]`.

    Source: pytorch-fid inception.py, interpolate(mode="bilinear", align_corners=False).
    """
    shape = (images.shape[0], SIDE, SIDE, images.shape[3])
    return jax.image.resize(images, shape, "bilinear", antialias=False)


class MixedBlock(nn.Module):
    """The outputs of all branches of the block of `BLOCKS` that has this module's name."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> list[NewMaps]:
        return [_apply(branch, x, self.dtype) for branch in BLOCKS[self.name]]


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm by stored statistics, and ReLU."""

    conv: Conv
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        _, features, kernel, strides, padding = self.conv
        shape = (*kernel, x.shape[-1], features)
        weights = self.param("kernel", nn.initializers.lecun_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        mean = self.param("mean", nn.initializers.zeros, (features,))
        var = self.param("var", nn.initializers.ones, (features,))
        h = jax.lax.conv_general_dilated(
            x,
            weights.astype(self.dtype),
            (strides, strides),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        factor = scale * jax.lax.rsqrt(var + NORM_EPSILON)
        h = (h.astype(jnp.float32) - _along(mean)) * _along(factor) + _along(bias)
        return nn.relu(h).astype(self.dtype)


def _along(channels: Float[Array, " features"]) -> Maps:
    """One number per channel, to go with maps."""
    return channels[None, None, None, :]


def _apply(branch: Branch, x: Maps, dtype: Any) -> NewMaps:
    """Runs a branch; its modules belong to the module that calls this."""
    for step in branch:
        if isinstance(step, Conv):
            x = ConvNorm(step, dtype, name=step.name)(x)
        elif isinstance(step, Pool):
            x = _pool(step, x)
        else:
            x = jnp.concatenate([ConvNorm(c, dtype, name=c.name)(x) for c in step], axis=-1)
    return x


def _pool(pool: Pool, x: Maps) -> NewMaps:
    window, strides = (3, 3), (pool.strides, pool.strides)
    padding = "SAME" if pool.strides == 1 else "VALID"
    if pool.kind == "max":
        return nn.max_pool(x, window, strides, padding)
    average = nn.avg_pool(x.astype(jnp.float32), window, strides, padding, count_include_pad=False)
    return average.astype(x.dtype)


@contextlib.contextmanager
def _numerics(dtype: Any) -> Iterator[None]:
    """What holds while a network of that dtype is traced."""
    # Float32 is to mean float32: accelerators would otherwise round to TF32 or bfloat16.
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        yield
