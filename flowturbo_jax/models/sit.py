"""SiT: the scalable interpolant transformer, the predictor of FlowTurbo's class-to-image results.

Source: Ma et al., arXiv 2401.08740; architecture of DiT (Peebles & Xie, arXiv 2212.09748).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import BatchTime, InputError, Labels, Params, Time
from flowturbo_jax.models import layers

# SiT models.py, SiT_models: depth, hidden size, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclasses.dataclass(frozen=True)
class SiTConfig:
    """Hyper-parameters of a SiT network, validated at construction.

    Attributes:
      input_size: side of the square latents, in latent pixels.
      in_channels: channels of the latents, and of the velocity.
      patch_size: side of a token's patch.
      hidden_size: width of the token stream, divisible by 4 (position table) and by num_heads.
      depth: number of transformer blocks.
      num_heads: attention heads.
      num_classes: number of labels; 0 for an unconditional model.
      null_class: whether the label table has a last row for "no label", which guidance needs.
      learn_sigma: the published weights predict twice the channels; the second half is unused.
      mlp_ratio: hidden width of the MLP over hidden_size.
      frequency_embedding_size: number of sinusoidal time features.
      in_channels_scale: how many arrays of in_channels enter side by side: 1, or 2 for a refiner.
      reversed_time: the weights were trained with t = 0 for data and the velocity toward noise, as
        REPA's; the network still takes our t and gives our velocity.
    """

    input_size: int
    in_channels: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    null_class: bool = True
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    frequency_embedding_size: int = 256
    in_channels_scale: int = 1
    reversed_time: bool = False

    def __post_init__(self):
        sizes = ("input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads")
        for name in (*sizes, "frequency_embedding_size", "in_channels_scale"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"SiT {name} is {value!r}; it must be a positive integer")
        if type(self.num_classes) is not int or self.num_classes < 0:
            raise InputError(f"SiT num_classes is {self.num_classes!r}; it must be 0 or more")
        ratio = self.mlp_ratio
        if not isinstance(ratio, int | float) or not 1 <= ratio * self.hidden_size < math.inf:
            raise InputError(f"SiT mlp_ratio is {ratio!r}; it must be a positive number")
        for name in ("null_class", "learn_sigma", "reversed_time"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"SiT {name} is {getattr(self, name)!r}; it must be true or false")
        for name, divisor in (
            ("input_size", self.patch_size),
            ("hidden_size", self.num_heads),
            ("hidden_size", 4),
            ("frequency_embedding_size", 2),
        ):
            if getattr(self, name) % divisor:
                raise InputError(
                    f"SiT {name} {getattr(self, name)} is not divisible by {divisor} "
                    f"(patch_size {self.patch_size}, num_heads {self.num_heads})"
                )

    @classmethod
    def named(cls, name: str, **fields: Any) -> "SiTConfig":
        """A published size, such as "SiT-XL/2"; `fields` gives the rest and may override.

        Raises:
          InputError: the name is not SiT-{S,B,L,XL}/{2,4,8}.
        """
        family, _, rest = name.partition("-")
        size, _, patch = rest.partition("/")
        if family != "SiT" or size not in SIZES or patch not in ("2", "4", "8"):
            raise InputError(f"unknown SiT size {name!r}; known are SiT-{{S,B,L,XL}}/{{2,4,8}}")
        depth, hidden_size, num_heads = SIZES[size]
        defaults = {
            "patch_size": int(patch),
            "depth": depth,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
        }
        return cls(**{**defaults, **fields})

    @property
    def size_name(self) -> str | None:
        """The published size these hyper-parameters are of, such as "SiT-XL/2", or None."""
        for size, (depth, hidden_size, num_heads) in SIZES.items():
            if (self.depth, self.hidden_size, self.num_heads) == (depth, hidden_size, num_heads):
                return f"SiT-{size}/{self.patch_size}"
        return None

    def refiner(self, **fields: Any) -> "SiTConfig":
        """The refiner's network for this predictor: one block over [x, v]; `fields` overrides.

        Source: PAPER section 3, "Same family as the predictor, about 5 % of its parameters".
        """
        own = {"depth": 1, "in_channels_scale": 2, "reversed_time": False}
        return dataclasses.replace(self, **{**own, **fields})

    def check_refiner(self, refiner: "SiTConfig") -> None:
        """Refuses a refiner that was made for another predictor.

        Raises:
          InputError: it does not take [x, v] of this predictor's latents and classes.
        """
        found = (refiner.shape, refiner.num_classes, refiner.null_class)
        wanted = (self.shape, self.num_classes, self.null_class)
        if found != wanted or refiner.in_channels_scale != 2:
            raise InputError(
                "the refiner is for another model's shape: (latents, classes, null class) "
                f"{found} with {refiner.in_channels_scale} inputs side by side, where the "
                f"predictor wants {wanted} with 2"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [H, W, C] of the latents the network moves."""
        return (self.input_size, self.input_size, self.in_channels)

    @property
    def null_label(self) -> int | None:
        """Index of the "no label" row, or None where the model has none."""
        return self.num_classes if self.num_classes and self.null_class else None


