"""Training, from a recipe and a folder to a model directory: reads top to bottom."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flowturbo_jax import (
    data,
    images,
    model_directory,
    parallel,
    run_folder,
    stopping,
    tasks,
    throughput,
    train_state,
    training_step,
)
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.logbook import Logbook
from flowturbo_jax.model_directory import Description, Model
from flowturbo_jax.pipelines import any_model
from flowturbo_jax.run_checkpoints import Checkpoints
from flowturbo_jax.tasks import Task
from flowturbo_jax.train_config import TrainConfig, differences
from flowturbo_jax.train_state import TrainState
from flowturbo_jax.training_watch import Feed, Watch, with_index

SMALL_IMAGE = 64  # pixels: smaller ones are enlarged, larger ones are few


def train_and_evaluate(config: Any, workdir: str | Path) -> TrainState:
    """Trains by a recipe, and writes checkpoints, metrics, sample grids and a model directory.

    A run that was stopped, however it was, continues from its newest whole checkpoint, bit for bit:
    batch and random draws of a step are functions of (seed, step) alone. SIGINT and SIGTERM save
    and stop. Every process of a run (`parallel.join`) calls this; process 0 writes the files.

    Args:
      config: a mapping with the keys of `TrainConfig`.
      workdir: folder of this run: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `samples/` and
        at the end `model/`, the model directory with the averaged weights.

    Returns:
      The state after the last step made.

    Raises:
      InputError: the recipe is wrong, or not the one the run in workdir was begun with; another run
        has the workdir; the data, the disk or the arithmetic failed.
    """
    workdir = Path(workdir)
    with stopping.requests() as stop, ExitStack() as resources:
        with parallel.together("the start"):
            config = TrainConfig.create(config)
            parallel.check_batch_size(config.batch_size, config.accumulation_steps)
            source = data.open_source(config.data, config.image_size)
            task = tasks.make_task(config, source)
            source = task.source  # of texts, their token ids
            if parallel.is_first():
                resources.enter_context(run_folder.reserved(workdir))
                run_folder.check_training(workdir)
        identity = _identity(config, source, task)
        parallel.check_same(json.dumps(identity, sort_keys=True), "recipe, data and teacher")

        optimizer = training_step.optimizer_of(config)
        init_key, train_key, evaluation_key = jax.random.split(jax.random.key(config.seed), 3)
        state = train_state.create(jax.jit(task.network.initialise)(init_key), optimizer)
        checkpoints = None
        with parallel.together("resuming"):
            if parallel.is_first():
                checkpoints = Checkpoints(workdir / "checkpoints", report=tqdm.write)
                state = _resume(checkpoints, state, identity, config.allow_config_change)
        state = parallel.replicate(parallel.from_first(state))
        frozen = parallel.replicate(task.frozen)

        step_function = parallel.data_parallel(
            training_step.make_step(task, optimizer, config, train_key)
        )
        evaluate = parallel.data_parallel(
            training_step.make_evaluation(task, evaluation_key), donate=False
        )
        first = int(state.step)
        kept = checkpoints.kept if checkpoints else lambda: "process 0 says what is kept"
        with parallel.together("the start"):
            feed = Feed(config, source, first)
            watch = Watch(config, source, feed, workdir, kept)
            meter = _meter(config, task)
            chunks = list(_evaluation_chunks(config, source))
            logbook = None
            if parallel.is_first():
                logbook = resources.enter_context(Logbook(workdir, first + 1))
                _tell_of_samples(task.model(state.ema_params).description)
        bar = resources.enter_context(_progress_bar(config, first))
        stopped = parallel.anywhere(stop.is_set())
        for step in range(first, config.steps):
            if stopped:
                break
            with meter.waiting():
                batch = feed.next(stop)
            state, metrics = step_function(state, frozen, batch)
            bar.update()
            meter.step()
            done = step + 1
            log, look, save = (
                done % every == 0 or done == config.steps
                for every in (config.log_every, config.evaluate_every, config.checkpoint_every)
            )
            # The first step is waited for as well: what it takes to compile is not speed.
            due = log or look or save or done == first + 1
            # Alone, a process need not ask the others whether to stop.
            now = stop.is_set() and parallel.part()[1] == 1
            stopped = watch.see(done, metrics, at_once=due or now) or now
            if not (due or stopped):
                continue
            rates = meter.rates()
            losses = [evaluate(state.ema_params, frozen, chunk) for chunk in chunks if look]
            with parallel.together(f"writing at step {done}"):
                if logbook is not None and log:
                    _log_step(logbook, config, done, metrics, rates, feed)
                if logbook is not None and look:
                    means, by_time = training_step.summarise(losses)
                    logbook.scalars(
                        done, _prefixed("evaluation", means), _prefixed("evaluation", by_time)
                    )
                    model = task.model(_host(state.ema_params))
                    _write_samples(logbook, workdir, done, model, config, task.prompts)
                if checkpoints is not None and (save or stopped):
                    # Last, so that what is not saved is also made again.
                    checkpoints.save(done, state, identity)
            meter.begin()
        if int(state.step) == config.steps:
            with parallel.together("writing the model"):
                if parallel.is_first():
                    _write_model(workdir, task.model(_host(state.ema_params)))
    return state


def _identity(config: TrainConfig, source: data.DataSource, task: Task) -> dict[str, Any]:
    """What a run must agree with to be continued."""
    teacher = {"teacher": task.teacher_sha256} if task.teacher_sha256 else {}
    identity = {"data_fingerprint": source.fingerprint, **teacher, **dataclasses.asdict(config)}
    return json.loads(json.dumps(identity))  # as a checkpoint holds it: tuples are lists


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


def _evaluation_chunks(config: TrainConfig, source: data.DataSource) -> Iterator[data.Batch]:
    """This process's part of the fixed batch, in chunks that fit where a training step does."""
    size, part = config.batch_size // config.accumulation_steps, parallel.part()
    batches = data.batches(source, size, config.seed, config.horizontal_flip, part)
    for chunk in range(-(-config.evaluation_size // size)):
        batch = with_index(batches[chunk], part, first=chunk * size)
        del batch["unreadable"]  # named when training comes to it
        yield {**batch, "weight": (batch["index"] < config.evaluation_size).astype(np.float32)}


def _meter(config: TrainConfig, task: Task) -> throughput.Meter:
    """Measures speed; a step in half precision anywhere is held against the peak of that."""
    half = "bfloat16" in (config.dtype, config.teacher_dtype)
    peak = throughput.peak(parallel.device_kind(), "bfloat16" if half else "float32")
    flop = 2 * task.multiply_adds * config.batch_size
    return throughput.Meter(config.batch_size, flop, peak and peak * parallel.total_devices())


def _progress_bar(config: TrainConfig, first: int) -> tqdm:
    """A bar on a terminal, and in process 0 only; log lines tell the time to go elsewhere."""
    shown = None if parallel.is_first() else True
    options = {"total": config.steps, "initial": first, "unit": "step", "disable": shown}
    return tqdm(desc=config.objective, **options)


def _log_step(
    logbook: Logbook,
    config: TrainConfig,
    done: int,
    metrics: dict[str, jax.Array],
    rates: dict[str, float],
    feed: Feed,
) -> None:
    learning_rate = train_state.learning_rates(
        config.learning_rate, config.steps, config.learning_rate_decay, config.warmup_steps
    )(done - 1)
    names = ("loss", "gradient_norm", "parameter_norm")
    values = _prefixed("train", {name: metrics[name] for name in names})
    values["train/learning_rate"] = learning_rate
    if feed.unreadable:
        values["train/unreadable"] = len(feed.unreadable)
    values.update(_prefixed("speed", rates))
    left = (config.steps - done) * rates.get("ms_per_step", 0.0) / 1e3
    logbook.scalars(done, values, note=f"({throughput.duration(left)} to go)" if left else "")


def _tell_of_samples(description: Description) -> None:
    if description.image_shape[-1] not in (1, 3):
        tqdm.write("the model has no VAE, so its samples are latents: no pictures are written")


def _write_samples(
    logbook: Logbook,
    workdir: Path,
    done: int,
    model: Model,
    config: TrainConfig,
    prompts: tuple[str, ...],
) -> None:
    """A picture of samples: a column per class or text (the first ten), or eight images if large.

    Texts are the prompts, as many as there are.
    """
    if model.description.image_shape[-1] not in (1, 3):
        return  # latents; _tell_of_samples has said so
    wanted = prompts or range(max(model.description.predictor.num_classes, 1))
    side = model.description.image_shape[0]
    if side <= SMALL_IMAGE:
        columns = min(len(wanted), 10)
        shown = list(wanted[:columns]) * 4
    else:
        columns = 4
        places = np.linspace(0, len(wanted) - 1, 8).astype(np.int32)
        shown = [wanted[place] for place in places]
    pipe = any_model.pipeline_of(model)
    samples = pipe(
        shown, seeds=config.seed, schedule=config.schedule, batch_size=min(len(shown), 8)
    )
    picture = images.grid(np.asarray(samples), columns, zoom=max(1, SMALL_IMAGE // side))
    try:
        images.save_png(workdir / "samples" / f"{done:07d}.png", picture)
    except OSError as error:
        raise InputError(
            f"cannot write to {workdir / 'samples'}: {error.strerror}; make room, and the same "
            "command continues from the last checkpoint"
        ) from error
    logbook.picture(done, "samples", picture)


def _write_model(workdir: Path, model: Model) -> None:
    params = (model.predictor_params, model.refiner_params, model.vae_params)
    text = (model.text_encoder_params, model.tokenizer)
    model_directory.save(workdir / "model", model.description, *params, *text)


def _prefixed(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": value for name, value in values.items()}


def _host(tree: Any) -> Any:
    """A tree of arrays in the memory of this machine."""
    return jax.tree.map(np.asarray, tree)
