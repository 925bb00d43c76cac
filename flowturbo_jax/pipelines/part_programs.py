"""The parts of the sampler as programs of their own, with what the whole program does of each."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flowturbo_jax import cost, interfaces, path, sampler
from flowturbo_jax.interfaces import Latents, Moment
from flowturbo_jax.model_directory import abstract_params, modules
from flowturbo_jax.multistep import Solver
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.batch_call import BatchCall, shapes_of
from flowturbo_jax.schedule import Schedule

Grid = Float[Array, " times"]


class Rows(NamedTuple):
    """Evaluations of one network that have equally many rows.

    Attributes:
      network: "predictor" or "refiner".
      branches: 2 with both branches of guidance side by side, or 1.
      indices: where on the time grid, in order.
    """

    network: str
    branches: int
    indices: tuple[int, ...]


class Part(NamedTuple):
    """One part as a program.

    Attributes:
      name: of the part; the evaluations of a network can be two, by their rows.
      call: runs it on arrays that are on the device, and does not wait for it.
      multiply_adds: how many it does.
    """

    name: str
    call: Callable[[], Any]
    multiply_adds: int


def parts(call: BatchCall, evaluations: Sequence[Rows]) -> list[Part]:
    """The programs that run on the device for a batch.

    Args:
      call: the batch.
      evaluations: of the networks.
    """
    plan, params, networks = call.plan, call.pipe.params, _networks(call)
    if not plan.schedule.needs_refiner:
        params = (params[0], None, *params[2:])
    grid, labels = jnp.asarray(plan.times), jnp.asarray(call.labels)
    given, start = jax.tree.map(jnp.asarray, (plan.arguments, call.start))  # no transfer is timed
    arguments = (params, labels, *given[:2], grid)
    is_prepared = _fits(arguments, plan.guidance, networks.fast)
    found = []
    for network, branches, indices in evaluations:
        rows, prepared = _labels(call, branches), None
        x = jnp.ones((len(rows), *networks.fast.config.shape), jnp.float32)
        if is_prepared:
            one_branch = (params, rows, jnp.float32(1), None, grid)
            prepared = prepare(*one_branch, networks=networks.fast, guidance="none")
        evaluated = (params, x, rows, grid, prepared, jnp.asarray(indices, jnp.int32))
        found.append(_part(network, networks, evaluate, evaluated, network=network))
    selected = {"guidance": plan.guidance}
    if is_prepared:
        found.append(_part("conditioning", networks, prepare, arguments, **selected))
    selected |= {"schedule": plan.schedule, "networks": networks.fast}
    stepped = partial(step, start, labels, *given, **selected)
    found.append(Part("guidance_and_steps", stepped, 0))
    return [*found, _decode(call, networks)] if call.shows_images else found


class _Networks(NamedTuple):
    """The networks that a schedule uses.

    Attributes:
      fast: as they run.
      countable: without kernels that hide products, and not quantized.
      params: shapes of the parameters of those.
    """

    fast: programs.Networks
    countable: programs.Networks
    params: tuple[Any, ...]


def _networks(call: BatchCall) -> _Networks:
    model, plain = call.pipe.model, modules(call.pipe.model.description)
    if not call.plan.schedule.needs_refiner:
        plain["refiner"], model = None, dataclasses.replace(model, refiner=None)
    used = (plain["predictor"], plain.get("refiner"))
    used += (plain["text_encoder"],) if call.pipe.takes_text else ()
    return _Networks(
        programs.Networks(model),
        programs.Networks(dataclasses.replace(model, **plain)),
        tuple(None if module is None else abstract_params(module) for module in used),
    )


def _fits(arguments: tuple[Any, ...], guidance: str, networks: programs.Networks) -> bool:
    """Whether the sampler prepares for all times at once: it does where that fits its limit."""
    prepared = jax.eval_shape(
        partial(prepare, networks=networks, guidance=guidance), *shapes_of(arguments)
    )
    sizes = (math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(prepared))
    return sum(sizes) <= sampler.PREPARED_BYTES


def _labels(call: BatchCall, branches: int) -> interfaces.Rows:
    """The labels of all rows of an evaluation: the given ones, and as many that say nothing.

    Of texts the negative ones, which are the second of each pair.
    """
    if branches == 1:
        return jnp.asarray(call.labels)
    if call.pipe.takes_text:
        null = call.labels[:, ::-1]
    else:
        null = np.full_like(call.labels, call.pipe.model.description.predictor.null_label)
    return jnp.asarray(np.concatenate([call.labels, null]))


def _part(
    name: str,
    networks: _Networks,
    program: Callable[..., Any],
    arguments: tuple[Any, ...],
    **static: Any,
) -> Part:
    """A program whose first argument is the parameters."""
    counted = partial(program, networks=networks.countable, **static)
    count = cost.multiply_adds(counted, networks.params, *shapes_of(arguments[1:]))
    return Part(name, partial(program, *arguments, networks=networks.fast, **static), count)


def _decode(call: BatchCall, networks: _Networks) -> Part:
    latents = jnp.zeros((call.batch_size, *networks.fast.config.shape), jnp.float32)
    decode = partial(programs.decode, networks=networks.countable)
    count = cost.multiply_adds(decode, *shapes_of((call.decoder_params, latents)))
    return Part("decode", partial(call.pipe.decode, latents), count)


@partial(jax.jit, static_argnames=("networks", "network"))
def evaluate(
    params: Any,
    x: Latents,
    labels: interfaces.Rows,
    grid: Grid,
    prepared: Any,
    indices: Int[Array, " evaluations"],
    *,
    networks: programs.Networks,
    network: str,
) -> Latents:
    """Evaluates a network at some times of a grid, each time at what it returned before."""
    if prepared is not None:  # so that nothing is asked what the texts mean
        networks = copy.copy(networks)
        networks.text_encoder = _FreeTextEncoder()
    flow = programs.make_flow(networks, params, labels, jnp.float32(1), None, "none")

    def one(x: Latents, i: Int[Array, ""]) -> tuple[Latents, None]:
        t: Any = grid[i]
        if prepared is not None:
            t = Moment(t, sampler.at_time(prepared, i))
        return (flow.predict(x, t) if network == "predictor" else flow.refine(x, t, x)), None

    return jax.lax.scan(one, x, indices)[0]


@partial(jax.jit, static_argnames=("networks", "guidance"))
def prepare(
    params: Any,
    labels: interfaces.Rows,
    scale: Float[Array, ""],
    interval: Float[Array, "2"] | None,
    grid: Grid,
    *,
    networks: programs.Networks,
    guidance: str,
) -> Any:
    """What the sampler makes of labels and times before the first evaluation."""
    return programs.make_flow(networks, params, labels, scale, interval, guidance).prepare(grid)


@partial(jax.jit, static_argnames=("networks", "schedule", "guidance"))
def step(
    start: Latents | tuple[jax.Array, jax.Array],
    labels: interfaces.Rows,
    scale: Float[Array, ""],
    interval: Float[Array, "2"] | None,
    solver: Solver | None = None,
    *,
    networks: programs.Networks,
    schedule: Schedule,
    guidance: str,
) -> Latents:
    """The sampler but for its networks: noise, guidance, and the arithmetic of the blocks.

    Args:
      start: noise, or the seeds and indices that it is drawn from.
      labels: as in `programs.make_flow`, as are the rest.
      scale: guidance scale.
      interval: of guidance.
      solver: the numbers of a learnt schedule.
      networks: what is replaced by networks that cost nothing.
      schedule: of the steps.
      guidance: mode.
    """
    shape = networks.config.shape
    noise = path.sample_noise(*start, shape) if isinstance(start, tuple) else start
    refiner = None if networks.refiner is None else _FreeRefiner()
    settings = (networks.config, networks.guided_channels)
    free = _FreeNetworks(_FreePredictor(), refiner, *settings, _FreeTextEncoder())
    flow = programs.make_flow(free, (None, None, None), labels, scale, interval, guidance)
    return sampler.sample(flow, noise, schedule, solver=solver)


class _FreePredictor:
    """Hands on what it gets, behind the compiler's back: it would leave out what makes that."""

    def apply(self, variables: Any, x: Latents, t: Any, condition: Any) -> Latents:
        return jax.lax.optimization_barrier(x)


class _FreeRefiner:
    def apply(self, variables: Any, x: Latents, v: Latents, t: Any, condition: Any) -> Latents:
        return jax.lax.optimization_barrier((x, v))[1]


class _FreeTextEncoder:
    def apply(self, variables: Any, ids: jax.Array) -> jax.Array:
        return jnp.zeros((len(ids), 1, 1))


class _FreeNetworks(NamedTuple):
    """As `programs.Networks`, for `programs.make_flow`."""

    predictor: _FreePredictor
    refiner: _FreeRefiner | None
    config: Any
    guided_channels: int | None
    text_encoder: _FreeTextEncoder
