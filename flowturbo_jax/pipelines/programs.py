"""The compiled programs of a model: noise, guidance, sampler and decoder as one of them.

Parameters are arguments. What selects a program is static: the networks, the schedule, the guidance
mode and the shapes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from flowturbo_jax import guidance as guide
from flowturbo_jax import images, path, sampler
from flowturbo_jax.interfaces import Condition, Flow, ImageBytes, Images, Latents, Rows
from flowturbo_jax.model_directory import Model
from flowturbo_jax.models.refiner import at_all_times
from flowturbo_jax.models.tiles import tiled
from flowturbo_jax.models.vae import Moments
from flowturbo_jax.multistep import Solver
from flowturbo_jax.schedule import Schedule

TILE = 64  # latent pixels: 512 image pixels by the Stable Diffusion VAE
OVERLAP = 16
# So many image pixels go through the VAE at a time: 8 images of 256 x 256, 2 of 512 x 512.
GROUP_PIXELS = 8 * 256 * 256


class Networks:
    """The static part of a model, equal and hashed by what the programs depend on."""

    def __init__(self, model: Model):
        self.predictor, self.refiner, self.vae = model.predictor, model.refiner, model.vae
        self.text_encoder = model.text_encoder
        self.config = model.description.predictor
        self.guided_channels = model.description.guided_channels
        self._key = (
            self.predictor,
            self.refiner,
            self.vae,
            self.config,
            self.guided_channels,
        )
        if self.text_encoder is not None:
            self._key += (self.text_encoder,)

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Networks) and self._key == other._key


def make_flow(
    networks: Any,
    params: Any,
    labels: Rows,
    scale: guide.Scale,
    interval: jax.Array | None,
    guidance: str,
    refining: bool = True,
) -> Flow:
    """The flow of a model's networks under labels.

    Args:
      networks: has `predictor`, `refiner` (or None), `config` and `guided_channels`; of a model
        that takes text `text_encoder`, too.
      params: parameters of both, `(predictor, refiner)`; of a text encoder after them.
      labels: `[B]` int32; for a model that takes text `[B, 2, L]`, token ids of what is wanted and
        of what the images are guided away from.
      scale: guidance scale, a number or `[]` float32.
      interval: first and last flow time of guidance `[2]` float32; None for all of the time.
      guidance: "none", "official" or "paired".
      refining: whether the refiner will be called, if there is one.
    """
    predictor_params, refiner_params, *text_params = params
    condition, null = _conditions(networks, text_params, labels, guidance)

    # Those of `ablation` are to run as they are called, one by one.
    evaluate = _evaluated if isinstance(networks, Networks) else _evaluated.__wrapped__

    def predictor(x, t, condition):
        return evaluate(predictor_params, x, t, condition, network=networks.predictor)

    def refiner(x, v, t, condition):
        return evaluate(refiner_params, x, v, t, condition, network=networks.refiner)

    refining = refining and networks.refiner is not None
    both = [(networks.predictor, predictor_params)]
    both.append((networks.refiner, refiner_params) if refining else (None, None))

    def prepare(times, condition):
        return guide.Conditions(
            *(_prepared(*network, times, condition, len(labels)) for network in both)
        )

    refiner = refiner if refining else None
    if null is None:
        return guide.unguided(predictor, refiner, condition, prepare)
    if guidance == "paired":
        return guide.paired(predictor, refiner, condition, null, scale, interval, prepare)
    channels = networks.guided_channels
    return guide.official(predictor, refiner, condition, null, scale, channels, interval, prepare)


@partial(jax.jit, static_argnames=("network",))
def _evaluated(params: Any, *arguments: Any, network: Any) -> Latents:
    """A network's output; traced once, however many blocks of however many programs call it."""
    return network.apply({"params": params}, *arguments)


def _conditions(
    networks: Any, text_params: Any, labels: Rows, guidance: str
) -> tuple[Condition, Condition]:
    """What the networks take, and that of no label; the latter None without guidance."""
    config = networks.config
    if config.takes_text:
        texts = (
            labels[:, 0] if guidance == "none" else jnp.concatenate([labels[:, 0], labels[:, 1]])
        )
        states = networks.text_encoder.apply({"params": text_params[0]}, texts)
        return states[: len(labels)], None if guidance == "none" else states[len(labels) :]
    if not config.num_classes:
        return None, None
    return labels, None if guidance == "none" else jnp.full_like(labels, config.null_label)


