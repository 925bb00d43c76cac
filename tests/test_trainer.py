import json
import os
import signal
import threading

import jax
import numpy as np
import pytest
import tiny

from flowturbo_jax import (
    data,
    model_directory,
    parallel,
    tasks,
    train_state,
    trainer,
    training_step,
)
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.train_config import TrainConfig
from flowturbo_jax.training_watch import Feed

pytestmark = pytest.mark.usefixtures("compiled_once")


def same_bits(a, b) -> bool:
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)
    return all(jax.tree.leaves(same))


def some_steps(recipe: dict, devices: list, steps: int = 2):
    """The state and losses after a few steps on given devices, without files."""
    config = TrainConfig.create(recipe)
    source = data.open_source(config.data)
    task = tasks.make_task(config, source)
    optimizer = training_step.optimizer_of(config)
    state = train_state.create(task.network.initialise(jax.random.key(1)), optimizer)
    state = parallel.replicate(state, devices)
    frozen = parallel.replicate(task.frozen, devices)
    step = parallel.data_parallel(
        training_step.make_step(task, optimizer, config, jax.random.key(0)), devices
    )
    feed = Feed(config, source, 0)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, feed.next(threading.Event()))
        losses.append(float(metrics["loss"]))
    return state, losses


def record_streams(monkeypatch, at=None, do=None) -> list[int]:
    """Lets data.stream note the steps training takes batches for, and act before one of them."""
    stream, asked = data.stream, []

    def recording(source, batch_size, seed, flip, part, first_step, threads):
        batches = stream(source, batch_size, seed, flip, part, first_step, threads)
        for step, batch in enumerate(batches, first_step):
            asked.append(step)
            if step == at:
                do()
            yield batch

    monkeypatch.setattr(data, "stream", recording)
    return asked


