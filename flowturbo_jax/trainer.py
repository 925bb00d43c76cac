"""Training, from a recipe and a folder to a model directory: reads top to bottom."""

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flowturbo_jax import data, images, model_directory, objective, parallel, train_state
from flowturbo_jax.checkpoint import Checkpoints
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.logbook import Logbook
from flowturbo_jax.model_directory import Description, Model
from flowturbo_jax.models import family
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.train_config import TrainConfig, differences
from flowturbo_jax.train_state import TrainState


class Task(NamedTuple):
    """What is trained.

    Attributes:
      network: module whose parameters are trained.
      frozen: parameters the losses need besides, or None.
      losses: `(params, frozen, batch, key) -> {name: [B]}`; "loss" is what is minimised.
      model: `(params) -> Model`, to sample from and to save.
    """

    network: Any
    frozen: Params | None
    losses: Callable[[Params, Params | None, dict[str, jax.Array], jax.Array], dict[str, jax.Array]]
    model: Callable[[Params], Model]


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
    task = make_task(config, source)
    batches = data.batches(source, config.batch_size, config.seed)
    optimizer = train_state.make_optimizer(
        config.learning_rate,
        config.steps,
        config.learning_rate_decay,
        config.warmup_steps,
        config.weight_decay,
        config.gradient_clip,
    )
    init_key, train_key, evaluation_key = jax.random.split(jax.random.key(config.seed), 3)
    params = jax.jit(task.network.initialise)(init_key)
    state = parallel.replicate(train_state.create(params, optimizer))
    frozen = parallel.replicate(task.frozen)
    step_function = parallel.data_parallel(make_step(task, optimizer, config, train_key))
    evaluate = jax.jit(task.losses)
    evaluation_batch = _with_index(data.batches(source, config.evaluation_size, config.seed)[0])

    with Checkpoints(workdir / "checkpoints") as checkpoints, _stop_signals() as stop:
        state = _resume(checkpoints, state, config)
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
                    losses = {f"evaluation/{k}": v.mean() for k, v in losses.items()}
                    logbook.scalars(done, losses)
                    picture = _sample_grid(task.model(state.ema_params), config)
                    images.save_png(workdir / "samples" / f"{done:07d}.png", picture)
                    logbook.picture(done, "samples", picture)
                if save:
                    checkpoints.save(done, state, dataclasses.asdict(config))
                if stopping:
                    break
    if int(state.step) < config.steps:
        return state
    model = task.model(jax.tree.map(np.asarray, state.ema_params))
    model_directory.save(
        workdir / "model", model.description, model.predictor_params, model.refiner_params
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
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        return new, {"loss": value, "gradient_norm": norm}

    return step


def make_task(config: TrainConfig, source: data.DataSource) -> Task:
    """The task a recipe describes, on a data set.

    Raises:
      InputError: the model does not fit the data.
    """
    return {"flow_matching": _predictor_task, "refiner": _refiner_task}[config.objective](
        config, source
    )


def _predictor_task(config: TrainConfig, source: data.DataSource) -> Task:
    fields = dict(config.model)
    kind = family(fields.pop("family", None))
    try:
        network_config = kind.config(**fields)
    except TypeError as error:
        raise InputError(f"config key model: {error}") from error
    _check_fits(network_config, source)
    if config.label_dropout and network_config.num_classes and not network_config.null_class:
        raise InputError("label_dropout needs a model with null_class")
    options = {"dtype": model_directory.network_dtype(config.dtype)}
    network = kind.predictor(network_config, remat=config.remat, **options)

    def losses(params, frozen, batch, key):
        draws = _draws(config, network_config, batch, key)
        predictor = _apply(network, params)
        args = (batch["data"], draws["noise"], draws["t"], draws["dropped"])
        return {"loss": objective.flow_matching_loss(predictor, *args)}

    def model(params):
        description = Description(
            family=config.model["family"],
            predictor=network_config,
            refiner=None,
            class_names=source.class_names if network_config.num_classes else (),
            guidance=config.guidance if network_config.null_label is not None else "none",
            guidance_scale=config.guidance_scale,
            guided_channels=None,
            source={"predictor": _provenance(config, source)},
        )
        return Model(description, kind.predictor(network_config, **options), params, None, None)

    return Task(network, None, losses, model)


def _refiner_task(config: TrainConfig, source: data.DataSource) -> Task:
    teacher = model_directory.load(config.model_dir, config.dtype)
    predictor_config = teacher.description.predictor
    _check_fits(predictor_config, source)
    kind = family(teacher.description.family)
    try:
        network_config = predictor_config.refiner(**config.model)
    except TypeError as error:
        raise InputError(f"config key model: {error}") from error
    options = {"dtype": model_directory.network_dtype(config.dtype)}
    network = kind.refiner(network_config, **options)
    trained = Model(
        dataclasses.replace(
            teacher.description,
            refiner=network_config,
            guidance=config.guidance if predictor_config.null_label is not None else "none",
            guidance_scale=config.guidance_scale,
            source={**teacher.description.source, "refiner": _provenance(config, source)},
        ),
        teacher.predictor,
        teacher.predictor_params,
        network,
        None,
    )

    def losses(params, frozen, batch, key):
        draws = _draws(config, predictor_config, batch, key)

        def loss(refiner):
            return objective.refiner_loss(
                refiner,
                _apply(teacher.predictor, frozen),
                batch["data"],
                draws["noise"],
                draws["t"],
                draws["dt"],
                draws["condition"],
                draws["dropped"],
                config.label_handling,
            )

        return {
            "loss": loss(_apply(network, params)),
            "keep_velocity": loss(lambda x, v, t, condition: jnp.zeros_like(v)),
        }

    def model(params):
        return dataclasses.replace(trained, refiner_params=params)

    return Task(network, teacher.predictor_params, losses, model)


def _apply(network: Any, params: Params) -> Callable:
    return lambda *args: network.apply({"params": params}, *args)


def _draws(config: TrainConfig, network_config: Any, batch: Any, key: jax.Array) -> dict[str, Any]:
    """Everything random in a step, each sample's a function of (key, its index in the batch)."""
    keys = jax.vmap(lambda k: jax.random.split(k, 4))(objective.sample_keys(key, batch["index"]))
    noise = objective.draw_noise(keys[:, 0], network_config.shape)
    t = objective.draw_times(keys[:, 1])
    step_keys = keys[:, 2]
    if not config.dt_per_sample:
        step_keys = jnp.broadcast_to(jax.random.fold_in(key, 0), step_keys.shape)
    dt = objective.draw_steps(step_keys, (config.dt_min, config.dt_max))
    if config.objective == "refiner" and config.times_inside:
        t = objective.fit_times(t, dt)
    draws = {"noise": noise, "t": t, "dt": dt, "condition": None, "dropped": None}
    if network_config.num_classes:
        condition = dropped = batch["label"]
        if network_config.null_label is not None:
            null = jnp.full_like(condition, network_config.null_label)
            dropped = objective.drop_condition(keys[:, 3], condition, null, config.label_dropout)
        draws.update(condition=condition, dropped=dropped)
    return draws


def _check_fits(network_config: Any, source: data.DataSource) -> None:
    if network_config.shape != source.shape:
        raise InputError(
            f"the model takes {list(network_config.shape)}, but {source.name} has "
            f"{list(source.shape)}; change the model's input_size and in_channels"
        )
    if network_config.num_classes not in (0, len(source.class_names)):
        raise InputError(
            f"the model has {network_config.num_classes} classes, but {source.name} has "
            f"{len(source.class_names)}"
        )


def _with_index(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**batch, "index": np.arange(len(batch["data"]), dtype=np.int32)}


def _due(done: int, every: int, steps: int) -> bool:
    return done % every == 0 or done == steps


def _check_finite(metrics: dict[str, jax.Array], step: int, last_good: int | None) -> None:
    if not math.isfinite(float(metrics["loss"])):
        raise InputError(
            f"the loss is {float(metrics['loss'])} at step {step}; lower the learning rate, or "
            f"set gradient_clip. The last checkpoint is that of step {last_good}"
        )


def _provenance(config: TrainConfig, source: data.DataSource) -> dict[str, Any]:
    return {"data_fingerprint": source.fingerprint, **dataclasses.asdict(config)}


def _resume(checkpoints: Checkpoints, state: TrainState, config: TrainConfig) -> TrainState:
    """The newest checkpoint's state, or the given one where there is none."""
    if checkpoints.latest_step is None:
        return state
    changed = differences(checkpoints.config(), dataclasses.asdict(config))
    if changed and not config.allow_config_change:
        raise InputError(
            f"the run was begun with another config ({'; '.join(changed)}); choose another "
            "workdir, or set allow_config_change"
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
    previous = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
