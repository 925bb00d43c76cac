"""Schedules run block by block: slower than one program, but a new one compiles nothing.

A search tries hundreds of schedules; compiling each would take longer than running it.
"""

import time
from collections.abc import MutableMapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowturbo_jax import sampler
from flowturbo_jax.guidance import inside
from flowturbo_jax.interfaces import Latents, Memory, Rows, State, Time
from flowturbo_jax.multistep import step_weights
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.schedule import ADAMS

AT_START = ("E", "S", "Rs", *ADAMS)  # blocks that evaluate at the start of their step only
STATIC = ("networks", "guidance", "block")


@partial(jax.jit, static_argnames=STATIC)
def _step(
    params: Any,
    state: State,
    labels: Rows,
    scale: jax.Array,
    interval: jax.Array | None,
    t: Time,
    t_next: Time,
    weights: Float[Array, "1 remembered"] | None = None,
    *,
    networks: programs.Networks,
    guidance: str,
    block: str,
) -> State:
    """One step of a block, with its row of weights where it has one."""
    flow = programs.make_flow(networks, params, labels, scale, interval, guidance)
    return sampler.make_step(flow, state, t, t_next, block, weights)


@partial(jax.jit, static_argnames=("networks", "guidance"))
def _predict(
    params: Any,
    x: Latents,
    labels: Rows,
    scale: jax.Array,
    interval: jax.Array | None,
    t: Time,
    *,
    networks: programs.Networks,
    guidance: str,
) -> Memory:
    """What a leading P begins with."""
    return programs.make_flow(networks, params, labels, scale, interval, guidance).predict(x, t)


def sample_latents(
    pipe: Generation, noise: Latents | np.ndarray, labels: np.ndarray, plan: Plan
) -> Latents:
    """As `Generation.sample_latents`, to rounding.

    Args:
      pipe: the model.
      noise: `[B, H, W, C]` float32.
      labels: `[B]` int32, or `[B, 2, L]` token ids.
      plan: how to sample.

    Returns:
      Latents `[B, H, W, C]` float32.
    """
    settings = {"networks": programs.Networks(pipe.model), "guidance": plan.guidance}
    grid, weights = plan.times, _weights(plan)
    noise, labels, given = jnp.asarray(noise), jnp.asarray(labels), plan.arguments[:2]
    if plan.schedule.runs[0].block == "P":
        memory = _predict(pipe.params, noise, labels, *given, grid[0], **settings)
    else:
        memory = _no_memory(pipe, noise, labels, plan)
    state = State(noise, memory, sampler.empty_history(plan.schedule, memory))
    for run, first, last in plan.schedule.intervals():
        for i in range(first, last):
            step = (grid[i], grid[i + 1], None if weights is None else weights[i : i + 1])
            state = _step(pipe.params, state, labels, *given, *step, **settings, block=run.block)
    return state.x


def _weights(plan: Plan) -> np.ndarray | None:
    """Of all steps, as arguments of programs."""
    found = step_weights(plan.schedule, plan.numbers)
    return None if found is None else np.asarray(found, np.float32)


def _no_memory(pipe: Generation, noise: Latents, labels: Any, plan: Plan) -> Memory:
    """Zeros in the shape of a memory, for blocks that write before they read."""
    networks = programs.Networks(pipe.model)
    memory = jax.eval_shape(
        partial(_predict, networks=networks, guidance=plan.guidance),
        pipe.params,
        noise,
        labels,
        *plan.arguments[:2],
        jnp.float32(0),
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), memory)


class Costs:
    """What schedules cost, from the measured time of each block.

    Args:
      pipe: the model.
      batch_size: of the calls whose time counts.
      known: seconds of blocks that were measured before, by name; new ones are added.
      repeats: of each measurement, whose median counts.
    """

    def __init__(
        self,
        pipe: Generation,
        batch_size: int,
        known: MutableMapping[str, float] | None = None,
        repeats: int = 5,
    ):
        self._pipe, self._repeats = pipe, repeats
        self._noise = jnp.zeros((batch_size, *pipe.model.description.predictor.shape))
        self._labels = jnp.zeros(batch_size, jnp.int32)
        self._known = {} if known is None else known

    def of(self, plan: Plan) -> float:
        """Seconds of one call by a plan."""
        grid = plan.times
        total = 0.0
        if plan.schedule.runs[0].block == "P":  # evaluates its own start: about one E
            total += self._step("E", plan, grid[0], grid[0])
        for run, first, last in plan.schedule.intervals():
            steps = range(first, last)
            total += sum(self._step(run.block, plan, grid[i], grid[i + 1]) for i in steps)
        return total

    def _step(self, block: str, plan: Plan, t: np.float32, t_next: np.float32) -> float:
        """Seconds of a step; where guidance acts at some of its evaluations, in proportion."""
        if plan.interval is None:
            return self._block(block, plan, 0.5, "guided")
        low, high = plan.interval
        times = (t,) if block in AT_START else {"P": (t_next,)}.get(block, (t, t_next))
        guided = sum(bool(inside(time, plan.interval)) for time in times) / len(times)
        within, outside = (low + high) / 2, (low / 2 if low > 0 else (1 + high) / 2)
        total = 0.0
        if guided:
            total += guided * self._block(block, plan, within, "inside")
        if guided < 1:
            total += (1 - guided) * self._block(block, plan, outside, "outside")
        return total

    def _block(self, block: str, plan: Plan, t: float, where: str) -> float:
        key = f"{block} {plan.guidance} {where}"
        if plan.schedule.remembered:  # a history makes all blocks a little slower
            key += f" remembering {plan.schedule.remembered}"
        if key not in self._known:
            self._known[key] = self._measure(block, plan, t)
        return self._known[key]

    def _measure(self, block: str, plan: Plan, t: float) -> float:
        memory = _no_memory(self._pipe, self._noise, self._labels, plan)
        state = State(self._noise, memory, sampler.empty_history(plan.schedule, memory))
        weights = _weights(plan)
        row = None if weights is None else weights[:1]
        time_of_step = np.float32(t)
        seconds = []
        for _ in range(self._repeats + 1):  # the first compiles
            begin = time.perf_counter()
            result = _step(
                self._pipe.params,
                state,
                self._labels,
                *plan.arguments[:2],
                time_of_step,
                time_of_step,
                row,
                networks=programs.Networks(self._pipe.model),
                guidance=plan.guidance,
                block=block,
            )
            jax.block_until_ready(result)
            seconds.append(time.perf_counter() - begin)
        return float(np.median(seconds[1:]))