def _prepared(module: Any, params: Any, times: jax.Array, condition: Any, rows: int) -> Any:
    """What a network makes of a condition at each of the times; without `prepare`, the condition.

    A condition of labels is one row each, of which there are `rows` where there are none.
    """
    if module is None:
        return None
    if not hasattr(module, "prepare"):
        return at_all_times(times, condition)
    rows = rows if condition is None else len(condition)
    return module.apply({"params": params}, times, condition, rows, method="prepare")


@partial(jax.jit, static_argnames=("networks", "schedule", "guidance"))
def sample_latents(
    params: Any,
    noise: Latents,
    labels: Rows,
    scale: jax.Array,
    interval: jax.Array | None,
    solver: Solver | None = None,
    *,
    networks: Networks,
    schedule: Schedule,
    guidance: str,
) -> Latents:
    """Latents `[B, H, W, C]` from noise of that shape."""
    flow = make_flow(networks, params, labels, scale, interval, guidance, schedule.needs_refiner)
    return sampler.sample(flow, noise, schedule, solver=solver)


def generate(
    params: Any,
    decoder_params: Any,
    seeds: jax.Array,
    indices: jax.Array,
    labels: Rows,
    scale: jax.Array,
    interval: jax.Array | None,
    solver: Solver | None = None,
    *,
    networks: Networks,
    schedule: Schedule,
    guidance: str,
) -> tuple[ImageBytes, Bool[Array, " batch"]]:
    """Images `[B, H, W, C]` uint8 from `(seed, index)` of each, and whether its pixels are finite.

    Bytes cannot say that a sampler or a decoder diverged; not compiled by itself.
    """
    noise = path.sample_noise(seeds, indices, networks.config.shape)
    flow = make_flow(networks, params, labels, scale, interval, guidance, schedule.needs_refiner)
    latents = sampler.sample(flow, noise, schedule, solver=solver)
    pixels = decoded(networks, decoder_params, latents)
    return images.to_uint8(pixels), jnp.isfinite(pixels).all(axis=(1, 2, 3))


def generate_images(*arguments: Any, **static: Any) -> ImageBytes:
    """The images of `generate`, whose arguments it takes; not compiled by itself."""
    return generate(*arguments, **static)[0]


sample_images = jax.jit(generate_images, static_argnames=("networks", "schedule", "guidance"))


@partial(jax.jit, static_argnames=("networks",))
def decode(decoder_params: Any, latents: Latents, *, networks: Networks) -> ImageBytes:
    """Images `[B, H f, W f, C]` uint8 of latents; the latents' own pixels without a VAE."""
    return images.to_uint8(decoded(networks, decoder_params, latents))


@partial(jax.jit, static_argnames=("networks",))
def encode(
    encoder_params: Any, pixels: ImageBytes, noise: Latents | None, *, networks: Networks
) -> Latents:
    """Latents `[B, H, W, C]` of images: their mean, or with noise of that shape a draw."""
    return encoded(networks, encoder_params, pixels, noise)


def encoded(
    networks: Networks, encoder_params: Any, pixels: ImageBytes, noise: Latents | None = None
) -> Latents:
    """Latents of images, as `encode`, which compiles it; without a VAE the pixels in [-1, 1]."""
    x = images.from_uint8(pixels)
    if networks.vae is None:
        return x

    def moments(x: jax.Array) -> jax.Array:
        return jnp.concatenate(
            networks.vae.apply({"params": encoder_params}, x, method="encode"), axis=-1
        )

    config = networks.vae.config
    both = _in_groups(lambda x: tiled(moments, x, TILE, OVERLAP, (config.downsampling, 1)), x, 1)
    mean, logvar = jnp.split(both, 2, axis=-1)
    found = Moments(mean, logvar)
    return config.scale(found.mode() if noise is None else found.sample(noise))


def decoded(networks: Networks, decoder_params: Any, latents: Latents) -> Images:
    """Pixels of latents, about [-1, 1]."""
    if networks.vae is None:
        return latents

    def one(z: jax.Array) -> jax.Array:
        return networks.vae.apply({"params": decoder_params}, z, method="decode")

    config = networks.vae.config
    z = config.unscale(latents)
    return _in_groups(
        lambda z: tiled(one, z, TILE, OVERLAP, (1, config.downsampling)),
        z,
        config.downsampling,
    )


def _in_groups(function: Callable[[jax.Array], jax.Array], x: jax.Array, scale: int) -> jax.Array:
    """Applies a function of a batch to a few pictures at a time, which bounds its memory."""
    group = max(1, GROUP_PIXELS // (x.shape[1] * x.shape[2] * scale**2))
    if len(x) <= group:
        return function(x)
    return jax.lax.map(lambda one: function(one[None])[0], x, batch_size=group)
