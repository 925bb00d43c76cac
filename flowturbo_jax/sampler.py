"""The sampler: one `lax.scan` per run of equal blocks over the schedule's time grid."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from flowturbo_jax import blocks
from flowturbo_jax.interfaces import Flow, InputError, Latents, Moment, State, Time, Timeless
from flowturbo_jax.multistep import Solver, check_solver, step_weights
from flowturbo_jax.schedule import ADAMS, Schedule

BLOCKS = {
    "E": blocks.euler,
    "H": blocks.heun,
    "P": blocks.pseudo_corrector,
    "R": blocks.refine,
    "Rc": partial(blocks.refine, chained=True),
}
MULTISTEP = dict.fromkeys(ADAMS, blocks.multistep)  # these take a row of weights, too
MULTISTEP |= {"S": blocks.multistep, "Rs": blocks.refined_multistep}

INVERSION = "H1P11"  # as exact as H12, for half the evaluations (docs/tasks.md)

AfterStep = Callable[[State, Time], State]
Rewind = Callable[[State, Time, Time, Any], State]
# What is prepared for all times at once may take so many bytes; more is made step by step. Batches
# that large are bound by products, and the weights that preparing saves are a small part of them.
# (A vmap around the sampler multiplies it.)
PREPARED_BYTES = 2**30


def sample(
    flow: Flow,
    noise: Latents,
    schedule: Schedule | str,
    t_start: float | Time = 0.0,
    after_step: AfterStep | None = None,
    solver: Solver | None = None,
) -> Latents:
    """Integrates the flow from t_start to 1. Pure: jit, vmap and grad work on it.

    The traced program has one loop per run, so its size does not depend on how long the runs are.
    Wrap it in `jax.jit`: outside, every call compiles its loops anew.

    Args:
      flow: the vector field; its functions may return any dtype that `drift` turns into x's.
      noise: where to start, `[B, ...]` float; noise at t_start = 0, a point on the path otherwise.
      schedule: which block makes each step.
      t_start: flow time of `noise`, in [0, 1); may be traced.
      after_step: `(state, t) -> state`, applied after every step at the time it reached, for
        instance to keep the known part of an image.
      solver: the numbers of a learnt schedule, such as S5; they may be traced.

    Returns:
      The data end of the path, shape and dtype of noise.

    Raises:
      InputError: the schedule is wrong or refines without a refiner, the velocity's shape or dtype
        is not x's, t_start is outside [0, 1), or the solver's numbers are not such as the schedule
        needs.
    """
    state, _ = integrate(flow, noise, schedule, t_start, after_step, solver=solver)
    return state.x


def integrate(
    flow: Flow,
    noise: Latents,
    schedule: Schedule | str,
    t_start: float | Time = 0.0,
    after_step: AfterStep | None = None,
    observe: Callable[[State], Any] | None = None,
    rewind: Rewind | None = None,
    tries: int = 1,
    solver: Solver | None = None,
) -> tuple[State, Any]:
    """As `sample`, but returns the last state, and what `observe(state)` gave after each step.

    Args:
      flow: as in `sample`.
      noise: as in `sample`.
      schedule: as in `sample`.
      t_start: as in `sample`.
      after_step: as in `sample`.
      observe: what to record of the state after each step, a pytree of arrays; None for nothing.
      rewind: `(state, t, t_before, number) -> state`, how a state at t goes back to t_before, where
        the step is made again; number is of the step and the try, `[]` int32, for noise of its own.
        The state's history is that of before the step.
      tries: how often each step is made, at least 1; without rewind it must be 1.
      solver: as in `sample`.

    Returns:
      The last state, and the records stacked along a new first axis `[steps, ...]` (or None).

    Raises:
      InputError: as in `sample`, or several tries without a way back.
    """
    schedule = _checked(flow, noise, schedule)
    if tries < 1 or (tries > 1 and rewind is None):
        raise InputError(f"tries is {tries}; it must be 1 or more, and without rewind it must be 1")
    check_solver(solver, schedule)
    times = None if solver is None else solver.times
    grid = schedule.time_grid(t_start, noise.dtype, times)
    weights = step_weights(schedule, solver)
    return _follow(flow, noise, schedule, grid, weights, after_step, observe, rewind, tries)


def invert(
    flow: Flow, data: Latents, schedule: Schedule | str, t_end: float | Time = 0.0
) -> Latents:
    """Integrates the flow backwards, from 1 to t_end: the noise that a sample came from.

    The same blocks, on the same time grid, the other way round. A block of the schedule stands for
    a step from the data's end: "H2P4" begins with two Heun steps there.

    Args:
      flow: the vector field.
      data: `[B, ...]` float.
      schedule: which block makes each step; R is trained, and S learnt, to go forward only.
      t_end: flow time to reach, in [0, 1); may be traced.

    Returns:
      The point at t_end, shape and dtype of data.

    Raises:
      InputError: as in `sample`, or the schedule refines or is learnt.
    """
    schedule = check_reversible(_checked(flow, data, schedule))
    grid = schedule.time_grid(t_end, data.dtype)[::-1]
    weights = step_weights(schedule, backwards=True)
    state, _ = _follow(flow, data, schedule, grid, weights)
    return state.x


def check_reversible(schedule: Schedule) -> Schedule:
    """A schedule that can go from data to noise.

    Raises:
      InputError: it refines, or is learnt.
    """
    if schedule.needs_refiner or schedule.learnt:
        why = "refines, and a refiner" if schedule.needs_refiner else "is learnt, and a solver"
        raise InputError(
            f"schedule {schedule} {why} goes from noise to data only; invert with a schedule of "
            f"E, H, P and A, such as {INVERSION}"
        )
    return schedule


def _checked(flow: Flow, x: Latents, schedule: Schedule | str) -> Schedule:
    """The schedule, after checking that all three are what they must be."""
    schedule = Schedule.parse(schedule)
    if not hasattr(flow, "predict") or not hasattr(flow, "drift"):
        raise InputError("the first argument is no flow; wrap the velocity: Flow(velocity)")
    if not hasattr(x, "dtype"):
        raise InputError(f"noise is a {type(x).__name__}; it must be an array")
    if x.dtype not in (jnp.float32, jnp.float64):
        raise InputError(
            f"noise is {x.dtype}; x is kept in float32 or float64, only networks run in less"
        )
    if schedule.needs_refiner and flow.refine is None:
        raise InputError(
            f"schedule {schedule} refines, but this flow has no refiner; use a schedule of "
            "E, H and P, or train a refiner first"
        )
    return schedule


def _follow(
    flow: Flow,
    x: Latents,
    schedule: Schedule,
    grid: Float[Array, " times"],
    weights: Any = None,
    after_step: AfterStep | None = None,
    observe: Callable[[State], Any] | None = None,
    rewind: Rewind | None = None,
    tries: int = 1,
) -> tuple[State, Any]:
    """Makes the schedule's steps along a grid, which may rise or fall; see `integrate`."""
    moment = _moments(flow, grid)
    state = _first_state(flow, x, schedule, moment(0))
    if weights is not None:
        weights = jnp.asarray(weights, x.dtype)
    records = []
    for run, first, last in schedule.intervals():

        def once(state, i, block=run.block):
            state = make_step(flow, state, moment(i), moment(i + 1), block, weights, i)
            if after_step is not None:
                history = state.history
                state = after_step(state, grid[i + 1])
                if not isinstance(state, State):
                    raise InputError("after_step must return a State, as state._replace(x=...)")
                state = state._replace(history=history)  # of networks, not of what is put in x
            return state

        def step(state, i, once=once):
            def again(state, attempt):
                number = i * tries + attempt
                after = once(state, i)._replace(history=state.history)
                before = rewind(after, grid[i + 1], grid[i], number)
                if before.history is None:
                    before = before._replace(history=state.history)
                return before, None

            if tries > 1:
                state, _ = jax.lax.scan(again, state, jnp.arange(tries - 1))
            state = once(state, i)
            return state, None if observe is None else observe(state)

        state, record = jax.lax.scan(step, state, jnp.arange(first, last))
        records.append(record)
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *records)


