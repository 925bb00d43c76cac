"""Classifier-free guidance: builds a Flow from network functions and conditions.

`predictor(x, t, condition) -> velocity` and `refiner(x, v, t, condition) -> offset` are pure
functions over arrays whose first axis is the batch; a condition is any pytree of such arrays.
The guided velocity is `uncond + scale (cond - uncond)`; scale 1 is no guidance. Both guided modes
evaluate each network once per call, on the two branches side by side in one batch, and cost the
same. Guidance may be limited to an interval of flow time, outside of which only the conditional
branch is evaluated. Source: PAPER section 4.

What the networks make of time and condition alone can be had for all times of a schedule at once,
by a function `prepare(times, condition) -> Conditions`; the networks then get that as condition.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import Condition, Flow, InputError, Latents, Moment, Time, Velocity

PredictorFunction = Callable[[Latents, Time, Condition], Velocity]
RefinerFunction = Callable[[Latents, Velocity, Time, Condition], Velocity]
PrepareFunction = Callable[[Float[Array, " times"], Condition], "Conditions"]
Scale = Float[Array, ""] | float
Interval = Float[Array, "2"] | tuple[float, float]
Branches = Float[Array, "2 batch *point"]  # conditional first, unconditional second

MODES = ("none", "official", "paired")
ROUNDING = 1e-6  # of a time grid in float32, so that its points at an end of an interval are inside


class Conditions(NamedTuple):
    """What the networks take in place of a condition; of many times, behind an axis `[N]`.

    Attributes:
      predictor: a pytree of arrays, batch first.
      refiner: the same for the refiner; None where there is no refiner.
    """

    predictor: Condition
    refiner: Condition


def check_interval(interval: Any) -> tuple[float, float] | None:
    """An interval of flow time as two floats, or None where it is the whole of [0, 1].

    Args:
      interval: two numbers, text such as "0.1:0.8", or None for all of the time.

    Raises:
      InputError: they are no numbers that rise within [0, 1].
    """
    if interval is None:
        return None
    try:
        ends = interval.split(":") if isinstance(interval, str) else interval
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"guidance_interval is {interval!r}; it must be two flow times, such as 0.1:0.8"
        ) from error
    if not 0 <= low < high <= 1:
        raise InputError(
            f"guidance_interval is ({low:g}, {high:g}); it must rise within [0, 1], 0 being noise"
        )
    return None if (low, high) == (0, 1) else (low, high)


def inside(t: Any, interval: Interval) -> Any:
    """Whether guidance acts at a flow time, both ends of the interval included.

    Args:
      t: a number or an array.
      interval: first and last flow time of guidance.
    """
    low, high = interval
    return (t >= low - ROUNDING) & (t <= high + ROUNDING)


def unguided(
    predictor: PredictorFunction,
    refiner: RefinerFunction | None,
    condition: Condition,
    prepare: PrepareFunction | None = None,
) -> Flow:
    """A flow under one condition, without guidance; its memory is the velocity `[B, ...]`.

    Args:
      predictor: the big network.
      refiner: the small network, or None.
      condition: what both are conditioned on, batch first.
      prepare: what they make of it at given times, or None.
    """

    def predict(x, t):
        time, given = _at(t, condition)
        return predictor(x, time, given.predictor)

    def refine(x, t, memory):
        time, given = _at(t, condition)
        return refiner(x, memory, time, given.refiner)

    ready = None if prepare is None else lambda times: prepare(times, condition)
    return Flow(predict, refine if refiner else None, prepare=ready)


def paired(
    predictor: PredictorFunction,
    refiner: RefinerFunction | None,
    condition: Condition,
    null_condition: Condition,
    scale: Scale,
    interval: Interval | None = None,
    prepare: PrepareFunction | None = None,
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
      interval: first and last flow time of guidance, ends included, `[2]`; may be traced; None for
        all of the time. Source: Kynkäänniemi et al. 2024, "Applying Guidance in a Limited
        Interval Improves Sample and Distribution Quality in Diffusion Models".
      prepare: what the networks make of a condition at given times, or None.
    """
    branches = _Branches(predictor, refiner, condition, null_condition, interval, prepare)

    def drift(memory: Branches) -> Velocity:
        return _guide(memory, scale)

    refine = branches.refine if refiner else None
    return Flow(branches.predict, refine, drift, branches.recall, branches.prepare)


