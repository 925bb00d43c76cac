"""What the networks of a model cost, counted from their traced programs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowturbo_jax.cost import multiply_adds, parameter_count
from flowturbo_jax.model_description import Description
from flowturbo_jax.model_directory import abstract_params, modules


class Cost(NamedTuple):
    """One kind of evaluation, for one image and one branch of guidance.

    Attributes:
      what: "predictor", "refiner", "vae decode", "vae encode" or "text encoder".
      parameters: how many numbers it holds.
      multiply_adds: how many it does.
    """

    what: str
    parameters: int
    multiply_adds: int


def network_costs(description: Description) -> list[Cost]:
    """The cost of every network of a model; nothing is computed, no weights are needed."""
    networks = modules(description)
    x = jax.ShapeDtypeStruct((1, *description.predictor.shape), jnp.float32)
    t = jax.ShapeDtypeStruct((), jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32) if description.predictor.num_classes else None
    encoder, ids = description.text_encoder, None
    if encoder is not None:
        ids = jax.ShapeDtypeStruct((1, encoder.max_length), jnp.int32)
        labels = jax.ShapeDtypeStruct((*ids.shape, encoder.hidden_size), jnp.float32)
    pixels = jax.ShapeDtypeStruct((1, *description.image_shape), jnp.float32)
    calls = {
        "predictor": [("predictor", None, (x, t, labels))],
        "refiner": [("refiner", None, (x, x, t, labels))],
        "vae": [("vae decode", "decode", (x,)), ("vae encode", "encode", (pixels,))],
        "text_encoder": [("text encoder", None, (ids,))],
    }
    costs = []
    for name, module in networks.items():
        params = abstract_params(module)
        for what, method, arguments in calls[name]:
            half = {"decode": "decoder", "encode": "encoder"}.get(method)
            used = params if half is None else {half: params[half]}

            def call(params, *arguments, module=module, method=method):
                return module.apply({"params": params}, *arguments, method=method)

            costs.append(Cost(what, parameter_count(used), multiply_adds(call, used, *arguments)))
    return costs
