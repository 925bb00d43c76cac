"""What training carries from step to step, and how one optimiser step changes it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from flowturbo_jax.interfaces import Params

# Parameters that are loaded, not learnt; weight decay must not touch them either.
FROZEN = ("position_table",)


class TrainState(NamedTuple):
    """All that a step depends on besides its batch; saving it saves the run.

    Attributes:
      step: `[]` int32, optimiser steps made.
      params: the parameters being trained.
      ema_params: their exponential moving average.
      opt_state: the optimiser's.
    """

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the parameters themselves."""
    params = jax.tree.map(jnp.asarray, params)
    average = jax.tree.map(jnp.copy, params)  # a buffer of its own: the state is donated whole
    return TrainState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))


def make_optimizer(
    learning_rate: float,
    steps: int,
    decay: str = "constant",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    gradient_clip: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (betas 0.9 and 0.999, epsilon 1e-8, PyTorch's defaults) with its learning rate.

    Args:
      learning_rate: at its highest.
      steps: length of the run, where a cosine ends at 0.
      decay: "constant" or "cosine".
      warmup_steps: steps of linear rise from 0.
      weight_decay: decoupled, on all but the frozen parameters.
      gradient_clip: largest global norm of the gradient; 0 for no limit.
    """
    rate = learning_rates(learning_rate, steps, decay, warmup_steps)
    clip = optax.clip_by_global_norm(gradient_clip) if gradient_clip else optax.identity()
    return optax.chain(clip, optax.adamw(rate, weight_decay=weight_decay, mask=_learnt))


def learning_rates(
    learning_rate: float, steps: int, decay: str = "constant", warmup_steps: int = 0
) -> optax.Schedule:
    """The learning rate at a step; the arguments are those of `make_optimizer`."""
    if decay == "cosine":
        rate = optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1))
    else:
        rate = optax.constant_schedule(learning_rate)
    if warmup_steps:
        rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        rate = optax.join_schedules([rise, rate], [warmup_steps])
    return rate


def _learnt(params: Params) -> Params:
    """True for every parameter that is trained."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(getattr(key, "key", None) in FROZEN for key in path), params
    )


def ema_rate(step: Int[Array, ""], decay: float, warmup: bool) -> jax.Array:
    """Decay of the moving average at a step, `[]` float32.

    With `warmup` it is min(decay, (1 + step) / (10 + step)), so that a run shorter than the
    average's memory of 1 / (1 - decay) steps does not end near its random start.
    """
    rate = jnp.asarray(decay, jnp.float32)
    if not warmup:
        return rate
    count = step.astype(jnp.float32)
    return jnp.minimum(rate, (1 + count) / (10 + count))


def apply_gradients(
    state: TrainState,
    gradients: Params,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    ema_warmup: bool = False,
) -> TrainState:
    """One optimiser step, then the moving average `ema <- d ema + (1 - d) params`.

    Args:
      state: before the step.
      gradients: of the loss, like state.params.
      optimizer: the transformation whose state it is.
      ema_decay: d, in [0, 1).
      ema_warmup: whether d rises to ema_decay; see `ema_rate`.

    Returns:
      The state after the step.
    """
    # optax multiplies integer counts and floats, which strict dtype promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    d = ema_rate(state.step, ema_decay, ema_warmup)
    ema_params = jax.tree.map(
        # Rounding would move the average of a constant, so what is frozen is copied.
        lambda learnt, average, new: d * average + (1 - d) * new if learnt else new,
        _learnt(params),
        state.ema_params,
        params,
    )
    return TrainState(state.step + 1, params, ema_params, opt_state)
