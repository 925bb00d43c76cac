"""Building blocks of the text-to-image U-Net: layers that see the time and those that see the text.

Source: diffusers resnet.py, transformer_2d.py, attention.py and embeddings.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.models.attention import KeyHeads, attend
from flowturbo_jax.models.layers import Tokens, Vectors, time_features
from flowturbo_jax.models.vae_blocks import GroupNorm, Maps, NewMaps, conv

TextStates = Float[Array, "batch words features"]
EmbeddedTime = Float[Array, "batch time"]

NORM_EPSILON = 1e-5  # diffusers UNet2DConditionModel: norm_eps, and PyTorch's LayerNorm
TIME_STEPS = 1000  # Stable Diffusion's clock runs from 1000, noise, to 0, data
FEED_FORWARD_RATIO = 4  # diffusers attention.py, FeedForward: mult


class KeysValues(NamedTuple):
    """What a cross-attention makes of the text, the same at all times.

    Attributes:
      keys: `[B, L, heads, size]`.
      values: as keys.
    """

    keys: KeyHeads
    values: KeyHeads


BlocksText = tuple[KeysValues, ...]  # of the blocks of a transformer


class TimeEmbedding(nn.Module):
    """Flow times `[...]` to vectors `[..., width]`: sinusoids of 1000 (1 - t) and an MLP.

    All in float32 (float64 for float64), since bfloat16 cannot tell neighbouring steps apart; only
    the result has the network's dtype.
    """

    width: int
    frequencies: int
    dtype: Any

    @nn.compact
    def __call__(self, t: Float[Array, "*rows"]) -> Vectors:
        exact = _exact(self.dtype)
        features = time_features(TIME_STEPS * (1 - t.astype(exact)), self.frequencies)
        h = nn.silu(nn.Dense(self.width, dtype=exact, name="up")(features))
        return nn.Dense(self.width, dtype=exact, name="down")(h).astype(self.dtype)


class TimedResidualLayer(nn.Module):
    """Twice group norm, SiLU and a 3x3 convolution, with the time added in between.

    The result is added to the input, or to its 1x1 convolution where it has another width.
    """

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps, time: EmbeddedTime) -> NewMaps:
        h = GroupNorm(self.groups, self.dtype, NORM_EPSILON, name="norm1")(x)
        h = conv(self.width, self.dtype, "conv1")(nn.silu(h))
        shift = nn.Dense(self.width, dtype=self.dtype, name="time")(nn.silu(time))
        h = h + shift[:, None, None, :]
        h = GroupNorm(self.groups, self.dtype, NORM_EPSILON, name="norm2")(h)
        h = conv(self.width, self.dtype, "conv2")(nn.silu(h))
        if x.shape[-1] != self.width:
            x = conv(self.width, self.dtype, "shortcut", kernel=1)(x)
        return x + h


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, in float32 (float64 for float64) and two passes."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        exact = _exact(x.dtype)
        h = x.astype(exact)
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(variance + NORM_EPSILON) * scale.astype(exact)[None, None, :]
        return (h + bias.astype(exact)[None, None, :]).astype(self.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention among tokens; queries, keys and values without bias."""

    heads: int
    dtype: Any
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        projections = (
            nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)
            for name in ("query", "key", "value")
        )
        q, k, v = (_split_heads(projection(x), self.heads) for projection in projections)
        out = rearrange(attend(q, k, v, self.implementation), "b t n h -> b t (n h)")
        return nn.Dense(width, dtype=self.dtype, name="out")(out)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to the text; queries, keys and values without bias."""

    width: int
    heads: int
    dtype: Any

    def setup(self):
        self.query, self.key, self.value = (
            nn.Dense(self.width, use_bias=False, dtype=self.dtype) for _ in range(3)
        )
        self.out = nn.Dense(self.width, dtype=self.dtype)

    def keys_values(self, states: TextStates) -> KeysValues:
        """What `__call__` needs of the text."""
        keys, values = self.key(states), self.value(states)
        return KeysValues(_split_heads(keys, self.heads), _split_heads(values, self.heads))

    def __call__(self, x: Tokens, text: KeysValues) -> Tokens:
        q = _split_heads(self.query(x), self.heads)
        # Not cuDNN's kernel: it would pad the 77 keys, and has little to fuse over so few.
        return self.out(rearrange(attend(q, *text), "b t n h -> b t (n h)"))


class GatedFeedForward(nn.Module):
    """A linear layer to values and gates, `values * gelu(gates)` with the exact GELU, linear.

    Source: Shazeer, arXiv 2002.05202, GEGLU.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        h = nn.Dense(2 * FEED_FORWARD_RATIO * width, dtype=self.dtype, name="up")(x)
        values, gates = jnp.split(h, 2, axis=-1)
        h = values * nn.gelu(gates, approximate=False)
        return nn.Dense(width, dtype=self.dtype, name="down")(h)


class TextBlock(nn.Module):
    """Self-attention, attention to the text and a feed-forward layer, each after a layer norm."""

    width: int
    heads: int
    dtype: Any
    attention: str

    def setup(self):
        self.norm1, self.norm2, self.norm3 = (LayerNorm(self.dtype) for _ in range(3))
        self.self_attention = SelfAttention(self.heads, self.dtype, self.attention)
        self.cross_attention = CrossAttention(self.width, self.heads, self.dtype)
        self.feed_forward = GatedFeedForward(self.dtype)

    def keys_values(self, states: TextStates) -> KeysValues:
        """What `__call__` needs of the text."""
        return self.cross_attention.keys_values(states)

    def __call__(self, x: Tokens, text: KeysValues) -> Tokens:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), text)
        return x + self.feed_forward(self.norm3(x))


class Transformer(nn.Module):
    """Group norm, a projection, blocks over all pixels as tokens, a projection; added to the input.

    Attributes:
      width: channels of the maps.
      heads: attention heads.
      layers: number of blocks.
      linear: the projections are linear layers; if not, 1x1 convolutions, the same computation.
      groups: of the group norm.
      dtype: dtype of the matrix products.
      attention: implementation of the self-attention, see `models.attention.choose`.
    """

    width: int
    heads: int
    layers: int
    linear: bool
    groups: int
    dtype: Any
    attention: str

    def setup(self):
        self.norm = GroupNorm(self.groups, self.dtype)  # epsilon 1e-6, as in the autoencoder
        self.project_in, self.project_out = (self._projection() for _ in range(2))
        self.blocks = [
            TextBlock(self.width, self.heads, self.dtype, self.attention)
            for _ in range(self.layers)
        ]

    def keys_values(self, states: TextStates) -> BlocksText:
        """What `__call__` needs of the text."""
        return tuple(block.keys_values(states) for block in self.blocks)

    def __call__(self, x: Maps, text: BlocksText) -> Maps:
        h = rearrange(self.project_in(self.norm(x)), "b h w c -> b (h w) c")
        for block, given in zip(self.blocks, text, strict=True):
            h = block(h, given)
        h = rearrange(h, "b (h w) c -> b h w c", h=x.shape[1])
        return x + self.project_out(h)

    def _projection(self) -> nn.Module:
        if self.linear:
            return nn.Dense(self.width, dtype=self.dtype)
        return nn.Conv(self.width, (1, 1), dtype=self.dtype)


def _exact(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _split_heads(
    x: Float[Array, "batch tokens width"], heads: int
) -> Float[Array, "batch tokens heads size"]:
    return rearrange(x, "b t (n h) -> b t n h", n=heads)
