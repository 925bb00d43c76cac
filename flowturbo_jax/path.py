"""The straight path between noise and data, shared by training, editing and tests.

`x_t = (1 - t) noise + t data`, velocity `u = data - noise`; t = 0 is noise, t = 1 is data.
Source: PAPER section 1 (SiT's convention; the FlowTurbo paper writes it the other way round).
"""

import jax
import jax.numpy as jnp

from flowturbo_jax.interfaces import BatchTime, Latents, Time, Velocity


def per_sample(t: Time | BatchTime, x: Latents) -> jax.Array:
    """t shaped to multiply x: `[]` stays, `[B]` becomes `[B, 1, ...]`."""
    return t if t.ndim == 0 else t.reshape(t.shape + (1,) * (x.ndim - 1))


def interpolate(noise: Latents, data: Latents, t: Time | BatchTime) -> Latents:
    """The point on the path at flow time t, `[B, ...]`, dtype of noise.

    Args:
      noise: start of the path `[B, ...]` float.
      data: end of the path, same shape and dtype.
      t: flow time, `[]` or `[B]`, same dtype.
    """
    t = jnp.broadcast_to(per_sample(t, noise), noise.shape)
    return (1 - t) * noise + t * data


def velocity(noise: Latents, data: Latents) -> Velocity:
    """The path's velocity `data - noise`, `[B, ...]`, the same at every t."""
    return data - noise


def renoise(x: Latents, noise: Latents, t: Time, t_before: Time) -> Latents:
    """A point at t taken back to an earlier time, as the path's distribution has it there.

    x t_before / t + sqrt((1 - t_before)^2 - (t_before / t)^2 (1 - t)^2) noise: the data's share
    shrinks to t_before, and fresh noise makes up what is then missing of noise.

    Args:
      x: `[B, ...]` float at t.
      noise: standard normal, same shape and dtype.
      t: flow time of x, above 0.
      t_before: flow time to go back to, at most t.
    """
    share = t_before / t
    missing = (1 - t_before) ** 2 - (share * (1 - t)) ** 2
    return share * x + jnp.sqrt(jnp.maximum(missing, 0)) * noise


def sample_noise(
    seeds: jax.Array, indices: jax.Array, shape: tuple[int, ...], draw: jax.Array | None = None
) -> Latents:
    """Standard normal noise in which image i depends on (seeds[i], indices[i]) and nothing else.

    Args:
      seeds: `[B]` uint32, one seed per image.
      indices: `[B]` uint32, the image's number within its seed.
      shape: shape of one image's latents, `[H, W, C]`.
      draw: `[]` int, for further noise of the same images; None for the noise they start from.

    Returns:
      Noise `[B, *shape]` float32.
    """

    def one(seed, index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        key = key if draw is None else jax.random.fold_in(key, draw)
        return jax.random.normal(key, shape, jnp.float32)

    return jax.vmap(one)(seeds, indices)
