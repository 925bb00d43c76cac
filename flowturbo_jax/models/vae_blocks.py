"""Building blocks of the Stable Diffusion autoencoder, in as little work as their results need.

Source: diffusers resnet.py, upsampling.py and attention_processor.py, whose parameters these are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.models.attention import attend

Maps = Float[Array, "batch height width channels"]
NewMaps = Float[Array, "batch rows columns features"]

NORM_EPSILON = 1e-6  # diffusers vae.py: every GroupNorm(eps=1e-6)


class ResidualLayer(nn.Module):
    """Twice group norm, SiLU and a 3x3 convolution, added to the input (or its 1x1 convolution)."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x))
        h = conv(self.width, self.dtype, "conv1")(h)
        h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(h))
        h = conv(self.width, self.dtype, "conv2")(h)
        if x.shape[-1] != self.width:
            x = conv(self.width, self.dtype, "shortcut", kernel=1)(x)
        return x + h


class SpatialAttention(nn.Module):
    """Self-attention over all pixels with one head, added to the input."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        height, width, channels = x.shape[1:]
        h = GroupNorm(self.groups, self.dtype, name="norm")(x)
        h = rearrange(h, "b h w c -> b (h w) c")
        # One product for the three: XLA's CPU compiler would merge those of queries and keys into
        # that of the logits, which takes 3.5 times as long at 4,096 pixels.
        weights = [Weights((channels, channels), name=n)() for n in ("query", "key", "value")]
        kernel, bias = (
            jnp.concatenate(part, axis=-1).astype(self.dtype) for part in zip(*weights, strict=True)
        )
        qkv = h @ kernel + bias[None, None, :]
        q, k, v = rearrange(qkv, "b t (three c) -> three b t 1 c", three=3)
        h = attend(q, k, v)[:, :, 0, :]
        h = nn.Dense(channels, dtype=self.dtype, name="out")(h)
        return x + rearrange(h, "b (h w) c -> b h w c", h=height, w=width)


class GroupNorm(nn.Module):
    """Group norm: `(x - mean) / sqrt(variance + epsilon) * scale + bias`, statistics per group.

    They are taken in float32 whatever x is (in float64 for float64), in two passes as PyTorch's:
    E[x^2] - E[x]^2 cancels where the mean is large. Sums go over the pixels first, each channel by
    itself, and over a group's channels then: the same numbers, several times faster on CPU.

    Attributes:
      groups: number of groups; neighbouring channels form one.
      dtype: of the result.
      epsilon: what is added to the variance.
    """

    groups: int
    dtype: Any
    epsilon: float = NORM_EPSILON

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        exact = jnp.float64 if x.dtype == jnp.float64 else jnp.float32

        def group_mean(a: Maps) -> Float[Array, "batch 1 1 channels"]:
            mean = reduce(a.mean(axis=(1, 2)), "b (g c) -> b g", "mean", g=self.groups)
            return repeat(mean, "b g -> b 1 1 (g c)", c=channels // self.groups)

        h = x.astype(exact)
        mean = group_mean(h)
        variance = group_mean(jnp.square(h - mean))
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale.astype(exact)[None, None, None, :]
        # Not (h - mean) * factor: the compiler would store the difference, having it twice.
        h = h * factor + (bias.astype(exact)[None, None, None, :] - mean * factor)
        return h.astype(self.dtype)


class Weights(nn.Module):
    """The parameters `kernel` and `bias` of a linear layer that is computed elsewhere."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), self.shape)
        bias = self.param("bias", nn.initializers.zeros, self.shape[-1:])
        return jnp.asarray(kernel), jnp.asarray(bias)


def upsample(
    x: Maps,
    kernel: Float[Array, "3 3 channels features"],
    bias: Float[Array, " features"],
) -> NewMaps:
    """Every pixel twice along both sides, then a 3x3 convolution with zeros around the picture.

    Computed on the small picture as one 2x2 convolution with four times the features, 4/9 of the
    multiply-adds (see `folded`). With a pixel of zeros around it gives the large picture and one
    pixel more on every side, which is cut off.

    Args:
      x: `[B, H, W, C]` float; the convolution is in its dtype.
      kernel: `[3, 3, C, C']` float, folded in its own dtype.
      bias: `[C']` float.

    Returns:
      `[B, 2 H, 2 W, C']`, dtype of x.

    Source: diffusers upsampling.py, Upsample2D, which convolves the large picture.
    """
    # Not as the convolution's own padding: XLA's CPU compiler would make a gradient for the kernel
    # of it that takes seven times as long.
    four = jax.lax.conv_general_dilated(
        jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))),
        folded(kernel).astype(x.dtype),
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    h = rearrange(four, "b h w (row column c) -> b (h row) (w column) c", row=2, column=2)
    return h[:, 1:-1, 1:-1] + bias.astype(x.dtype)[None, None, None, :]


def folded(kernel: Float[Array, "3 3 inputs outputs"]) -> Float[Array, "2 2 inputs features"]:
    """The 2x2 kernel on a picture that does what a 3x3 kernel does on the picture twice as large.

    Along one side, the large pixels 2i - 1 and 2i lie between the small pixels i - 1 and i and see
    only those: the former through k0 + k1 and k2, the latter through k0 and k1 + k2.

    Args:
      kernel: `[3, 3, C, C']` float.

    Returns:
      `[2, 2, C, 4 C']`, dtype of kernel; the features are rows 2i - 1 and 2i, within them columns
      2j - 1 and 2j, within them channels.
    """
    for side in (0, 1):
        first, middle, last = jnp.split(kernel, 3, axis=side)
        before = jnp.concatenate([first + middle, last], axis=side)
        after = jnp.concatenate([first, middle + last], axis=side)
        kernel = jnp.stack([before, after], axis=-2)
    return rearrange(kernel, "h w i row column o -> h w i (row column o)")


def conv(
    features: int,
    dtype: Any,
    name: str,
    kernel: int = 3,
    strides: tuple[int, int] = (1, 1),
    padding: Any = "SAME",
) -> nn.Conv:
    """A square convolution."""
    return nn.Conv(features, (kernel, kernel), strides, padding, dtype=dtype, name=name)
