"""What compiling more of the sampler at once is worth.

Source: FlowTurbo table 3a, which compiles nothing, the network, and network and sampler together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowturbo_jax import path, sampler
from flowturbo_jax.interfaces import InputError, Latents, Rows, State
from flowturbo_jax.multistep import step_weights
from flowturbo_jax.pipelines import programs, stepwise
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.timing import Stopwatch, Task, Times

WAYS = ("nothing", "each network", "each block", "the whole sampler")


class JittedNetwork:
    """A network that is compiled by itself, whatever calls it.

    Args:
      module: with `apply`.
    """

    def __init__(self, module: Any):
        self.apply = jax.jit(module.apply)


class NetworksApart(NamedTuple):
    """As `programs.Networks`, for `programs.make_flow`."""

    predictor: Any
    refiner: Any
    config: Any
    guided_channels: int | None
    text_encoder: Any


def measure(
    pipe: Generation, plan: Plan, batch_size: int, stopwatch: Stopwatch
) -> dict[str, Times]:
    """Times of one batch's latents, by what is compiled together.

    Args:
      pipe: the model.
      plan: how to sample, guided all of the time or not at all.
      batch_size: number of latents.
      stopwatch: of the measurements.

    Returns:
      For each of WAYS, in s per batch.

    Raises:
      InputError: guidance has an interval, whose branches cannot be run operation by operation.
    """
    check(plan)
    seeds, indices = jnp.zeros(batch_size, jnp.uint32), jnp.arange(batch_size, dtype=jnp.uint32)
    noise = path.sample_noise(seeds, indices, pipe.model.description.predictor.shape)
    labels = pipe.placeholders(batch_size)
    given = jnp.asarray(labels)
    jitted = networks_apart(pipe, JittedNetwork)
    plain = networks_apart(pipe, lambda module: module)

    def uncompiled() -> Latents:
        with jax.disable_jit():
            return step_by_step(pipe, plain, noise, given, plan)

    ways: dict[str, Callable[[], Latents]] = {
        "nothing": uncompiled,
        "each network": partial(step_by_step, pipe, jitted, noise, given, plan),
        "each block": partial(stepwise.sample_latents, pipe, noise, labels, plan),
        "the whole sampler": partial(
            pipe.sample_latents,
            noise,
            labels,
            **plan.settings,
        ),
    }
    uncompiled_times = stopwatch.latency(ways["nothing"])  # by itself: it takes much longer
    compiled = stopwatch.in_turn(*(Task(ways[name], until_on_host=True) for name in WAYS[1:]))
    return dict(zip(WAYS, [uncompiled_times, *compiled], strict=True))


def check(plan: Plan) -> None:
    """Refuses what cannot be measured so.

    Raises:
      InputError: guidance has an interval.
    """
    if plan.interval is not None:
        raise InputError(
            f"{plan.schedule} is guided on an interval, which runs as one program only: leave "
            "out --ablation or --guidance-interval"
        )


def networks_apart(pipe: Generation, wrap: Callable[[Any], Any]) -> NetworksApart:
    """The networks of a model, each in a wrapper that has `apply`."""
    model = pipe.model
    others = (
        None if module is None else wrap(module) for module in (model.refiner, model.text_encoder)
    )
    refiner, text_encoder = others
    description = model.description
    settings = (description.predictor, description.guided_channels)
    return NetworksApart(wrap(model.predictor), refiner, *settings, text_encoder)


def step_by_step(
    pipe: Generation, networks: NetworksApart, noise: Latents, labels: Rows, plan: Plan
) -> Latents:
    """The sampler as Python that calls the networks."""
    scale = jnp.asarray(plan.arguments[0])
    flow = programs.make_flow(networks, pipe.params, labels, scale, None, plan.guidance)
    grid = jnp.asarray(plan.times)
    weights = step_weights(plan.schedule, plan.numbers)
    memory = flow.predict(noise, grid[0]) if plan.schedule.runs[0].block == "P" else None
    history = None
    if plan.schedule.remembered:
        shapes = jax.eval_shape(flow.predict, noise, grid[0])
        history, weights = sampler.empty_history(plan.schedule, shapes), jnp.asarray(weights)
    state = State(noise, memory, history)
    for run, first, last in plan.schedule.intervals():
        for i in range(first, last):
            times = (grid[i], grid[i + 1])
            state = sampler.make_step(flow, state, *times, run.block, weights, i)
    return state.x