def make_step(
    flow: Flow,
    state: State,
    t: Time | Moment,
    t_next: Time | Moment,
    block: str,
    weights: Any = None,
    i: Any = 0,
) -> State:
    """One step of a block.

    Args:
      flow: the vector field.
      state: at t.
      t: flow time of the state.
      t_next: flow time to reach.
      block: its letters.
      weights: of all steps, from `step_weights`; only multistep blocks read them.
      i: which step it is; may be traced.
    """
    if block in MULTISTEP:
        return MULTISTEP[block](flow, state, t, t_next, weights[i])
    return BLOCKS[block](flow, state, t, t_next)


def _moments(flow: Flow, grid: Float[Array, " times"]) -> Callable[[Any], Time | Moment]:
    """The times of a grid by their index, with what the flow prepares for them."""
    if flow.prepare is None:
        return lambda i: grid[i]
    shapes = jax.eval_shape(flow.prepare, grid)
    for leaf in jax.tree.leaves(shapes, is_leaf=_is_timeless):
        if not _is_timeless(leaf) and leaf.shape[:1] != grid.shape:
            raise InputError(
                f"the flow prepares {_form(leaf)} for {len(grid)} times; every array needs a first "
                "axis of that length, or a Timeless around it"
            )
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    if size > PREPARED_BYTES:
        logging.info("%.1f GB of conditioning: each step makes its own", size / 1e9)
        return lambda i: grid[i]
    prepared = flow.prepare(grid)
    return lambda i: Moment(grid[i], at_time(prepared, i))


