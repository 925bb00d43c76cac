"""Refuses weights whose tensors are a velocity network's, but which predict something else."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flowturbo_jax import path
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.weights.files import Weights
from flowturbo_jax.weights.tensor import quoted

# A velocity toward data has a cosine near -1 with the noise it starts from, predicted noise near 1.
NOISE_COSINE = 0.5


def check_objective(file: Path, weights: Weights) -> None:
    """Refuses weights that say themselves that they predict something else than our velocity."""
    said = {
        key: str(weights.arguments.get(key, "")) for key in ("model", "prediction", "path_type")
    }
    said = {key: value[:50] for key, value in said.items()}
    if re.match(r"DiT\b", said["model"]) or re.match(r"DiT-", file.name):
        raise InputError(f"{file.name} holds a DiT, which predicts noise; a velocity is needed")
    if said["prediction"] not in ("", "velocity", "v"):
        raise InputError(
            f"{file.name} was trained to predict {quoted(said['prediction'])}, not velocity"
        )
    if said["path_type"].lower() not in ("", "linear"):
        raise InputError(
            f"{file.name} was trained on the path {quoted(said['path_type'])}; only the linear "
            "one, x = (1 - t) noise + t data, is sampled here"
        )


def check_direction(
    module: nn.Module, params: Params, config: Any, states: jax.Array | None = None
) -> None:
    """Refuses a predictor whose output at t = 0 points toward the noise instead of away from it.

    Random weights point nowhere and pass.

    Args:
      module: the predictor.
      params: its parameters.
      config: its hyper-parameters.
      states: of the empty text `[1, L, D]`, for a predictor that takes text.

    Raises:
      InputError: it does, as DiT's and other noise-predicting weights do.
    """
    arrays = jax.tree.map(jnp.asarray, params)
    try:
        cosine = float(noise_cosine(arrays, states, module=module, config=config))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"evaluating the predictor once failed ({reason:.200}); --skip-direction-check leaves "
            "that out"
        ) from error
    for array in jax.tree.leaves(arrays):  # now, so that the copy is gone before the next one
        array.delete()
    if math.isnan(cosine):
        raise InputError("the predictor's output is not finite; its weights are no trained ones")
    if cosine > NOISE_COSINE:
        raise InputError(
            f"at t = 0 the predictor's output points toward the noise (cosine {cosine:.2f}), where "
            "a velocity points to the data: these are weights of a noise-predicting model such as "
            'DiT, or of a reversed clock (then give a config with {"reversed_time": true})'
        )


@functools.partial(jax.jit, static_argnames=("module", "config"))
def noise_cosine(
    params: Params, states: jax.Array | None = None, *, module: nn.Module, config: Any
) -> jax.Array:
    """Cosine between the predictor's output and the noise it gets at t = 0, `[]`."""
    noise = path.sample_noise(jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.uint32), config.shape)
    label = config.null_label if config.null_label is not None else 0
    labels = jnp.full(1, label, jnp.int32) if config.num_classes else states
    out = module.apply({"params": params}, noise, jnp.zeros(()), labels)
    return jnp.vdot(out, noise) / (jnp.linalg.norm(out) * jnp.linalg.norm(noise) + 1e-12)
