"""The text-to-image U-Net of Stable Diffusion, as a velocity in flow time.

Source: Rombach et al., arXiv 2112.10752; architecture as in diffusers' UNet2DConditionModel. As a
rectified flow: Liu et al., arXiv 2309.06380 (InstaFlow).
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import BatchTime, InputError, Params, Time, Timeless
from flowturbo_jax.models.attention import Chosen, for_head
from flowturbo_jax.models.unet_blocks import (
    NORM_EPSILON,
    BlocksText,
    EmbeddedTime,
    TextStates,
    TimedResidualLayer,
    TimeEmbedding,
    Transformer,
)
from flowturbo_jax.models.unet_config import UNetConfig
from flowturbo_jax.models.vae_blocks import GroupNorm, Maps, NewMaps, Weights, upsample

StageText = tuple[BlocksText, ...]  # of the transformers of a stage


class TextConditions(NamedTuple):
    """All that a U-Net's time and text do to it.

    Attributes:
      time: the embedded time `[..., B, time_width]`.
      keys_values: keys and values of the text for every cross-attention, `[B, L, heads, size]`
        each, in the order of the stages, their transformers and the blocks of those. They are the
        same at all times: `prepare` gives them in a Timeless, `__call__` takes them without.
    """

    time: Float[Array, "*rows width"]
    keys_values: tuple[StageText, ...] | Timeless


class UNet(nn.Module):
    """Velocity of a flow at (x, t) under a text.

    The latents may be of any size whose sides `config.downsampling` divides, whatever the config's
    sample_size.

    Attributes:
      config: the hyper-parameters.
      dtype: dtype of the matrix products; parameters are float32, the result has x's dtype.
      remat: recompute each layer in the backward pass instead of storing its activations.
      attention: implementation of the self-attention, see `models.attention.choose`; or pairs of a
        head size and its own, for all of `config.head_sizes`.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    remat: bool = False
    attention: Chosen = "xla"

    def setup(self):
        config, dtype = self.config, self.dtype
        widths = config.block_out_channels
        levels, built = range(len(widths)), (dtype, self.remat, self.attention)
        self.conv_in = nn.Conv(widths[0], (3, 3), dtype=dtype)
        self.time_embedding = TimeEmbedding(config.time_width, widths[0], dtype)
        self.down = [DownStage(config, level, *built) for level in levels]
        self.middle = MiddleStage(config, levels[-1], *built)
        self.up = [UpStage(config, level, *built) for level in reversed(levels)]
        self.norm_out = GroupNorm(config.norm_num_groups, dtype, NORM_EPSILON)
        zeros = nn.initializers.zeros  # a fresh network's velocity, or offset, is zero
        self.conv_out = nn.Conv(config.in_channels, (3, 3), dtype=dtype, kernel_init=zeros)

    def __call__(
        self,
        x: Float[Array, "batch height width inputs"],
        t: Time | BatchTime,
        condition: TextStates | TextConditions,
    ) -> Float[Array, "batch height width channels"]:
        """Evaluates the network.

        Args:
          x: latents `[B, H, W, C * in_channels_scale]` float.
          t: flow time, `[]` or `[B]` float32; the network's own is 1000 (1 - t), so that t above 1
            is negative there.
          condition: text states `[B, L, text_width]` float, or what `prepare` made of them for
            this t.

        Returns:
          Velocity `[B, H, W, C]`, dtype of x.

        Raises:
          InputError: a side of x is not divisible by `config.downsampling`, or x has another number
            of channels.
        """
        config = self.config
        factor, channels = config.downsampling, config.in_channels * config.in_channels_scale
        if x.shape[1] % factor or x.shape[2] % factor or x.shape[3] != channels:
            raise InputError(
                f"latents are {list(x.shape)}; this U-Net wants [B, H, W, {channels}] with H and W "
                f"divisible by {factor}"
            )
        with _precision(self.dtype):
            if not isinstance(condition, TextConditions):
                time = self.time_embedding(jnp.broadcast_to(t, x.shape[:1]))
                condition = TextConditions(time, self._keys_values(condition))
            return self._forward(x.astype(self.dtype), condition).astype(x.dtype)

    def prepare(
        self, times: Float[Array, " times"], states: TextStates, rows: int
    ) -> TextConditions:
        """What to evaluate with instead of text states, for many times at once.

        Args:
          times: flow times `[N]` float32.
          states: text states `[B, L, text_width]` float.
          rows: B.

        Returns:
          A condition for each time: `time` is `[N, B, time_width]`, the keys and values are of all
          times, in a Timeless.
        """
        with _precision(self.dtype):
            time = self.time_embedding(times)[:, None, :]
            time = jnp.broadcast_to(time, (len(times), rows, self.config.time_width))
            return TextConditions(time, Timeless(self._keys_values(states)))

    def _keys_values(self, states: TextStates) -> tuple[StageText, ...]:
        stages = (*self.down, self.middle, *self.up)
        return tuple(stage.keys_values(states) for stage in stages)

    def _forward(
        self, x: Float[Array, "batch height width inputs"], condition: TextConditions
    ) -> Float[Array, "batch height width channels"]:
        levels, time = len(self.down), condition.time
        down = condition.keys_values[:levels]
        middle, *up = condition.keys_values[levels:]
        maps = [self.conv_in(x)]
        for stage, text in zip(self.down, down, strict=True):
            maps += stage(maps[-1], time, text)
        h = self.middle(maps[-1], time, middle)
        for stage, text in zip(self.up, up, strict=True):
            count = self.config.layers_per_block + 1
            maps, taken = maps[:-count], maps[-count:]
            h = stage(h, taken, time, text)
        return self.conv_out(nn.silu(self.norm_out(h)))

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Fresh parameters, a nested dict of float32; zero in the last convolution."""
        config, side = self.config, self.config.downsampling
        x = jnp.zeros((1, side, side, config.in_channels * config.in_channels_scale))
        states = jnp.zeros((1, 1, config.text_width))
        return self.init(key, x, jnp.zeros(()), states)["params"]


class Stage(nn.Module):
    """The layers of one resolution, on the way down, in the middle or on the way up.

    Attributes:
      config: of the network.
      level: which resolution, 0 for the finest.
      dtype: dtype of the matrix products.
      remat: recompute each layer in the backward pass instead of storing its activations.
      attention: implementation of the self-attention, as the network has it.
    """

    config: UNetConfig
    level: int
    dtype: Any
    remat: bool
    attention: Chosen

    def keys_values(self, states: TextStates) -> StageText:
        """What `__call__` needs of the text."""
        return tuple(transformer.keys_values(states) for transformer in self.transformers)

    def _residual_layers(self, count: int) -> list[nn.Module]:
        layer = nn.remat(TimedResidualLayer) if self.remat else TimedResidualLayer
        config = self.config
        width = config.block_out_channels[self.level]
        return [layer(width, config.norm_num_groups, self.dtype) for _ in range(count)]

    def _transformers(self, count: int) -> list[nn.Module]:
        layer = nn.remat(Transformer) if self.remat else Transformer
        config = self.config
        width, heads = config.block_out_channels[self.level], config.attention_heads[self.level]
        return [
            layer(
                width,
                heads,
                config.transformer_layers,
                config.linear_projection,
                config.norm_num_groups,
                self.dtype,
                for_head(self.attention, width // heads),
            )
            for _ in range(count)
        ]

    def _layer(self, index: int, h: Maps, time: EmbeddedTime, text: StageText) -> NewMaps:
        """The residual layer of that number, and the transformer behind it where there is one."""
        h = self.residual_layers[index](h, time)
        return self.transformers[index](h, text[index]) if self.transformers else h


class DownStage(Stage):
    """Residual layers, and a convolution that halves the sides unless they are the coarsest."""

    def setup(self):
        config, count = self.config, self.config.layers_per_block
        self.residual_layers = self._residual_layers(count)
        self.transformers = self._transformers(count * config.cross_attention[self.level])
        if self.level + 1 < len(config.block_out_channels):
            width = config.block_out_channels[self.level]
            padding = ((1, 1), (1, 1))  # diffusers downsampling.py: not as the autoencoder's
            self.downsample = nn.Conv(width, (3, 3), (2, 2), padding, dtype=self.dtype)

    def __call__(self, h: Maps, time: EmbeddedTime, text: StageText) -> list[jax.Array]:
        """Every map on the way, which the way up takes; the last goes on."""
        maps = []
        for index in range(len(self.residual_layers)):
            h = self._layer(index, h, time, text)
            maps.append(h)
        if self.level + 1 < len(self.config.block_out_channels):
            maps.append(self.downsample(h))
        return maps


class MiddleStage(Stage):
    """At the coarsest resolution: a residual layer, a transformer, a residual layer."""

    def setup(self):
        self.residual_layers = self._residual_layers(2)
        self.transformers = self._transformers(1)

    def __call__(self, h: Maps, time: EmbeddedTime, text: StageText) -> Maps:
        return self.residual_layers[1](self._layer(0, h, time, text), time)


class UpStage(Stage):
    """Residual layers that also see the way down, then doubled sides unless they are the finest."""

    def setup(self):
        config, count = self.config, self.config.layers_per_block + 1
        width = config.block_out_channels[self.level]
        self.residual_layers = self._residual_layers(count)
        self.transformers = self._transformers(count * config.cross_attention[self.level])
        if self.level:
            self.upsample = Weights((3, 3, width, width))

    def __call__(
        self, h: Maps, maps: list[jax.Array], time: EmbeddedTime, text: StageText
    ) -> NewMaps:
        """Takes a map of the way down, from the last to the first, with every residual layer."""
        for index, skipped in enumerate(reversed(maps)):
            h = self._layer(index, jnp.concatenate([h, skipped], axis=-1), time, text)
        return upsample(h, *self.upsample()) if self.level else h


def _precision(dtype: Any) -> contextlib.AbstractContextManager:
    """What holds while a network of that dtype is traced."""
    # Float32 is to mean float32: accelerators would otherwise round to TF32 or bfloat16.
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