def official(
    predictor: PredictorFunction,
    refiner: RefinerFunction | None,
    condition: Condition,
    null_condition: Condition,
    scale: Scale,
    guided_channels: int | None = None,
    interval: Interval | None = None,
    prepare: PrepareFunction | None = None,
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
      interval: as in `paired`. What R steps refine after its end stays guided: the velocity they
        remember was.
      prepare: as in `paired`.

    Source: FlowTurbo models_assemble.py, forward_with_cfg (guided_channels=3).
    """
    branches = _Branches(predictor, refiner, condition, null_condition, interval, prepare)

    def guide(pair: Branches) -> Branches:
        guided = _guide(pair[..., :guided_channels], scale)
        both = jnp.stack([guided, guided])
        if guided_channels is None:
            return both
        return jnp.concatenate([both, pair[..., guided_channels:]], axis=-1)

    def refine(x: Latents, t: Time | Moment, memory: Branches) -> Branches:
        return guide(branches.refine(x, t, memory))

    return Flow(
        lambda x, t: guide(branches.predict(x, t)),
        refine if refiner else None,
        lambda memory: memory[0],
        branches.recall,
        branches.prepare,
    )


def _guide(pair: Branches, scale: Scale) -> Velocity:
    cond, uncond = pair
    return uncond + jnp.asarray(scale, uncond.dtype) * (cond - uncond)


class _Branches:
    """Both branches' networks as one evaluation over a doubled batch, `[2, B, ...]` out.

    Outside the interval the conditional branch alone is evaluated and stands for both, so that
    their difference, and with it guidance, is exactly zero.
    """

    def __init__(self, predictor, refiner, condition, null_condition, interval, prepare):
        self._predictor = predictor
        self._refiner = refiner
        self._interval = interval
        self._conditions = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), condition, null_condition
        )
        self.prepare = None if prepare is None else lambda times: prepare(times, self._conditions)

    def _given(self, t: Time | Moment, rows: int | None = None) -> tuple[Time, Conditions]:
        """A time, and what the networks take at it: for all rows, or for so many of the first."""
        time, given = _at(t, self._conditions)
        return time, given if rows is None else jax.tree.map(lambda a: a[:rows], given)

    def predict(self, x: Latents, t: Time | Moment) -> Branches:
        def both() -> Branches:
            time, given = self._given(t)
            return _split(self._predictor(jnp.concatenate([x, x]), time, given.predictor))

        def conditional() -> Velocity:
            time, given = self._given(t, len(x))
            return self._predictor(x, time, given.predictor)

        return self._where_guided(t, both, conditional)

    def refine(self, x: Latents, t: Time | Moment, memory: Branches) -> Branches:
        def both() -> Branches:
            time, given = self._given(t)
            v = memory.reshape(-1, *memory.shape[2:])
            return _split(self._refiner(jnp.concatenate([x, x]), v, time, given.refiner))

        def conditional() -> Velocity:
            time, given = self._given(t, len(x))
            return self._refiner(x, memory[0], time, given.refiner)

        return self._where_guided(t, both, conditional)

    def recall(self, memory: Branches, t: Time | Moment) -> Branches:
        if self._interval is None:
            return memory
        return jnp.where(self._guided(t), memory, _twice(memory[0]))

    def _where_guided(self, t, both, conditional) -> Branches:
        if self._interval is None:
            return both()
        return jax.lax.cond(self._guided(t), both, lambda: _twice(conditional()))

    def _guided(self, t: Time | Moment) -> jax.Array:
        return inside(t.t if isinstance(t, Moment) else t, self._interval)


def _at(t: Time | Moment, condition: Condition) -> tuple[Time, Conditions]:
    """A time, and what the networks take as condition at it."""
    if isinstance(t, Moment):
        return t.t, t.prepared
    return t, Conditions(condition, condition)


def _twice(velocity: Velocity) -> Branches:
    return jnp.stack([velocity, velocity])


def _split(both: Float[Array, " rows *point"]) -> Branches:
    return both.reshape(2, -1, *both.shape[1:])
