"""Building blocks of diffusion transformers: embeddings, attention, MLP, adaptive layer norm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.models.attention import attend

Tokens = Float[Array, "batch tokens width"]
Vectors = Float[Array, "*rows width"]
Changes = Float[Array, "*rows changes"]  # shifts, scales and gates side by side

NORM_EPSILON = 1e-6  # SiT models.py: LayerNorm(elementwise_affine=False, eps=1e-6)
EMBEDDING_INIT = nn.initializers.normal(0.02)  # SiT models.py: initialize_weights
MAX_PERIOD = 10_000.0  # SiT models.py: TimestepEmbedder and the sine-cosine position table


def time_features(t: Float[Array, "*rows"], size: int) -> Float[Array, "*rows features"]:
    """Sinusoidal features `[cos(t f_k), sin(t f_k)]`, `f_k = 10000^(-k / (size / 2))`.

    Args:
      t: flow times `[...]` float32; values above 1 are legal (refiner training may reach them).
      size: number of features, even.

    Returns:
      Features `[..., size]`, dtype of t.

    Source: SiT models.py, TimestepEmbedder; t itself enters, not 1000 t.
    """
    frequencies = np.exp(-np.log(MAX_PERIOD) * np.arange(size // 2) / (size // 2))
    angles = t[..., None] * jnp.asarray(frequencies, t.dtype).reshape((1,) * t.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(side: int, width: int) -> np.ndarray:
    """Two-dimensional sine-cosine table, `[1, side * side, width]` float32.

    The first half of the width encodes the column, the second half the row, each as
    `[sin(pos w_k), cos(pos w_k)]` with `w_k = 10000^(-k / (width / 4))`.

    Source: SiT models.py, get_2d_sincos_pos_embed.
    """
    frequencies = MAX_PERIOD ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    halves = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * frequencies[None, :]
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=-1)[None].astype(np.float32)


def modulate(x: Tokens, shift: Vectors, scale: Vectors) -> Tokens:
    """Adaptive layer norm's affine part, `x (1 + scale) + shift`, one vector per sample."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


def layer_norm(x: Tokens) -> Tokens:
    """Layer norm over the last axis without affine parameters, in float32, dtype of x.

    Source: SiT models.py; variance in two passes, as PyTorch's.
    """
    h = x.astype(jnp.float32)
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
    return (h * jax.lax.rsqrt(variance + NORM_EPSILON)).astype(x.dtype)


def dense(features: int, dtype: Any, kernel_init: Callable | None = None, name: str | None = None):
    """A linear layer, initialised as in SiT (Xavier uniform unless told otherwise)."""
    kernel_init = kernel_init or nn.initializers.xavier_uniform()
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


class TimeEmbedding(nn.Module):
    """Flow times `[...]` to vectors `[..., width]`: sinusoids, linear, SiLU, linear."""

    width: int
    frequencies: int
    dtype: Any

    @nn.compact
    def __call__(self, t: Float[Array, "*rows"]) -> Vectors:
        # The features stay in float32: bfloat16 cannot tell neighbouring steps apart.
        features = time_features(t.astype(jnp.float32), self.frequencies)
        h = dense(self.width, self.dtype, EMBEDDING_INIT, name="up")(features)
        return dense(self.width, self.dtype, EMBEDDING_INIT, name="down")(nn.silu(h))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    num_heads: int
    dtype: Any
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        qkv = dense(3 * width, self.dtype, name="qkv")(x)
        q, k, v = rearrange(qkv, "b t (three n h) -> three b t n h", three=3, n=self.num_heads)
        out = attend(q, k, v, self.implementation)
        return dense(width, self.dtype, name="out")(rearrange(out, "b t n h -> b t (n h)"))


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        h = nn.gelu(dense(self.hidden, self.dtype, name="up")(x), approximate=True)
        return dense(x.shape[-1], self.dtype, name="down")(h)


class TransformerBlock(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the condition (adaLN-Zero).

    What the condition vector does is computed apart, by `modulation`, since it does not depend on
    the tokens. Both methods have the form that `nn.scan` wants of a loop body.
    """

    width: int
    num_heads: int
    mlp_ratio: float
    dtype: Any
    attention_implementation: str = "xla"

    def setup(self):
        zeros = nn.initializers.zeros
        self.modulation = dense(6 * self.width, self.dtype, zeros)
        self.attention = Attention(self.num_heads, self.dtype, self.attention_implementation)
        self.mlp = Mlp(int(self.width * self.mlp_ratio), self.dtype)

    def modulations(self, carry: None, c: Vectors) -> tuple[None, Changes]:
        """Shifts, scales and gates of this block, `(None, [..., 6 width])`."""
        return carry, self.modulation(c)

    def __call__(self, x: Tokens, six: Changes) -> tuple[Tokens, None]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(six, 6, axis=-1)
        h = modulate(layer_norm(x), shift1, scale1)
        x = x + gate1[:, None, :] * self.attention(h)
        h = modulate(layer_norm(x), shift2, scale2)
        return x + gate2[:, None, :] * self.mlp(h), None


class FinalLayer(nn.Module):
    """Modulated layer norm, then a linear map of each token to its patch of output channels."""

    width: int
    features: int
    dtype: Any

    def setup(self):
        zeros = nn.initializers.zeros
        self.modulation = dense(2 * self.width, self.dtype, zeros)
        self.linear = dense(self.features, self.dtype, zeros)

    def modulations(self, c: Vectors) -> Changes:
        """Shift and scale, `[..., 2 width]`."""
        return self.modulation(c)

    def __call__(self, x: Tokens, two: Changes) -> Float[Array, "batch tokens features"]:
        shift, scale = jnp.split(two, 2, axis=-1)
        return self.linear(modulate(layer_norm(x), shift, scale))
