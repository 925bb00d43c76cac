"""Training objectives: arrays in, loss per sample out; no optimiser and no device code.

Every random draw is a function of a key per sample, so that a batch split over devices draws the
same numbers as the whole batch on one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flowturbo_jax import path
from flowturbo_jax.interfaces import BatchTime, Condition, Latents, Velocity

Losses = Float[Array, " batch"]
Keys = Key[Array, " batch"]
LABEL_HANDLING = ("paper", "official")


def flow_matching_loss(
    predictor: Callable[[Latents, BatchTime, Condition], Velocity],
    data: Latents,
    noise: Latents,
    t: BatchTime,
    condition: Condition,
) -> Losses:
    """Mean squared error of the velocity on the straight path, `[B]` float32.

    `mean (v(x_t, t, c) - (data - noise))^2`, the mean over all but the batch.

    Args:
      predictor: `(x, t, condition) -> velocity`.
      data: `[B, ...]` float32.
      noise: `[B, ...]` float32.
      t: flow times `[B]` float32.
      condition: dropped already where it is to be dropped.

    Source: SiT transport, linear path, velocity prediction.
    """
    predicted = predictor(path.interpolate(noise, data, t), t, condition)
    return _mean_square(predicted - path.velocity(noise, data))


def refiner_loss(
    refiner: Callable[[Latents, Velocity, BatchTime, Condition], Velocity],
    teacher: Callable[[Latents, BatchTime, Condition], Velocity],
    data: Latents,
    noise: Latents,
    t: BatchTime,
    dt: BatchTime,
    condition: Condition,
    dropped: Condition,
    label_handling: str = "paper",
) -> Losses:
    """How far the refined old velocity is from the teacher's new one, one Euler step on, `[B]`.

    v = teacher(x_t, t); x' = x_t + dt v;
    `mean (refiner(x', v, t + dt) + v - teacher(x', t + dt))^2`. The teacher gets no gradient.

    Args:
      refiner: `(x, v, t, condition) -> offset`.
      teacher: the frozen predictor `(x, t, condition) -> velocity`.
      data: `[B, ...]` float32.
      noise: `[B, ...]` float32.
      t: flow times `[B]` float32.
      dt: step sizes `[B]` float32; t + dt may exceed 1, where the teacher extrapolates.
      condition: the true condition, batch first.
      dropped: the same with some samples dropped to the null condition.
      label_handling: "paper" shows `dropped` to every network; "official" shows the undropped
        condition to the teacher's first evaluation, as the official code does.

    Source: FlowTurbo eq. 7-10 and 13; train.py for "official".
    """
    lesson = teach(teacher, data, noise, t, dt, condition, dropped, label_handling)
    return lesson_loss(refiner, lesson, dropped)


class Lesson(NamedTuple):
    """What the teacher shows of one Euler step, for a batch.

    Attributes:
      x: the point after the step, `[B, ...]` float32.
      v: the teacher's velocity before it, `[B, ...]` float32.
      t: flow time after it, `[B]` float32.
      target: the teacher's velocity after it, `[B, ...]` float32.
    """

    x: Latents
    v: Velocity
    t: BatchTime
    target: Velocity


def teach(
    teacher: Callable[[Latents, BatchTime, Condition], Velocity],
    data: Latents,
    noise: Latents,
    t: BatchTime,
    dt: BatchTime,
    condition: Condition,
    dropped: Condition,
    label_handling: str = "paper",
) -> Lesson:
    """One Euler step of the frozen teacher, which is evaluated once before and once after it.

    The arguments are those of `refiner_loss`.
    """
    if label_handling not in LABEL_HANDLING:
        raise ValueError(f"label_handling is {label_handling!r}, not one of {LABEL_HANDLING}")
    first = condition if label_handling == "official" else dropped
    x = path.interpolate(noise, data, t)
    v = jax.lax.stop_gradient(teacher(x, t, first))
    x = x + path.per_sample(dt, x) * v
    return Lesson(x, v, t + dt, jax.lax.stop_gradient(teacher(x, t + dt, dropped)))


def lesson_loss(
    refiner: Callable[[Latents, Velocity, BatchTime, Condition], Velocity],
    lesson: Lesson,
    dropped: Condition,
) -> Losses:
    """How far the refined old velocity is from the teacher's new one, `[B]` float32."""
    x, v, t, target = lesson
    return _mean_square(refiner(x, v, t, dropped) + v - target)


def _mean_square(error: Velocity) -> Losses:
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))


def sample_keys(key: Key[Array, ""], indices: Int[Array, " batch"]) -> Keys:
    """One key per sample, `[B]`, from a step's key and each sample's place in the whole batch."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def draw_noise(keys: Keys, shape: tuple[int, ...]) -> Latents:
    """Standard normal noise `[B, *shape]` float32, sample i from keys[i]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def draw_times(keys: Keys) -> BatchTime:
    """Flow times `[B]` float32, uniform on [0, 1), sample i from keys[i]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)


def draw_steps(keys: Keys, dt_range: tuple[float, float]) -> BatchTime:
    """Step sizes `[B]` float32, uniform on (low, high], sample i from keys[i].

    For one step size per batch, as in the official code, give the same key for every sample.
    """
    low, high = dt_range
    return high - (high - low) * draw_times(keys)


def fit_times(t: BatchTime, dt: BatchTime) -> BatchTime:
    """Flow times t scaled so that t + dt <= 1, `t (1 - dt)`, `[B]` float32.

    The official code does not: there t + dt reaches 1.12, where the teacher extrapolates.
    """
    return t * (1 - dt)


def drop_condition(
    keys: Keys, condition: Condition, null_condition: Condition, probability: float
) -> Condition:
    """Replaces the condition of some samples by the null condition, sample i by keys[i].

    Args:
      keys: one key per sample, `[B]`.
      condition: pytree of arrays, batch first.
      null_condition: same structure, shapes and dtypes.
      probability: of dropping, in [0, 1].

    Returns:
      The condition, partly dropped.
    """
    drop: Bool[Array, " batch"] = draw_times(keys) < probability

    def choose(cond, null):
        return jnp.where(drop.reshape(drop.shape + (1,) * (cond.ndim - 1)), null, cond)

    return jax.tree.map(choose, condition, null_condition)
