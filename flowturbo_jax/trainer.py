"""Training, from a recipe and a folder to a model directory: reads top to bottom."""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from flowturbo_jax import data, images, model_directory, parallel, tasks, train_state
from flowturbo_jax.checkpoint import Checkpoints
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.logbook import Logbook
from flowturbo_jax.model_directory import Model
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.tasks import Task
from flowturbo_jax.train_config import TrainConfig, differences
from flowturbo_jax.train_state import TrainState


def train_and_evaluate(config: Any, workdir: str | Path) -> TrainState:
    """Trains by a recipe, and writes checkpoints, metrics, sample grids and a model directory.

    A run that was stopped continues from its newest checkpoint, bit for bit: batch and random
    draws of a step are functions of (seed, step) alone. SIGINT and SIGTERM save and stop.

    Args:
      config: a mapping with the keys of `TrainConfig`.
      workdir: folder of this run: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `samples/` and
        at the end `model/`, the model directory with the averaged weights.

    Returns:
      The state after the last step made.

    Raises:
      InputError: the recipe is wrong, or not the one the run in workdir was begun with.
    """
    config = TrainConfig.create(config)
    workdir = Path(workdir)
    parallel.check_batch_size(config.batch_size)
    source = data.open_source(config.data)
    task = tasks.make_task(config, source)
    _check_workdir(workdir)
    batches = data.batches(source, config.batch_size, config.seed)
    optimizer = optimizer_of(config)
    init_key, train_key, evaluation_key = jax.random.split(jax.random.key(config.seed), 3)
    params = jax.jit(task.network.initialise)(init_key)
    state = parallel.replicate(train_state.create(params, optimizer))
    frozen = parallel.replicate(task.frozen)
    step_function = parallel.data_parallel(make_step(task, optimizer, config, train_key))
    evaluate = jax.jit(task.evaluate)
    evaluation_batch = _with_index(data.batches(source, config.evaluation_size, config.seed)[0])

    identity = _identity(config, source, task)
    with Checkpoints(workdir / "checkpoints") as checkpoints, _stop_signals() as stop:
        state = _resume(checkpoints, state, identity, config.allow_config_change)
        first = int(state.step)
        with (
            Logbook(workdir, first + 1) as logbook,
            tqdm(total=config.steps, initial=first, unit="step", desc=config.objective) as bar,
        ):
            for step in range(first, config.steps):
                state, metrics = step_function(state, frozen, _with_index(batches[step]))
                bar.update()
                done = step + 1
                stopping = stop.is_set()  # once: a signal may come at any moment
                save = stopping or _due(done, config.checkpoint_every, config.steps)
                log = _due(done, config.log_every, config.steps)
                if save or log:
                    _check_finite(metrics, done, checkpoints.latest_step)
                if log:
                    logbook.scalars(done, {f"train/{k}": v for k, v in metrics.items()})
                    bar.set_postfix(loss=f"{float(metrics['loss']):.4f}")
                if _due(done, config.evaluate_every, config.steps):
                    losses = evaluate(state.ema_params, frozen, evaluation_batch, evaluation_key)
                    logbook.scalars(done, {f"evaluation/{k}": v.mean() for k, v in losses.items()})
                    picture = _sample_grid(task.model(state.ema_params), config)
                    images.save_png(workdir / "samples" / f"{done:07d}.png", picture)
                    logbook.picture(done, "samples", picture)
                if save:  # last, so that what is not saved is also made again
                    checkpoints.save(done, state, identity)
                if stopping:
                    break
    if int(state.step) < config.steps:
        return state
    model = task.model(jax.tree.map(np.asarray, state.ema_params))
    model_directory.save(
        workdir / "model",
        model.description,
        model.predictor_params,
        model.refiner_params,
        model.vae_params,
    )
    return state