def metrics_of(workdir) -> list[dict]:
    """The recorded numbers, without those of speed, which differ from run to run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def test_training_writes_checkpoints_metrics_samples_and_a_model(tmp_path):
    state = trainer.train_and_evaluate(tiny.recipe(), tmp_path)
    assert int(state.step) == 6
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert "train/loss" in lines[0]
    assert "evaluation/loss" in lines[-1]
    assert (tmp_path / "samples" / "0000006.png").stat().st_size > 100
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "checkpoints" / "6").is_dir()
    pipe = ClassToImage.load(tmp_path / "model")
    assert same_bits(pipe.model.predictor_params, state.ema_params)
    assert pipe.model.description.source["predictor"]["steps"] == 6
    assert pipe([3], schedule="H1P1").shape == (1, 8, 8, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch, number):
    recipe = tiny.recipe(learning_rate_decay="cosine", warmup_steps=2, log_every=2)
    whole = trainer.train_and_evaluate(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        record_streams(patch, at=3, do=lambda: os.kill(os.getpid(), number))
        stopped = trainer.train_and_evaluate(recipe, tmp_path / "stopped")
    assert 3 <= int(stopped.step) < 6
    assert not (tmp_path / "stopped" / "model").exists()
    asked = record_streams(monkeypatch)
    continued = trainer.train_and_evaluate(recipe, tmp_path / "stopped")
    assert asked == list(range(int(stopped.step), 6))  # it did not begin anew
    assert same_bits(continued, whole)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "stopped")


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    first = trainer.train_and_evaluate(tiny.recipe(), tmp_path)
    asked = record_streams(monkeypatch)
    again = trainer.train_and_evaluate(tiny.recipe(), tmp_path)
    assert asked == []
    assert same_bits(first, again)


def test_a_changed_config_is_refused_with_the_difference_unless_allowed(tmp_path, monkeypatch):
    trainer.train_and_evaluate(tiny.recipe(), tmp_path)
    changed = tiny.recipe(steps=7, learning_rate=2e-3, log_every=5)
    with pytest.raises(InputError, match=r"learning_rate: 0\.001 -> 0\.002; steps: 6 -> 7\)"):
        trainer.train_and_evaluate(changed, tmp_path)
    asked = record_streams(monkeypatch)
    allowed = tiny.recipe(steps=7, learning_rate=2e-3, allow_config_change=True)
    assert int(trainer.train_and_evaluate(allowed, tmp_path).step) == 7
    assert asked == [6]
    wider = tiny.recipe(model={"family": "sit", **tiny.SIT, "depth": 3}, allow_config_change=True)
    with pytest.raises(InputError, match="cannot be continued with another model"):
        trainer.train_and_evaluate(wider, tmp_path)
    with pytest.raises(InputError, match="is at step 7 already, past steps=6"):
        trainer.train_and_evaluate(tiny.recipe(allow_config_change=True), tmp_path)


def test_four_devices_train_as_one(tmp_path):
    recipe = tiny.recipe()
    one, one_losses = some_steps(recipe, jax.devices()[:1])
    four, four_losses = some_steps(recipe, jax.devices()[:4])
    # Sums over the batch in another order; Adam's first steps amplify rounding near zero gradients.
    np.testing.assert_allclose(one_losses, four_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.params, four.params)


def test_a_refiner_learns_more_than_keeping_the_velocity(tmp_path):
    teacher = tiny.save_model(tmp_path / "teacher", refiner=False)
    recipe = tiny.recipe(
        objective="refiner",
        model_dir=str(teacher),
        model={"depth": 1},
        steps=150,
        batch_size=32,
        learning_rate=3e-3,
        learning_rate_decay="cosine",
        evaluate_every=150,
        checkpoint_every=150,
        log_every=50,
        ema_decay=0.9,
        schedule="H1R1",
    )
    state = trainer.train_and_evaluate(recipe, tmp_path / "run")
    last = metrics_of(tmp_path / "run")[-1]
    assert last["evaluation/loss"] < 0.8 * last["evaluation/keep_velocity"]
    model = model_directory.load(tmp_path / "run" / "model")
    assert same_bits(model.refiner_params, state.ema_params)
    taught = model_directory.load(teacher)
    assert same_bits(model.predictor_params, taught.predictor_params)  # frozen means frozen


def test_the_stored_position_table_never_moves(tmp_path):
    recipe = tiny.recipe(weight_decay=0.5, learning_rate=0.1)
    state, _ = some_steps(recipe, jax.devices()[:1], steps=3)
    fresh = tasks.make_task(TrainConfig.create(recipe), data.open_source("digits"))
    expected = fresh.network.initialise(jax.random.key(1))["position_table"]
    np.testing.assert_array_equal(state.params["position_table"], expected)
    np.testing.assert_array_equal(state.ema_params["position_table"], expected)


def test_a_diverging_run_names_step_and_batch_and_saves_no_ruined_parameters(tmp_path):
    recipe = tiny.recipe(learning_rate=1e30, steps=20, checkpoint_every=1)
    message = r"diverged: .*parameter_norm is inf at step 1, .* examples \d+(, \d+){7} of digits"
    with pytest.raises(InputError, match=message):
        trainer.train_and_evaluate(recipe, tmp_path)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "checkpoints").exists()
    found = json.loads((tmp_path / "diverged.json").read_text())
    assert found["indices"] == data.order(data.open_source("digits"), 8, 0, 0).tolist()


def test_a_diverging_run_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    def poisoned(source, batch_size, seed, flip, part, first_step, threads):
        batches = data.batches(source, batch_size, seed, flip, part)
        for step in range(first_step, 100):
            batch = batches[step]
            yield {**batch, "data": batch["data"] * (np.nan if step == 6 else 1)}

    monkeypatch.setattr(data, "stream", poisoned)
    recipe = tiny.recipe(steps=20, checkpoint_every=2, log_every=20, evaluate_every=20)
    message = "loss is nan.* at step 7, .*; the checkpoint of step 6 is kept"
    with pytest.raises(InputError, match=message):
        trainer.train_and_evaluate(recipe, tmp_path)
    monkeypatch.undo()
    assert int(trainer.train_and_evaluate(recipe, tmp_path).step) == 20


def test_a_run_is_not_continued_under_another_teacher(tmp_path):
    teacher = tiny.save_model(tmp_path / "teacher", refiner=False)
    fields = {"objective": "refiner", "model_dir": str(teacher), "model": {}, "schedule": "H1R1"}
    trainer.train_and_evaluate(tiny.recipe(**fields), tmp_path / "run")
    model = model_directory.load(teacher)
    other = jax.tree.map(lambda a: a + 1, model.predictor_params)
    model_directory.save(teacher, model.description, other, None)
    more = tiny.recipe(**fields, allow_config_change=True)
    more.steps = 7
    with pytest.raises(InputError, match="begun with another teacher; choose another workdir"):
        trainer.train_and_evaluate(more, tmp_path / "run")


@pytest.mark.parametrize("occupied", [".", "model"])
def test_a_workdir_that_cannot_be_used_is_refused_before_training(tmp_path, occupied):
    if occupied == "model":
        (tmp_path / "run" / "model").mkdir(parents=True)
    else:
        (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match=r"change --workdir"):
        trainer.train_and_evaluate(tiny.recipe(), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "faces"}, "unknown data set 'faces'"),
        ({"batch_size": 6}, r"batch_size 6 does not split over 4 devices; take 4 or 8"),
        ({"model": {"family": "sit", **tiny.SIT, "input_size": 16}}, r"model takes \[16, 16, 1\]"),
        ({"model": {"family": "sit", **tiny.SIT, "num_classes": 3}}, "has 3 classes, but digits"),
        ({"model": {"family": "sit", **tiny.SIT, "deep": 3}}, "config key model: .*deep"),
        ({"model": {"family": "dit"}}, "unknown model family 'dit'"),
        ({"model": {"family": "sit", **tiny.SIT, "null_class": False}}, "label_dropout trains"),
        ({"label_dropout": 0.0}, "label_dropout trains the null class"),
        ({"objective": "refiner", "model_dir": "nowhere", "model": {}}, "no model directory"),
    ],
)
def test_recipes_that_fit_nothing_are_refused_before_anything_is_written(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        trainer.train_and_evaluate(tiny.recipe(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "gan"}, "objective is 'gan'; it must be one of 'flow_matching', 'refiner'"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 1.5}, "steps is 1.5; it must be of type int"),
        ({"remat": 1}, "remat is 1; it must be of type bool"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"guidance_scale": 1e9}, "guidance_scale is 1000000000.0; it must be at least"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0; it must be at least 0 and below 1"),
        ({"label_dropout": -0.1}, "label_dropout"),
        ({"learning_rate": 0.0}, "learning_rate is"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        (
            {"warmup_steps": 6},
            "warmup_steps is 6; .* and below steps, which is 6",
        ),
        ({"dt_min": 0.2, "dt_max": 0.1}, "must rise"),
        ({"dt_max": 0.2}, "dt_max belongs to the refiner objective"),
        ({"model_dir": "digits"}, "model_dir belongs to the refiner objective"),
        ({"objective": "refiner"}, "refiner objective needs model_dir"),
        ({"schedule": "X1"}, "cannot be read|unknown block"),
        ({"schedule": "H1R1"}, "schedule H1R1 refines, but a predictor is trained"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"guidance": "both"}, "guidance is 'both'"),
        ({"name": "../elsewhere"}, "it names files"),
        ({"name": ""}, "it names files"),
    ],
)
def test_recipes_are_validated_at_construction(as_users_run_it, fields, message):
    with pytest.raises(InputError, match=message):
        tiny.recipe(**fields)


def test_an_unknown_or_missing_config_key_is_named():
    recipe = tiny.recipe().to_dict()
    with pytest.raises(InputError, match="unknown config key 'stpes'"):
        TrainConfig.create({**recipe, "stpes": 3})
    del recipe["steps"]
    with pytest.raises(InputError, match="config key 'steps' is missing"):
        TrainConfig.create(recipe)
