"""Schedules run block by block: slower than one program, but no schedule compiles anything new.

A search tries hundreds of schedules; compiling each would take longer than running it.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import sampler
from flowturbo_jax.interfaces import Labels, Latents, Memory, State, Time
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.plan import Plan

STATIC = ("networks", "guidance", "block")


@partial(jax.jit, static_argnames=STATIC)
def _step(
    params: Any,
    state: State,
    labels: Labels,
    scale: jax.Array,
    interval: jax.Array | None,
    t: Time,
    t_next: Time,
    *,
    networks: programs.Networks,
    guidance: str,
    block: str,
) -> State:
    """One step of a block."""
    flow = programs.make_flow(networks, params, labels, scale, interval, guidance)
    return sampler.BLOCKS[block](flow, state, t, t_next)


@partial(jax.jit, static_argnames=("networks", "guidance"))
def _predict(
    params: Any,
    x: Latents,
    labels: Labels,
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
    pipe: ClassToImage, noise: Latents | np.ndarray, labels: np.ndarray, plan: Plan
) -> Latents:
    """As `ClassToImage.sample_latents`, to rounding.

    Args:
      pipe: the model.
      noise: `[B, H, W, C]` float32.
      labels: `[B]` int32.
      plan: how to sample.

    Returns:
      Latents `[B, H, W, C]` float32.
    """
    settings = {"networks": programs.Networks(pipe.model), "guidance": plan.guidance}
    grid = np.asarray(plan.schedule.time_grid())
    noise, labels, given = jnp.asarray(noise), jnp.asarray(labels), plan.arguments
    if plan.schedule.runs[0].block == "P":
        memory = _predict(pipe.params, noise, labels, *given, grid[0], **settings)
    else:
        memory = _no_memory(pipe, noise, labels, plan)
    state = State(noise, memory)
    for run, first, last in plan.schedule.intervals():
        for i in range(first, last):
            times = (grid[i], grid[i + 1])
            state = _step(pipe.params, state, labels, *given, *times, **settings, block=run.block)
    return state.x


def _no_memory(pipe: ClassToImage, noise: Latents, labels: Any, plan: Plan) -> Memory:
    """Zeros in the shape of a memory, for blocks that write before they read."""
    networks = programs.Networks(pipe.model)
    memory = jax.eval_shape(
        partial(_predict, networks=networks, guidance=plan.guidance),
        pipe.params,
        noise,
        labels,
        *plan.arguments,
        jnp.float32(0),
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), memory)


class Costs:
    """What schedules cost, from the measured time of each block.

    Args:
      pipe: the model.
      batch_size: of the calls whose time counts.
      repeats: of each measurement, whose median counts.
    """

    def __init__(self, pipe: ClassToImage, batch_size: int, repeats: int = 5):
        self._pipe, self._repeats = pipe, repeats
        self._noise = jnp.zeros((batch_size, *pipe.model.description.predictor.shape))
        self._labels = jnp.zeros(batch_size, jnp.int32)
        self._known: dict[tuple[Any, ...], float] = {}

    def of(self, plan: Plan) -> float:
        """Seconds of one call by a plan."""
        grid = np.asarray(plan.schedule.time_grid())
        total = 0.0
        if plan.schedule.runs[0].block == "P":  # evaluates its own start: about one E
            total += self._block("E", plan, grid[0])
        for run, first, last in plan.schedule.intervals():
            total += sum(self._block(run.block, plan, grid[i + 1]) for i in range(first, last))
        return total

    def _block(self, block: str, plan: Plan, t: np.float32) -> float:
        inside = plan.interval is None or plan.interval[0] <= t <= plan.interval[1]
        key = (block, plan.guidance, plan.interval is None, inside)
        if key not in self._known:
            self._known[key] = self._measure(block, plan, t)
        return self._known[key]

    def _measure(self, block: str, plan: Plan, t: np.float32) -> float:
        state = State(self._noise, _no_memory(self._pipe, self._noise, self._labels, plan))
        seconds = []
        for _ in range(self._repeats + 1):  # the first compiles
            begin = time.perf_counter()
            result = _step(
                self._pipe.params,
                state,
                self._labels,
                *plan.arguments,
                t,
                t,
                networks=programs.Networks(self._pipe.model),
                guidance=plan.guidance,
                block=block,
            )
            jax.block_until_ready(result)
            seconds.append(time.perf_counter() - begin)
        return float(np.median(seconds[1:]))
