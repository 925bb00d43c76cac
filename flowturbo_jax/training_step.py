"""The two functions training compiles: one optimiser step, and one chunk of the evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowturbo_jax import train_state
from flowturbo_jax.interfaces import Params
from flowturbo_jax.parallel import Mean
from flowturbo_jax.tasks import Task
from flowturbo_jax.train_config import TrainConfig

BINS = 5  # of flow time, in the evaluation


def optimizer_of(config: TrainConfig) -> optax.GradientTransformation:
    """The optimiser a recipe describes."""
    return train_state.make_optimizer(
        config.learning_rate,
        config.steps,
        config.learning_rate_decay,
        config.warmup_steps,
        config.weight_decay,
        config.gradient_clip,
    )


def make_step(
    task: Task, optimizer: optax.GradientTransformation, config: TrainConfig, key: jax.Array
) -> Callable:
    """The step `parallel.data_parallel` compiles: loss, gradients, mean, update.

    Returns:
      `(state, frozen, batch, mean) -> (state, metrics)`. The batch has `data`, `label`, the `index`
      of each sample in the whole batch, and `signals` `[B, n]` float32, whose mean comes back among
      the metrics.
    """

    def step(state: Any, frozen: Params | None, batch: Mapping[str, Any], mean: Mean) -> Any:
        step_key = jax.random.fold_in(key, state.step)

        def gradients_of(part):
            def loss(params):
                return jnp.mean(task.loss(params, frozen, part, step_key))

            return jax.value_and_grad(loss)(state.params)

        samples = {name: batch[name] for name in ("data", "label", "index")}
        result = accumulated(gradients_of, samples, config.accumulation_steps)
        signals = jnp.mean(batch["signals"], axis=0)
        (value, gradients), signals = mean((result, signals))
        new = train_state.apply_gradients(
            state, gradients, optimizer, config.step_decay, config.ema_warmup
        )
        metrics = {
            "loss": value,
            "gradient_norm": _norm(gradients),
            "parameter_norm": _norm(new.params),
            "signals": signals,
        }
        return new, metrics

    return step


def accumulated(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """The mean of a function's results over equal parts of a batch, one part after the other.

    Args:
      function: `(part) -> pytree of float arrays`.
      batch: pytree of arrays `[B, ...]`, B a multiple of parts.
      parts: 1 calls the function on the whole batch.
    """
    if parts == 1:
        return function(batch)
    split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def make_evaluation(task: Task, key: jax.Array) -> Callable:
    """The evaluation `parallel.data_parallel` compiles, of one chunk of the fixed batch.

    Returns:
      `(params, frozen, batch, mean) -> {name: [BINS]}`: the sums of each of the task's values, and
      the "count" of samples, over the samples of each bin of flow time, divided by the number of
      devices. The batch has `data`, `label`, `index`, and a `weight` `[B]` float32 of 0 for
      samples that only fill it up.
    """

    def evaluate(params: Params, frozen: Params | None, batch: Any, mean: Mean) -> Any:
        values = task.evaluate(params, frozen, batch, key)
        place = jnp.clip((values.pop("t") * BINS).astype(jnp.int32), 0, BINS - 1)
        member = jax.nn.one_hot(place, BINS) * batch["weight"][:, None]
        values["count"] = jnp.ones_like(batch["weight"])
        return mean({name: value @ member for name, value in values.items()})

    return evaluate


def summarise(chunks: list[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the fixed batch, and over each bin of flow time, from the sums of its chunks."""
    names = chunks[0].keys()
    sums = {name: np.sum([np.asarray(c[name], np.float64) for c in chunks], 0) for name in names}
    count = sums.pop("count")
    means = {name: float(value.sum() / count.sum()) for name, value in sums.items()}
    by_time = {
        f"{name}_t_{i / BINS:.1f}_{(i + 1) / BINS:.1f}": float(value[i] / count[i])
        for name, value in sums.items()
        for i in range(BINS)
        if count[i]
    }
    return means, by_time


def _norm(tree: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
