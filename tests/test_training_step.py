"""One optimiser step and one evaluation: what they compute, and what they do not compute twice."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from flowturbo_jax import cost, data, parallel, tasks, train_state, training_step
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.train_config import TrainConfig
from flowturbo_jax.training_watch import with_index

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("teacher") / "model", refiner=False)


def refiner_recipe(teacher, **fields):
    own = {"objective": "refiner", "model_dir": str(teacher), "model": {}, "schedule": "H1R1"}
    return TrainConfig.create(tiny.recipe(**{**own, **fields}))


def task_and_batch(config):
    source = data.open_source(config.data)
    batch = data.batches(source, config.batch_size, config.seed)[0]
    del batch["unreadable"]
    return tasks.make_task(config, source), jax.tree.map(jnp.asarray, with_index(batch, (0, 1)))


def step_of(config, task):
    optimizer = training_step.optimizer_of(config)
    state = train_state.create(task.network.initialise(jax.random.key(1)), optimizer)
    step = training_step.make_step(task, optimizer, config, jax.random.key(0))
    return lambda batch: jax.jit(step, static_argnums=3)(state, task.frozen, batch, _same)


def _same(tree):
    return tree


def signalled(batch):
    return {**batch, "signals": np.zeros((len(batch["index"]), 2), np.float32)}


@pytest.mark.parametrize("parts", [4])
def test_accumulated_steps_equal_the_whole_batch(teacher, parts):
    config = refiner_recipe(teacher)
    task, batch = task_and_batch(config)
    whole, metrics = step_of(config, task)(signalled(batch))
    split = refiner_recipe(teacher, accumulation_steps=parts)
    accumulated, other = step_of(split, task)(signalled(batch))
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], other[name], rtol=1e-6)
    jax.tree.map(
        # The first step of Adam is the sign of the gradient; rounding shows where that is near 0.
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        whole.params,
        accumulated.params,
    )


def test_accumulated_needs_less_memory_for_activations(teacher):
    def temporary(parts):
        config = refiner_recipe(teacher, batch_size=64, accumulation_steps=parts)
        task, batch = task_and_batch(config)
        optimizer = training_step.optimizer_of(config)
        state = train_state.create(task.network.initialise(jax.random.key(1)), optimizer)
        step = training_step.make_step(task, optimizer, config, jax.random.key(0))
        compiled = jax.jit(step, static_argnums=3).lower(
            state, task.frozen, signalled(batch), _same
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.5 * temporary(1)


def test_the_batch_must_split_over_devices_and_parts():
    devices = jax.devices()[:4]
    parallel.check_batch_size(24, 3, devices)
    message = "batch_size 20 does not split over 4 devices and 3 accumulation_steps; take 12 or 24"
    with pytest.raises(InputError, match=message):
        parallel.check_batch_size(20, 3, devices)


def test_the_teacher_is_evaluated_once_per_needed_point(teacher):
    config = refiner_recipe(teacher)
    task, batch = task_and_batch(config)
    predictor = tiny.description(refiner=False).predictor
    one = tasks.forward_multiply_adds(tiny.family("sit").predictor(predictor), predictor)
    refiner = tasks.forward_multiply_adds(task.network, predictor, inputs=2)
    params = jax.eval_shape(task.network.initialise, jax.random.key(0))
    key = jax.random.key(0)
    loss = cost.multiply_adds(lambda p: task.loss(p, task.frozen, batch, key), params)
    assert loss == config.batch_size * (2 * one + refiner)
    evaluation = cost.multiply_adds(lambda p: task.evaluate(p, task.frozen, batch, key), params)
    assert evaluation == loss  # keeping the velocity costs nothing more
    assert task.multiply_adds == 2 * one + 3 * refiner


def test_a_half_precision_teacher_is_half_as_large_and_teaches_nearly_the_same(teacher):
    full, batch = task_and_batch(refiner_recipe(teacher))
    half, _ = task_and_batch(refiner_recipe(teacher, teacher_dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.frozen)} == {"bfloat16"}
    assert half.teacher_sha256 == full.teacher_sha256
    params = full.network.initialise(jax.random.key(1))
    losses = [
        np.asarray(jax.jit(task.loss)(params, task.frozen, batch, jax.random.key(3)))
        for task in (full, half)
    ]
    # bfloat16 has 8 bits: velocities near 1 are off by 0.004 each, and losses are squares of that.
    np.testing.assert_allclose(*losses, rtol=0.1, atol=1e-4)
    assert (losses[0] != losses[1]).any()


def test_mixed_precision_keeps_parameters_and_averages_in_float32(teacher):
    config = refiner_recipe(teacher, dtype="bfloat16", teacher_dtype="bfloat16", remat=True)
    task, batch = task_and_batch(config)
    # JAX lowers attention's gradients in half precision with a promotion of its own.
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = step_of(config, task)(signalled(batch))
    for tree in (state.params, state.ema_params):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}
    assert math.isfinite(metrics["loss"])


@pytest.mark.parametrize("size", [7, 20])
def test_the_evaluation_is_the_mean_over_the_fixed_batch_and_over_each_bin_of_time(teacher, size):
    config = refiner_recipe(teacher, batch_size=8, evaluation_size=size)
    source = data.open_source("digits")
    task = tasks.make_task(config, source)
    params = task.network.initialise(jax.random.key(1))
    key = jax.random.key(5)
    run = parallel.data_parallel(training_step.make_evaluation(task, key), donate=False)
    from flowturbo_jax.trainer import _evaluation_chunks

    chunks = [run(params, task.frozen, chunk) for chunk in _evaluation_chunks(config, source)]
    means, by_time = training_step.summarise(chunks)

    whole = jax.tree.map(
        jnp.asarray, with_index(data.batches(source, size, config.seed)[0], (0, 1))
    )
    values = jax.jit(task.evaluate)(params, task.frozen, whole, key)
    for name in ("loss", "keep_velocity"):
        np.testing.assert_allclose(means[name], np.mean(values[name]), rtol=1e-5)
        for i in range(5):
            member = (np.asarray(values["t"]) * 5).astype(int).clip(0, 4) == i
            found = by_time.get(f"{name}_t_{i / 5:.1f}_{(i + 1) / 5:.1f}")
            if member.any():
                np.testing.assert_allclose(found, values[name][member].mean(), rtol=1e-5)
            else:
                assert found is None


def test_half_life_in_samples_means_the_same_for_every_batch_size():
    for batch_size in (8, 64):
        config = TrainConfig.create(tiny.recipe(batch_size=batch_size, ema_half_life=6400))
        assert config.step_decay ** (6400 / batch_size) == pytest.approx(0.5)
    assert TrainConfig.create(tiny.recipe(ema_decay=0.98)).step_decay == 0.98
    with pytest.raises(InputError, match="ema_decay and ema_half_life mean the same; give one"):
        tiny.recipe(ema_decay=0.98, ema_half_life=10)


def test_accumulation_is_a_mean():
    def function(part):
        return {"mean": jnp.mean(part["x"])}

    batch = {"x": jnp.arange(12.0)}
    for parts in (1, 2, 3, 12):
        result = training_step.accumulated(function, batch, parts)
        assert float(result["mean"]) == pytest.approx(5.5)


def program_of(config):
    """The text of the step's program, which holds every number that is no argument."""
    task, batch = task_and_batch(config)
    optimizer = training_step.optimizer_of(config)
    params = jax.eval_shape(task.network.initialise, jax.random.key(1))
    state = jax.eval_shape(lambda p: train_state.create(p, optimizer), params)
    step = training_step.make_step(task, optimizer, config, jax.random.key(0))
    frozen = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), task.frozen)
    text = jax.make_jaxpr(lambda *args: step(*args, _same))(state, frozen, signalled(batch))
    return re.sub(r"0x[0-9a-f]+", "", str(text))