def at_time(prepared: Any, i: Any) -> Any:
    """What a flow prepared, at one time.

    Args:
      prepared: for all times, as `Flow.prepare` gives it.
      i: index of the time, `[]` int32; may be traced.
    """

    def one(leaf: Any) -> Any:
        if _is_timeless(leaf):
            return leaf.value
        return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)

    return jax.tree.map(one, prepared, is_leaf=_is_timeless)


def _is_timeless(leaf: Any) -> bool:
    return isinstance(leaf, Timeless)


def empty_history(schedule: Schedule, memory: Any) -> Any:
    """Zeros in the place of memories that there are none of yet; None where none is remembered.

    Args:
      schedule: which says how many are.
      memory: one of them, or its shapes and dtypes.
    """
    if not schedule.remembered:
        return None
    count = (schedule.remembered,)
    return jax.tree.map(lambda leaf: jnp.zeros(count + leaf.shape, leaf.dtype), memory)


def _first_state(flow: Flow, noise: Latents, schedule: Schedule, t: Time | Moment) -> State:
    """The state to start from, after checking once that the flow fits x.

    Only a leading P reads its memory, and evaluates it; other blocks overwrite it, so zeros serve.
    So do they in the history, where weights of steps that were not made are zero.

    Args:
      flow: the vector field.
      noise: x at t.
      schedule: what is to be made of it.
      t: flow time of the first step.

    Raises:
      InputError: the velocity's shape or dtype is not x's, or an offset's not the memory's.
    """
    memory = jax.eval_shape(flow.predict, noise, t)
    velocity = jax.eval_shape(flow.drift, memory)
    if (velocity.shape, velocity.dtype) != (noise.shape, noise.dtype):
        raise InputError(
            f"the flow's velocity is {velocity.dtype}{list(velocity.shape)} for x "
            f"{noise.dtype}{list(noise.shape)}; both must agree (cast inside predict or drift)"
        )
    if schedule.needs_refiner:
        offset = jax.eval_shape(flow.refine, noise, t, memory)
        if jax.tree.map(_form, offset) != jax.tree.map(_form, memory):
            raise InputError(
                f"the refiner's offset is {jax.tree.map(_form, offset)} for a memory of "
                f"{jax.tree.map(_form, memory)}; both must agree"
            )
    history = empty_history(schedule, memory)
    if schedule.runs[0].block == "P":
        return State(noise, flow.predict(noise, t), history)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), memory)
    return State(noise, zeros, history)


def _form(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
