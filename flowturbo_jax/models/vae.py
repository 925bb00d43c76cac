"""The Stable Diffusion autoencoder (AutoencoderKL): pixels to latents and back.

Source: Rombach et al., arXiv 2112.10752; architecture as in diffusers' AutoencoderKL.
"""

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flowturbo_jax.interfaces import Images, InputError, Latents, Params
from flowturbo_jax.models.vae_blocks import (
    GroupNorm,
    Maps,
    NewMaps,
    ResidualLayer,
    SpatialAttention,
    Weights,
    conv,
    upsample,
)

MAX_SIZE, MAX_DEPTH = 65536, 16  # far above any model; a wrong config would hang instead
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers vae.py: DiagonalGaussianDistribution


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Hyper-parameters of an autoencoder, validated at construction.

    Attributes:
      in_channels: channels of the images it encodes.
      out_channels: channels of the images it decodes to.
      latent_channels: channels of the latents.
      block_out_channels: width at each resolution, the finest first; each further one halves it.
      layers_per_block: residual layers at each resolution of the encoder; the decoder has one more.
      norm_num_groups: groups of every group norm.
      scaling_factor: latents are `(z - shift_factor) * scaling_factor`.
      shift_factor: see there.
      use_quant_conv: whether a 1x1 convolution follows the encoder.
      use_post_quant_conv: whether one precedes the decoder.
      mid_block_add_attention: whether the coarsest resolution has an attention layer.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # Stable Diffusion 1, and SiT sample.py
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        counts = ("in_channels", "out_channels", "latent_channels", "layers_per_block")
        values = [(name, getattr(self, name)) for name in (*counts, "norm_num_groups")]
        for name, value in (*values, *(("block_out_channels", c) for c in self.block_out_channels)):
            if type(value) is not int or not 1 <= value <= MAX_SIZE:
                raise InputError(
                    f"VAE {name} is {value!r:.99}; it must be an integer in 1..{MAX_SIZE}"
                )
        if not 1 <= len(self.block_out_channels) <= MAX_DEPTH:
            raise InputError(
                f"VAE block_out_channels has {len(self.block_out_channels)} widths; it needs one "
                f"per resolution, 1 to {MAX_DEPTH} of them"
            )
        if self.layers_per_block > MAX_DEPTH:
            raise InputError(
                f"VAE layers_per_block is {self.layers_per_block}; at most {MAX_DEPTH}"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise InputError(
                    f"VAE block_out_channels {width} is not divisible by norm_num_groups "
                    f"{self.norm_num_groups}"
                )
        for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"VAE {name} is {getattr(self, name)!r}; it must be true or false")
        for name in ("scaling_factor", "shift_factor"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InputError(f"VAE {name} is {value!r}; it must be a finite number")
        if not self.scaling_factor:
            raise InputError("VAE scaling_factor is 0; it must be another number")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scale(self, z: Latents) -> Latents:
        """What the encoder gives, as the latents a flow moves."""
        return (z - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: Latents) -> Latents:
        """The reverse of `scale`: what the decoder takes."""
        return latents / self.scaling_factor + self.shift_factor


class Moments(NamedTuple):
    """The encoder's answer, a normal distribution over (unscaled) latents.

    Attributes:
      mean: `[B, H, W, C]`.
      logvar: logarithm of the variance, `[B, H, W, C]`, within [-30, 20].
    """

    mean: Latents
    logvar: Latents

    def sample(self, noise: Latents) -> Latents:
        """A draw, given standard normal noise of the mean's shape."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def mode(self) -> Latents:
        """The likeliest latents."""
        return self.mean


class VAE(nn.Module):
    """The autoencoder; `apply(..., method="encode")` and `method="decode"`.

    Parameters are `encoder` and `decoder`; each method needs its own half only.

    Attributes:
      config: the hyper-parameters.
      dtype: dtype of the convolutions; parameters are float32, results have the input's dtype.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, images: Images) -> Moments:
        """Encodes images.

        Args:
          images: `[B, H, W, in_channels]` float, pixels in [-1, 1]; both sides divisible by
            `config.downsampling`.

        Returns:
          Moments `[B, H / f, W / f, latent_channels]`, not scaled.

        Raises:
          InputError: a side is not divisible, or the number of channels is another.
        """
        factor, channels = self.config.downsampling, self.config.in_channels
        if images.shape[1] % factor or images.shape[2] % factor or images.shape[3] != channels:
            raise InputError(
                f"images are {list(images.shape)}; this VAE wants [B, H, W, {channels}] with H and "
                f"W divisible by {factor}"
            )
        with _precision(self.dtype):
            mean, logvar = jnp.split(self.encoder(images).astype(images.dtype), 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(self, z: Latents) -> Images:
        """Decodes latents.

        Args:
          z: `[B, H, W, latent_channels]` float, not scaled (see `VAEConfig.unscale`).

        Returns:
          Images `[B, H f, W f, out_channels]`, pixels about [-1, 1], not clipped.
        """
        with _precision(self.dtype):
            return self.decoder(z).astype(z.dtype)

    def __call__(self, images: Images) -> NewMaps:
        """Encodes to the mean and decodes it again."""
        return self.decode(self.encode(images).mode())

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Fresh parameters, a nested dict of float32."""
        side = self.config.downsampling
        return self.init(key, jnp.zeros((1, side, side, self.config.in_channels)))["params"]


class Encoder(nn.Module):
    """Images to the two halves of the moments, side by side on channels."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Images) -> NewMaps:
        config, dtype = self.config, self.dtype
        widths = config.block_out_channels
        h = conv(widths[0], dtype, "conv_in")(x.astype(dtype))
        for level, width in enumerate(widths):
            for layer in range(config.layers_per_block):
                name = f"down_{level}_resnet_{layer}"
                h = ResidualLayer(width, config.norm_num_groups, dtype, name=name)(h)
            if level + 1 < len(widths):
                # diffusers downsampling.py pads on the right and at the bottom only.
                name, padding = f"down_{level}_downsample", ((0, 1), (0, 1))
                h = conv(width, dtype, name, strides=(2, 2), padding=padding)(h)
        h = MiddleLayers(config, dtype, name="mid")(h)
        h = nn.silu(GroupNorm(config.norm_num_groups, dtype, name="norm_out")(h))
        h = conv(2 * config.latent_channels, dtype, "conv_out")(h)
        if config.use_quant_conv:
            h = conv(2 * config.latent_channels, dtype, "quant", kernel=1)(h)
        return h


class Decoder(nn.Module):
    """Latents to images."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, z: Maps) -> NewMaps:
        config, dtype = self.config, self.dtype
        widths = config.block_out_channels[::-1]
        h = z.astype(dtype)
        if config.use_post_quant_conv:
            h = conv(config.latent_channels, dtype, "post_quant", kernel=1)(h)
        h = conv(widths[0], dtype, "conv_in")(h)
        h = MiddleLayers(config, dtype, name="mid")(h)
        for level, width in enumerate(widths):
            for layer in range(config.layers_per_block + 1):
                name = f"up_{level}_resnet_{layer}"
                h = ResidualLayer(width, config.norm_num_groups, dtype, name=name)(h)
            if level + 1 < len(widths):
                weights = Weights((3, 3, width, width), name=f"up_{level}_upsample")()
                h = upsample(h, *weights)
        h = nn.silu(GroupNorm(config.norm_num_groups, dtype, name="norm_out")(h))
        return conv(config.out_channels, dtype, "conv_out")(h)


class MiddleLayers(nn.Module):
    """The coarsest resolution: a residual layer, attention, a residual layer."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        groups, dtype, width = self.config.norm_num_groups, self.dtype, x.shape[-1]
        x = ResidualLayer(width, groups, dtype, name="resnet_0")(x)
        if self.config.mid_block_add_attention:
            x = SpatialAttention(groups, dtype, name="attention")(x)
        return ResidualLayer(width, groups, dtype, name="resnet_1")(x)


def _precision(dtype: Any) -> contextlib.AbstractContextManager:
    """What holds while a network of that dtype is traced."""
    # Float32 is to mean float32: accelerators would otherwise round to TF32 or bfloat16.
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