class SiT(nn.Module):
    """Velocity of a flow at (x, t) under a label.

    Attributes:
      config: the hyper-parameters.
      dtype: dtype of the matrix products; parameters are float32, the result has x's dtype.
      remat: recompute each block in the backward pass instead of storing its activations.
      unroll: lay the blocks out one after another instead of looping; same parameters.
    """

    config: SiTConfig
    dtype: Any = jnp.float32
    remat: bool = False
    unroll: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width inputs"],
        t: Time | BatchTime,
        labels: Labels | None,
    ) -> Float[Array, "batch height width channels"]:
        """Evaluates the network.

        Args:
          x: latents `[B, H, W, C * in_channels_scale]` float.
          t: flow time, `[]` or `[B]` float32.
          labels: `[B]` int, `num_classes` meaning "no label"; None for an unconditional model.

        Returns:
          Velocity `[B, H, W, C]`, dtype of x.

        Source: SiT models.py, SiT.forward.
        """
        # float32 is to mean float32: accelerators would otherwise round to TF32 or bfloat16.
        exact = "highest" if self.dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(exact):
            if self.config.reversed_time:  # REPA loss.py: x = (1 - t) data + t noise
                return -self._forward(x, 1 - t, labels)
            return self._forward(x, t, labels)

    def _forward(self, x: jax.Array, t: jax.Array, labels: Labels | None) -> jax.Array:
        config = self.config
        tokens = layers.dense(config.hidden_size, self.dtype, name="patch_embedding")(
            rearrange(
                x.astype(self.dtype),
                "b (h p) (w q) c -> b (h w) (p q c)",
                p=config.patch_size,
                q=config.patch_size,
            )
        )
        tokens = tokens + self._positions(tokens)
        c = self._condition(jnp.broadcast_to(t, x.shape[:1]), labels)
        tokens, _ = self._blocks()(tokens, c)
        channels = config.in_channels * (2 if config.learn_sigma else 1)
        features = config.patch_size**2 * channels
        tokens = layers.FinalLayer(features, self.dtype, name="final")(tokens, c)
        out = rearrange(
            tokens,
            "b (h w) (p q c) -> b (h p) (w q) c",
            h=config.input_size // config.patch_size,
            p=config.patch_size,
            q=config.patch_size,
        )
        return out[..., : config.in_channels].astype(x.dtype)

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Fresh parameters, a nested dict of float32; zero in the final layer."""
        config = self.config
        channels = config.in_channels * config.in_channels_scale
        x = jnp.zeros((1, config.input_size, config.input_size, channels))
        labels = jnp.zeros((1,), jnp.int32) if config.num_classes else None
        return self.init(key, x, jnp.zeros(()), labels)["params"]

    def _positions(self, tokens: layers.Tokens) -> layers.Tokens:
        """The stored position table: a parameter that is loaded, but never trained."""
        config = self.config
        table = layers.position_table(config.input_size // config.patch_size, config.hidden_size)
        positions = self.param("position_table", lambda _: jnp.asarray(table))
        positions = jax.lax.stop_gradient(positions).astype(self.dtype)
        return jnp.broadcast_to(positions, tokens.shape)

    def _condition(self, t: BatchTime, labels: Labels | None) -> layers.Vectors:
        """The condition vector `[B, hidden_size]`: embedded time plus embedded label."""
        config = self.config
        c = layers.TimeEmbedding(
            config.hidden_size, config.frequency_embedding_size, self.dtype, name="time_embedding"
        )(t)
        if not config.num_classes:
            return c
        table = nn.Embed(
            config.num_classes + config.null_class,
            config.hidden_size,
            dtype=self.dtype,
            embedding_init=layers.EMBEDDING_INIT,
            name="label_embedding",
        )
        return c + table(labels)

    def _blocks(self) -> nn.Module:
        """All transformer blocks as one loop over stacked parameters."""
        block = nn.remat(layers.TransformerBlock, prevent_cse=False) if self.remat else None
        stacked = nn.scan(
            block or layers.TransformerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.config.depth,
            unroll=self.config.depth if self.unroll else 1,
        )
        return stacked(self.config.num_heads, self.config.mlp_ratio, self.dtype, name="blocks")
