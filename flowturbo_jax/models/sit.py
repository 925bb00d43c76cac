"""SiT: the scalable interpolant transformer, the predictor of FlowTurbo's class-to-image results.

Source: Ma et al., arXiv 2401.08740; architecture of DiT (Peebles & Xie, arXiv 2212.09748).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

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

    takes_text: ClassVar[bool] = False  # its condition is labels

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
    def head_sizes(self) -> tuple[int, ...]:
        """Widths of the attention heads there are: one, that of all blocks."""
        return (self.hidden_size // self.num_heads,)

    @property
    def null_label(self) -> int | None:
        """Index of the "no label" row, or None where the model has none."""
        return self.num_classes if self.num_classes and self.null_class else None


class Modulations(NamedTuple):
    """All that a SiT's time and label do to it: the shifts, scales and gates of adaLN-Zero.

    Attributes:
      blocks: of every block, `[..., depth, 6 hidden_size]`; dtype of the network.
      final: of the final layer, `[..., 2 hidden_size]`.
    """

    blocks: Float[Array, "*rows depth six"]
    final: layers.Changes


class SiT(nn.Module):
    """Velocity of a flow at (x, t) under a label.

    Attributes:
      config: the hyper-parameters.
      dtype: dtype of the matrix products; parameters are float32, the result has x's dtype.
      remat: recompute each block in the backward pass instead of storing its activations.
      unroll: lay the blocks out one after another instead of looping; same parameters.
      attention: which implementation, see `models.attention.choose`.
    """

    config: SiTConfig
    dtype: Any = jnp.float32
    remat: bool = False
    unroll: bool = False
    attention: str = "xla"

    def setup(self):
        config, width, dtype = self.config, self.config.hidden_size, self.dtype
        table = layers.position_table(config.input_size // config.patch_size, width)
        self.position_table = self.param("position_table", lambda _: jnp.asarray(table))
        self.patch_embedding = layers.dense(width, dtype)
        self.time_embedding = layers.TimeEmbedding(width, config.frequency_embedding_size, dtype)
        if config.num_classes:
            self.label_embedding = nn.Embed(
                config.num_classes + config.null_class,
                width,
                dtype=dtype,
                embedding_init=layers.EMBEDDING_INIT,
            )
        block = (config.num_heads, config.mlp_ratio, dtype, self.attention)
        self.blocks = self._loop()(width, *block)
        channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.final = layers.FinalLayer(width, config.patch_size**2 * channels, dtype)

    def __call__(
        self,
        x: Float[Array, "batch height width inputs"],
        t: Time | BatchTime,
        condition: Labels | Modulations | None,
    ) -> Float[Array, "batch height width channels"]:
        """Evaluates the network.

        Args:
          x: latents `[B, H, W, C * in_channels_scale]` float.
          t: flow time, `[]` or `[B]` float32.
          condition: labels `[B]` int, `num_classes` meaning "no label", or what `prepare` made of
            them for this t; None for an unconditional model.

        Returns:
          Velocity `[B, H, W, C]`, dtype of x.

        Source: SiT models.py, SiT.forward.
        """
        if isinstance(condition, Modulations):
            return self._forward(x, condition)
        c = self._embedded_time(jnp.broadcast_to(t, x.shape[:1]))
        if self.config.num_classes:
            c = c + self.label_embedding(condition)
        return self._forward(x, self._modulations(c))

    def prepare(
        self, times: Float[Array, " times"], labels: Labels | None, rows: int
    ) -> Modulations:
        """What to evaluate with instead of labels, for many times at once.

        It takes a third of the weights, which evaluations then need not read.

        Args:
          times: flow times `[N]` float32.
          labels: `[B]` int; None for an unconditional model.
          rows: B.

        Returns:
          A condition for each time, its arrays `[N, B, ...]`.
        """
        shape = (len(times), rows, self.config.hidden_size)
        c = jnp.broadcast_to(self._embedded_time(times)[:, None, :], shape)
        if self.config.num_classes:
            c = c + jnp.broadcast_to(self.label_embedding(labels), shape)
        return self._modulations(c)

    def _forward(
        self, x: Float[Array, "batch height width inputs"], modulations: Modulations
    ) -> Float[Array, "batch height width channels"]:
        config = self.config
        with _numerics(self.dtype):
            patches = rearrange(
                x.astype(self.dtype),
                "b (h p) (w q) c -> b (h w) (p q c)",
                p=config.patch_size,
                q=config.patch_size,
            )
            # The position table is a parameter that is loaded, but never trained.
            positions = jax.lax.stop_gradient(self.position_table).astype(self.dtype)
            tokens = self.patch_embedding(patches)
            tokens = tokens + jnp.broadcast_to(positions, tokens.shape)
            tokens, _ = self.blocks(tokens, modulations.blocks)
            tokens = self.final(tokens, modulations.final)
        out = rearrange(
            tokens,
            "b (h w) (p q c) -> b (h p) (w q) c",
            h=config.input_size // config.patch_size,
            p=config.patch_size,
            q=config.patch_size,
        )
        velocity = out[..., : config.in_channels].astype(x.dtype)
        return -velocity if config.reversed_time else velocity

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Fresh parameters, a nested dict of float32; zero in the final layer."""
        config = self.config
        channels = config.in_channels * config.in_channels_scale
        x = jnp.zeros((1, config.input_size, config.input_size, channels))
        labels = jnp.zeros((1,), jnp.int32) if config.num_classes else None
        return self.init(key, x, jnp.zeros(()), labels)["params"]

    def _embedded_time(self, t: Float[Array, " rows"]) -> layers.Vectors:
        if self.config.reversed_time:  # REPA loss.py: x = (1 - t) data + t noise
            t = 1 - t
        with _numerics(self.dtype):
            return self.time_embedding(t)

    def _modulations(self, c: layers.Vectors) -> Modulations:
        """What condition vectors, embedded time plus embedded label, do to the network."""
        with _numerics(self.dtype):
            c = nn.silu(c)
            blocks = jnp.moveaxis(self.blocks.modulations(None, c)[1], 0, -2)
            return Modulations(blocks, self.final.modulations(c))

    def _loop(self) -> type[nn.Module]:
        """A transformer block as a loop over stacked parameters."""
        block = layers.TransformerBlock
        if self.remat:
            block = nn.remat(block, prevent_cse=False)
        loop = {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True},
            "length": self.config.depth,
            "unroll": self.config.depth if self.unroll else 1,
        }
        return nn.scan(
            block,
            methods={
                "__call__": {**loop, "in_axes": 1},
                "modulations": {**loop, "in_axes": nn.broadcast},
            },
        )


@contextlib.contextmanager
def _numerics(dtype: Any) -> Iterator[None]:
    """Float32 is to mean float32: accelerators would otherwise round to TF32 or bfloat16."""
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        yield
