"""The text encoder of CLIP: token ids to the states that condition a text-to-image model.

Source: Radford et al., arXiv 2103.00020; architecture as in transformers' CLIPTextModel.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models.attention import attend

TokenIds = Int[Array, "batch tokens"]
TokenStates = Float[Array, "batch tokens width"]

MAX_SIZE, MAX_VOCABULARY, MAX_DEPTH = 65536, 1 << 20, 256  # far above any text encoder
EMBEDDING_INIT = nn.initializers.normal(0.02)  # transformers modeling_clip.py: _init_weights
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # transformers activations.py; OpenAI's CLIP
    "gelu": lambda x: nn.gelu(x, approximate=False),  # OpenCLIP's
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Hyper-parameters of a CLIP text encoder, validated at construction.

    Attributes:
      vocab_size: rows of the token embedding.
      hidden_size: width of the states, divisible by num_heads.
      intermediate_size: hidden width of the MLP.
      num_layers: number of transformer layers.
      num_heads: attention heads.
      activation: of the MLP, "quick_gelu" (OpenAI's CLIP) or "gelu" (OpenCLIP), the exact one.
      end_token: id of the token whose state stands for the whole text.
      max_length: the most tokens a text can have, start and end included.
      layer_norm_epsilon: of every layer norm.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str
    end_token: int
    max_length: int = 77
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        limits = {
            "vocab_size": MAX_VOCABULARY,
            "hidden_size": MAX_SIZE,
            "intermediate_size": MAX_SIZE,
            "num_layers": MAX_DEPTH,
            "num_heads": MAX_SIZE,
            "max_length": MAX_SIZE,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise InputError(
                    f"CLIP {name} is {value!r:.99}; it must be an integer in 1..{limit}"
                )
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"CLIP hidden_size {self.hidden_size} is not divisible by num_heads "
                f"{self.num_heads}"
            )
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(
                f"CLIP activation is {self.activation!r:.99}; it must be one of {known}"
            )
        if type(self.end_token) is not int or not 0 <= self.end_token < self.vocab_size:
            raise InputError(
                f"CLIP end_token is {self.end_token!r:.99}; it must be an id below vocab_size, "
                f"{self.vocab_size}"
            )
        epsilon = self.layer_norm_epsilon
        if type(epsilon) not in (int, float) or not 0 < epsilon < math.inf:
            raise InputError(
                f"CLIP layer_norm_epsilon is {epsilon!r:.99}; it must be a positive number"
            )


class CLIPText(nn.Module):
    """States of a text's tokens, each of which has seen those before it.

    Attributes:
      config: the hyper-parameters.
      dtype: dtype of the matrix products; parameters are float32, and so are the states between
        the layers and the result (float64 for float64).
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    def setup(self):
        config, width = self.config, self.config.hidden_size
        self.token_embedding = nn.Embed(config.vocab_size, width, embedding_init=EMBEDDING_INIT)
        shape = (config.max_length, width)
        self.position_embedding = self.param("position_embedding", EMBEDDING_INIT, shape)
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
        )
        self.layers = layers(config, self.dtype)
        self.final_norm = LayerNorm(config.layer_norm_epsilon, self._exact)

    def __call__(self, ids: TokenIds) -> TokenStates:
        """Encodes token ids.

        There is no mask of the padding: states after the end token count too, as in Stable
        Diffusion.

        Args:
          ids: `[B, L]` int32, at most `config.max_length` a text, from the tokenizer the weights
            were trained with.

        Returns:
          States after the last layer norm `[B, L, hidden_size]` float32; NaN for a text with an id
          that the vocabulary has not.

        Raises:
          InputError: there are more ids than the encoder has positions.

        Source: transformers modeling_clip.py, CLIPTextModel.forward.
        """
        length = ids.shape[1]
        if length > self.config.max_length:
            raise InputError(
                f"the texts are {length} tokens long; this text encoder takes at most "
                f"{self.config.max_length}"
            )
        with _precision(self.dtype):
            states = self.token_embedding(ids).astype(self._exact)
            positions = self.position_embedding[None, :length].astype(self._exact)
            states = states + jnp.broadcast_to(positions, states.shape)
            states, _ = self.layers(states)
            return self.final_norm(states)

    @nn.nowrap
    def pooled(self, states: TokenStates, ids: TokenIds) -> Float[Array, "batch width"]:
        """The state that stands for the whole text: that of its first end token.

        Args:
          states: what the encoder answered, `[B, L, hidden_size]`.
          ids: what it was asked, `[B, L]` int32.

        Returns:
          `[B, hidden_size]`, dtype of states.

        Source: transformers modeling_clip.py, the pooler_output of CLIPTextModel.
        """
        first = jnp.argmax(ids == self.config.end_token, axis=1)
        return jnp.take_along_axis(states, first[:, None, None], axis=1)[:, 0]

    @property
    def _exact(self) -> Any:
        """Dtype of what is not a matrix product."""
        return jnp.float64 if self.dtype == jnp.float64 else jnp.float32

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Fresh parameters, a nested dict of float32."""
        return self.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


class EncoderLayer(nn.Module):
    """Causal self-attention and MLP, each after a layer norm and added to its input.

    It has the form that `nn.scan` wants of a loop body.

    Source: transformers modeling_clip.py, CLIPEncoderLayer.
    """

    config: CLIPTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: TokenStates) -> tuple[TokenStates, None]:
        config, dtype, width = self.config, self.dtype, self.config.hidden_size
        epsilon = config.layer_norm_epsilon
        out_std = width**-0.5  # here and below: transformers modeling_clip.py, _init_weights
        in_std = out_std * (2 * config.num_layers) ** -0.5
        h = LayerNorm(epsilon, dtype, name="norm1")(x)
        qkv = [_dense(width, in_std, dtype, name)(h) for name in ("query", "key", "value")]
        q, k, v = (rearrange(a, "b t (n h) -> b t n h", n=config.num_heads) for a in qkv)
        h = rearrange(attend(q, k, v, causal=True), "b t n h -> b t (n h)")
        x = x + _dense(width, out_std, dtype, "out")(h).astype(x.dtype)
        h = LayerNorm(epsilon, dtype, name="norm2")(x)
        h = _dense(config.intermediate_size, (2 * width) ** -0.5, dtype, "up")(h)
        h = _dense(width, in_std, dtype, "down")(ACTIVATIONS[config.activation](h))
        return x + h.astype(x.dtype), None


class LayerNorm(nn.Module):
    """Layer norm with scale and bias in the dtype of x, variance in two passes, as PyTorch's.

    Attributes:
      epsilon: what is added to the variance.
      dtype: of the result.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: TokenStates) -> TokenStates:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        h = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(variance + self.epsilon) * scale.astype(x.dtype)[None, None, :]
        return (h + bias.astype(x.dtype)[None, None, :]).astype(self.dtype)


def _dense(features: int, std: float, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(std), name=name)


def _precision(dtype: Any) -> contextlib.AbstractContextManager:
    """What holds while a network of that dtype is traced."""
    # Float32 is to mean float32: accelerators would otherwise round to TF32 or bfloat16.
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
