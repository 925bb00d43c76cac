"""Keeping what is known of a picture while the rest is sampled, as functions for the sampler.

What is known lies on the path between the noise that sampling starts from and its data, so that its
points and its velocity, data - noise, are known at every time. Source: PAPER section 8 for the
merge after each step; RePaint (Lugmayr et al. 2022) for steps that are made again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Bool

from flowturbo_jax import path
from flowturbo_jax.interfaces import Flow, Latents, Memory, Moment, State, Time


class Known(NamedTuple):
    """The known part of latents.

    Attributes:
      noise: what sampling starts from, `[B, ...]`.
      data: the latents of the picture, same shape and dtype.
      free: bool, where they are repainted; broadcasts to that shape.
    """

    noise: Latents
    data: Latents
    free: Bool[Array, " batch *point"]

    def at(self, x: Latents, t: Time) -> Latents:
        """x with the known part as it is at flow time t."""
        return jnp.where(self.free, x, path.interpolate(self.noise, self.data, t))

    def after_step(self, state: State, t: Time) -> State:
        """Puts the known part back on its path; for `sample(..., after_step=...)`."""
        return state._replace(x=self.at(state.x, t))

    def rewound(self, state: State, t: Time, t_before: Time, fresh: Latents) -> State:
        """A state taken back to t_before with fresh noise, for `integrate(..., rewind=...)`.

        A velocity and its point say which data they lead to, x + (1 - t) v. What is remembered
        leads there from the new point, too: P and R would else start from that of another noise.
        """
        x = self.at(path.renoise(state.x, fresh, t, t_before), t_before)

        def redirected(v: Latents) -> Latents:
            start, new = (jnp.broadcast_to(point, v.shape) for point in (state.x, x))
            found = (start + (1 - t) * v.astype(x.dtype) - new) / (1 - t_before)
            return found.astype(v.dtype)

        # The history, too, whose velocities led on to where the state is now.
        return State(x, *jax.tree.map(redirected, (state.memory, state.history)))

    def remember(self, memory: Memory) -> Memory:
        """A memory whose velocities are the path's in the known part."""
        return self._fill(memory, path.velocity(self.noise, self.data))

    def pinned(self, flow: Flow) -> Flow:
        """A flow that moves the known part along its path, whatever the networks say there.

        Then the points at which a block evaluates, between the merges after its steps, are those
        of the path, too, and what it hands on is consistent with them.
        """

        def refine(x: Latents, t: Time | Moment, memory: Memory) -> Memory:
            return self._fill(flow.refine(x, t, memory), jnp.zeros_like(self.data))

        return flow._replace(
            predict=lambda x, t: self.remember(flow.predict(x, t)),
            refine=refine if flow.refine else None,
        )

    def _fill(self, memory: Memory, value: Latents) -> Memory:
        # A memory is of velocities, maybe of several branches in front of the batch.
        return jax.tree.map(
            lambda leaf: jnp.where(self.free, leaf, value.astype(leaf.dtype)), memory
        )


def latent_mask(mask: Bool[Array, "batch height width"], factor: int) -> Bool[Array, "..."]:
    """Where latents are repainted: where any of the pixels that one covers is.

    Args:
      mask: `[B, H, W]` bool over pixels, true = repaint.
      factor: pixels to a latent, along a side.

    Returns:
      `[B, H / factor, W / factor, 1]` bool.
    """
    return reduce(mask, "b (h i) (w j) -> b h w 1", "any", i=factor, j=factor)
