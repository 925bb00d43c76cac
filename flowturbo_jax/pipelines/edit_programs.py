"""The compiled programs that start from images: editing, inpainting, and the way back to noise.

As in programs.py, parameters are arguments, and a task is one program from bytes to bytes.
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from flowturbo_jax import images, inpainting, path, sampler
from flowturbo_jax.interfaces import ImageBytes, Latents, Rows
from flowturbo_jax.multistep import Solver
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.programs import Networks
from flowturbo_jax.schedule import Schedule

STATIC = ("networks", "schedule", "guidance")
UNGUIDED = 1.0  # the scale that goes with guidance "none"


@partial(jax.jit, static_argnames=(*STATIC, "inversion"))
def edit(
    params: Any,
    vae_params: Any,
    pixels: ImageBytes,
    source_labels: Rows | None,
    strength: Float[Array, ""],
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
    inversion: Schedule | None,
) -> ImageBytes:
    """Images `[B, H, W, C]` uint8: taken back to t = 1 - strength, and sampled from there.

    The way back is by mixing with noise, or by inverting the flow under the source labels where
    there is a schedule for that.
    """
    data = programs.encoded(networks, vae_params, pixels)
    t = 1 - strength
    if inversion is None:
        x = path.interpolate(path.sample_noise(seeds, indices, data.shape[1:]), data, t)
    else:
        there = programs.make_flow(
            networks, params, source_labels, UNGUIDED, None, "none", refining=False
        )
        x = sampler.invert(there, data, inversion, t)
    back = programs.make_flow(
        networks, params, labels, scale, interval, guidance, schedule.needs_refiner
    )
    latents = sampler.sample(back, x, schedule, t, solver=solver)
    return images.to_uint8(programs.decoded(networks, vae_params, latents))


@partial(jax.jit, static_argnames=(*STATIC, "tries"))
def inpaint(
    params: Any,
    vae_params: Any,
    pixels: ImageBytes,
    weights: Float[Array, "batch height width"],
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
    tries: int,
) -> ImageBytes:
    """Images `[B, H, W, C]` uint8, repainted where weights are above 0, each by its weight.

    A latent is repainted where any of the pixels it covers is.
    """
    data = programs.encoded(networks, vae_params, pixels)
    factor = pixels.shape[1] // data.shape[1]
    free = inpainting.latent_mask(weights > 0, factor)
    noise = path.sample_noise(seeds, indices, data.shape[1:])
    flow = programs.make_flow(
        networks, params, labels, scale, interval, guidance, schedule.needs_refiner
    )
    known = inpainting.Known(noise, data, free)

    def rewind(state, t, t_before, number):
        fresh = path.sample_noise(seeds, indices, data.shape[1:], number)
        return known.rewound(state, t, t_before, fresh)

    state, _ = sampler.integrate(
        known.pinned(flow),
        noise,
        schedule,
        after_step=known.after_step,
        rewind=rewind,
        tries=tries,
        solver=solver,
    )
    made = images.to_uint8(programs.decoded(networks, vae_params, state.x))
    return images.composite(pixels, made, weights[..., None])


@partial(jax.jit, static_argnames=STATIC)
def invert(
    params: Any,
    vae_params: Any,
    pixels: ImageBytes,
    labels: Rows,
    scale: jax.Array,
    interval: jax.Array | None,
    solver: Solver | None = None,
    *,
    networks: Networks,
    schedule: Schedule,
    guidance: str,
) -> Latents:
    """The noise `[B, H, W, C]` float32 that images came from."""
    data = programs.encoded(networks, vae_params, pixels)
    flow = programs.make_flow(networks, params, labels, scale, interval, guidance, refining=False)
    return sampler.invert(flow, data, schedule)
