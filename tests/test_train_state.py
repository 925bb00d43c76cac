"""The optimiser step and the moving average, against PyTorch's and against their definition."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import convert, train_state

PARAMETERS = 3e-7  # absolute: two roundings of parameters of up to 2.9


@pytest.fixture(scope="module")
def training_steps():
    """The training state before and after two steps with the stored gradients."""
    stored = golden.arrays("train/adamw")
    optimizer = train_state.make_optimizer(float(stored["lr"]), steps=2)
    state = train_state.create(golden.params("refiner/refiner", golden.REFINER), optimizer)
    average = golden.params("refiner/refiner_ema", golden.REFINER)
    states = [state._replace(ema_params=average)]
    step = jax.jit(train_state.apply_gradients, static_argnums=(2, 3))
    for name in ("code", "paper"):
        gradients = golden.weights(f"train/refiner_grads_{name}")
        gradients["pos_embed"] = np.zeros((1, 16, 64), np.float32)
        gradients = convert.params_from_state("sit", golden.REFINER, gradients)
        states.append(step(states[-1], gradients, optimizer, float(stored["ema_decay"])))
    return stored, states


def official(params):
    return convert.state_from_params("sit", golden.REFINER, params)


def test_first_step_of_adamw_matches_pytorch(training_steps):
    _, states = training_steps
    ours, theirs = official(states[1].params), golden.weights("train/adamw_params_after_1")
    assert set(ours) == set(theirs)
    assert max(golden.deviation(ours[key], theirs[key]) for key in theirs) < PARAMETERS
    # The step itself is 5e-5, far above the bound.
    moved = golden.deviation(
        ours["final_layer.linear.bias"], official(states[0].params)["final_layer.linear.bias"]
    )
    assert moved == pytest.approx(5e-5, rel=0.01)
    np.testing.assert_array_equal(ours["pos_embed"], theirs["pos_embed"])


@pytest.mark.parametrize("step", [1, 2])
def test_steps_of_adamw_and_of_the_average_match_pytorch(training_steps, step):
    stored, states = training_steps
    compared = 0
    for kind, params in (("params", states[step].params), ("ema", states[step].ema_params)):
        ours, prefix = official(params), f"{kind}_after_{step}__"
        for key in (key for key in stored if key.startswith(prefix)):
            assert golden.deviation(ours[key.removeprefix(prefix)], stored[key]) < PARAMETERS, key
            compared += 1
    assert compared == {1: 6, 2: 6}[step]
    assert int(states[step].step) == step


def test_average_is_of_the_parameters_after_the_step():
    # The stored decay, 0.9999, moves the average by 5e-9 only.
    optimizer = train_state.make_optimizer(0.01, steps=1)
    state = train_state.create({"w": jnp.zeros(3)}, optimizer)
    after = train_state.apply_gradients(state, {"w": jnp.full(3, 7.0)}, optimizer, 0.75)
    # Adam's first step is the learning rate; 1 - 0.999 keeps 5 digits of float32.
    np.testing.assert_allclose(after.params["w"], [-0.01] * 3, rtol=1e-4)
    np.testing.assert_allclose(after.ema_params["w"], [-0.0025] * 3, rtol=1e-4)


def test_ema_warmup_forgets_the_start_and_reaches_its_decay():
    steps = jnp.asarray([0, 90, 10_000], jnp.int32)
    rates = [float(train_state.ema_rate(step, 0.99, warmup=True)) for step in steps]
    np.testing.assert_allclose(rates, [0.1, 0.91, 0.99], rtol=1e-6)
    assert float(train_state.ema_rate(steps[0], 0.99, warmup=False)) == np.float32(0.99)


def test_learning_rate_rises_falls_and_clips():
    params = {"w": jnp.ones(3)}
    gradients = {"w": jnp.asarray([3.0, 0.0, 4.0])}
    optimizer = train_state.make_optimizer(0.1, 10, "cosine", warmup_steps=5, gradient_clip=1.0)
    state = train_state.create(params, optimizer)
    moved = []
    for _ in range(10):
        new = train_state.apply_gradients(state, gradients, optimizer, 0.9)
        moved.append(float(jnp.abs(new.params["w"] - state.params["w"]).max()))
        state = new
    assert moved[0] == 0  # the first step of a warm-up has rate 0
    assert np.argmax(moved) == 5
    assert moved[-1] < 0.1 * max(moved)
    # Adam's step does not see the gradient's size: with a constant gradient it is the rate.
    np.testing.assert_allclose(max(moved), 0.1, rtol=1e-4)