@pytest.fixture(scope="module")
def plain_program(teacher):
    return program_of(refiner_recipe(teacher))


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 2e-3},
        {"learning_rate_decay": "cosine"},
        {"warmup_steps": 3},
        {"weight_decay": 0.1},
        {"gradient_clip": 0.5},
        {"ema_decay": 0.9},
        {"ema_half_life": 100.0},
        {"ema_warmup": False},
        {"label_dropout": 0.3},
        {"label_handling": "official"},
        {"dt_min": 0.01},
        {"dt_max": 0.2},
        {"dt_per_sample": False},
        {"times_inside": False},
        {"dtype": "bfloat16"},
        {"remat": True},
        {"accumulation_steps": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_key_of_a_recipe_changes_the_step(teacher, plain_program, fields):
    assert program_of(refiner_recipe(teacher, **fields)) != plain_program


def test_the_same_recipe_gives_the_same_step(teacher, plain_program):
    assert program_of(refiner_recipe(teacher)) == plain_program


def test_the_step_is_compiled_once(teacher):
    config = refiner_recipe(teacher)
    task, batch = task_and_batch(config)
    optimizer = training_step.optimizer_of(config)
    state = train_state.create(task.network.initialise(jax.random.key(1)), optimizer)
    step = training_step.make_step(task, optimizer, config, jax.random.key(0))
    traced = []

    def counted(*args):
        traced.append(1)
        return step(*args)

    run = parallel.data_parallel(counted, jax.devices()[:1])
    for _ in range(3):
        state, _ = run(state, task.frozen, signalled(batch))
    assert len(traced) == 1
