"""The velocity refiner: a shallow network of the predictor's family over [x, v].

Source: PAPER section 3, eq. 7-10.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import BatchTime, Condition, Latents, Params, Time, Velocity


def at_all_times(times: Float[Array, " times"], condition: Condition) -> Condition:
    """A condition that is the same at every time, its arrays `[N, ...]`."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (len(times), *a.shape)), condition)


class Refiner(nn.Module):
    """Predicts the offset r(x, v, t) that turns a remembered velocity into the one at (x, t).

    Attributes:
      network: any predictor network `(x, t, condition) -> [B, H, W, C]` with 2 C input channels.
        Its parameters are the refiner's: nothing is added, not even a name.
    """

    network: nn.Module

    def setup(self):
        nn.share_scope(self, self.network)

    def __call__(
        self, x: Latents, v: Velocity, t: Time | BatchTime, condition: Condition
    ) -> Velocity:
        """Evaluates the refiner.

        Args:
          x: latents `[B, H, W, C]` float.
          v: remembered velocity `[B, H, W, C]`, dtype of x.
          t: flow time of x, `[]` or `[B]` float32.
          condition: what the network takes, for instance labels `[B]` int, or what `prepare` made.

        Returns:
          Offset `[B, H, W, C]`, dtype of x; the refined velocity is offset + v.
        """
        return self.network(jnp.concatenate([x, v], axis=-1), t, condition)

    def prepare(self, times: Float[Array, " times"], condition: Condition, rows: int) -> Condition:
        """As the network's own `prepare`; the condition itself for every time where it has none."""
        if not hasattr(self.network, "prepare"):
            return at_all_times(times, condition)
        return self.network.prepare(times, condition, rows)

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Fresh parameters, with which every offset is zero: "keep the old velocity"."""
        return self.network.initialise(key)
