"""A predictor of text together with its text encoder, to train both at once."""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flowturbo_jax.interfaces import BatchTime, Latents, Params, Time


class TextPredictor(nn.Module):
    """Velocity of a flow at (x, t) under token ids.

    Its parameters are `predictor`, those of the one, and `text_encoder`, those of the other.

    Attributes:
      predictor: module `(x, t, states) -> velocity`.
      text_encoder: module `(ids) -> states`.
    """

    predictor: nn.Module
    text_encoder: nn.Module

    def __call__(
        self, x: Latents, t: Time | BatchTime, ids: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch height width channels"]:
        """Evaluates both; arguments as the predictor's, but for the ids `[B, L]` int32."""
        return self.predictor(x, t, self.text_encoder(ids))

    @nn.nowrap
    def initialise(self, key: jax.Array) -> Params:
        """Fresh parameters of both."""
        networks: dict[str, Any] = {"predictor": self.predictor, "text_encoder": self.text_encoder}
        keys = jax.random.split(key, len(networks))
        pairs = zip(networks.items(), keys, strict=True)
        return {name: network.initialise(one) for (name, network), one in pairs}
