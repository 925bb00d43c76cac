"""Classifier-free guidance: builds a Flow from network functions and conditions.

`predictor(x, t, condition) -> velocity` and `refiner(x, v, t, condition) -> offset` are pure
functions over arrays whose first axis is the batch; a condition is any pytree of such arrays.
The guided velocity is `uncond + scale (cond - uncond)`; scale 1 is no guidance. Both guided modes
evaluate each network once per call, on the two branches side by side in one batch, and cost the
same. Source: PAPER section 4.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import Condition, Flow, Latents, Time, Velocity

PredictorFunction = Callable[[Latents, Time, Condition], Velocity]
RefinerFunction = Callable[[Latents, Velocity, Time, Condition], Velocity]
Scale = Float[Array, ""] | float
Branches = Float[Array, "2 batch *point"]  # conditional first, unconditional second

MODES = ("none", "official", "paired")


def unguided(
    predictor: PredictorFunction, refiner: RefinerFunction | None, condition: Condition
) -> Flow:
    """A flow under one condition, without guidance; its memory is the velocity `[B, ...]`.

    Args:
      predictor: the big network.
      refiner: the small network, or None.
      condition: what both are conditioned on, batch first.
    """

    def refine(x, t, memory):
        return refiner(x, memory, t, condition)

    return Flow(lambda x, t: predictor(x, t, condition), refine if refiner else None)


def paired(
    predictor: PredictorFunction,
    refiner: RefinerFunction | None,
    condition: Condition,
    null_condition: Condition,
    scale: Scale,
) -> Flow:
    """Remembers and refines each branch under its own condition; guides only what moves x.

    This is what the refiner's training objective asks for (FlowTurbo eq. 13), and is better than
    the official mode where refiner steps follow each other (docs/digits.md).

    Args:
      predictor: the big network.
      refiner: the small network, or None.
      condition: condition of the conditional branch, batch first.
      null_condition: its dropped version, same structure and shapes.
      scale: guidance scale, `[]`; may be traced.
    """
    branches = _Branches(predictor, refiner, condition, null_condition)

    def drift(memory: Branches) -> Velocity:
        return _guide(memory, scale)

    return Flow(branches.predict, branches.refine if refiner else None, drift)


def official(
    predictor: PredictorFunction,
    refiner: RefinerFunction | None,
    condition: Condition,
    null_condition: Condition,
    scale: Scale,
    guided_channels: int | None = None,
) -> Flow:
    """Remembers velocities that are guided already, and guides the refiner's offsets likewise.

    The first `guided_channels` channels of both branches hold the guided velocity; the others each
    branch's own, and x is moved by the conditional branch. That is what the published SiT numbers
    were made with, on 3 of 4 channels.

    Args:
      predictor: the big network.
      refiner: the small network, or None.
      condition: condition of the conditional branch, batch first.
      null_condition: its dropped version, same structure and shapes.
      scale: guidance scale, `[]`; may be traced.
      guided_channels: how many of the last axis are guided; None guides all.

    Source: FlowTurbo models_assemble.py, forward_with_cfg (guided_channels=3).
    """
    branches = _Branches(predictor, refiner, condition, null_condition)

    def guide(pair: Branches) -> Branches:
        guided = _guide(pair[..., :guided_channels], scale)
        both = jnp.stack([guided, guided])
        if guided_channels is None:
            return both
        return jnp.concatenate([both, pair[..., guided_channels:]], axis=-1)

    def refine(x: Latents, t: Time, memory: Branches) -> Branches:
        return guide(branches.refine(x, t, memory))

    return Flow(
        lambda x, t: guide(branches.predict(x, t)),
        refine if refiner else None,
        lambda memory: memory[0],
    )


def _guide(pair: Branches, scale: Scale) -> Velocity:
    cond, uncond = pair
    return uncond + jnp.asarray(scale, uncond.dtype) * (cond - uncond)


class _Branches:
    """Both branches' networks as one evaluation over a doubled batch, `[2, B, ...]` out."""

    def __init__(self, predictor, refiner, condition, null_condition):
        self._predictor = predictor
        self._refiner = refiner
        self._conditions = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), condition, null_condition
        )

    def predict(self, x: Latents, t: Time) -> Branches:
        return _split(self._predictor(jnp.concatenate([x, x]), t, self._conditions))

    def refine(self, x: Latents, t: Time, memory: Branches) -> Branches:
        v = memory.reshape(-1, *memory.shape[2:])
        return _split(self._refiner(jnp.concatenate([x, x]), v, t, self._conditions))


def _split(both: Float[Array, " rows *point"]) -> Branches:
    return both.reshape(2, -1, *both.shape[1:])