def make_step(task: Task, optimizer: Any, config: TrainConfig, key: jax.Array) -> Callable:
    """The step `parallel.data_parallel` compiles: loss, gradients, mean, update."""

    def step(state, frozen, batch, mean):
        step_key = jax.random.fold_in(key, state.step)

        def loss(params):
            return jnp.mean(task.losses(params, frozen, batch, step_key)["loss"])

        value, gradients = mean(jax.value_and_grad(loss)(state.params))
        new = train_state.apply_gradients(
            state, gradients, optimizer, config.ema_decay, config.ema_warmup
        )
        norms = {"gradient_norm": _norm(gradients), "parameter_norm": _norm(new.params)}
        return new, {"loss": value, **norms}

    return step


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


def _norm(tree: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _with_index(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**batch, "index": np.arange(len(batch["data"]), dtype=np.int32)}


def _due(done: int, every: int, steps: int) -> bool:
    return done % every == 0 or done == steps


def _check_finite(metrics: dict[str, jax.Array], step: int, last_good: int | None) -> None:
    """Refuses to go on, or to save, once the loss or the parameters are no numbers any more."""
    wrong = {name: float(value) for name, value in metrics.items() if not jnp.isfinite(value)}
    if wrong:
        kept = "none was saved" if last_good is None else f"the last is of step {last_good}"
        raise InputError(
            f"training diverged: {', '.join(f'{k} is {v}' for k, v in wrong.items())} at step "
            f"{step} (checkpoints: {kept}); begin in another workdir with a lower learning_rate or "
            "with gradient_clip"
        )


def _check_workdir(workdir: Path) -> None:
    """Makes the run's folder, and sees that the model can be written there at the end."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {workdir}: {error.strerror}; change --workdir"
        ) from error
    if not os.access(workdir, os.W_OK):
        raise InputError(f"cannot write to {workdir}: it is read-only; change --workdir")
    model = workdir / "model"
    if model.exists() and not (model / "model.json").is_file():
        raise InputError(f"{model} exists and is no model directory; change --workdir")


def _identity(config: TrainConfig, source: data.DataSource, task: Task) -> dict[str, Any]:
    """What a run must agree with to be continued."""
    teacher = {} if task.frozen is None else {"teacher": model_directory.fingerprint(task.frozen)}
    return {"data_fingerprint": source.fingerprint, **teacher, **dataclasses.asdict(config)}


def _resume(
    checkpoints: Checkpoints, state: TrainState, identity: dict[str, Any], allow_change: bool
) -> TrainState:
    """The newest checkpoint's state, or the given one where there is none."""
    if checkpoints.latest_step is None:
        return state
    begun = checkpoints.config()
    for name, words in (("data_fingerprint", "other data"), ("teacher", "another teacher")):
        if begun.get(name) != identity.get(name):
            raise InputError(f"the run was begun with {words}; choose another workdir")
    changed = differences(begun, identity)
    if changed and not allow_change:
        raise InputError(
            f"the run was begun with another config ({'; '.join(changed)}); choose another "
            "workdir, or set allow_config_change"
        )
    if any(begun.get(key) != identity[key] for key in ("objective", "model")):
        raise InputError("a run cannot be continued with another model; choose another workdir")
    if checkpoints.latest_step > identity["steps"]:
        raise InputError(
            f"the run is at step {checkpoints.latest_step} already, past steps={identity['steps']}"
        )
    tqdm.write(f"resuming from step {checkpoints.latest_step}")
    return checkpoints.state(state)


def _sample_grid(model: Model, config: TrainConfig, rows: int = 4) -> np.ndarray:
    """A picture `[H, W, 3]` uint8 of samples, a column per class (the first ten)."""
    classes = min(max(model.description.predictor.num_classes, 1), 10)
    labels = np.tile(np.arange(classes), rows)
    pipe = ClassToImage(model)
    samples = pipe(labels, seeds=config.seed, schedule=config.schedule)
    return images.grid(np.asarray(samples), columns=classes, zoom=4)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that a run ends between two steps."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {}

    def request(number: int, _: Any) -> None:
        stop.set()
        for other, handler in previous.items():  # a second signal ends the program at once
            signal.signal(other, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
