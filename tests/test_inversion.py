"""Backwards through the same blocks, and steps that are made again: what editing is built on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowturbo_jax as ft
from flowturbo_jax import path, sampler
from flowturbo_jax.interfaces import Flow, InputError, State

START = np.array([[0.3, -0.6, 0.9], [1.1, 0.2, -0.4]])


def velocity(x, t):
    return jnp.square(x) * jnp.cos(2 * t)


FLOW = Flow(velocity, lambda x, t, m: velocity(x, t) - m)


def slope(error):
    return np.log2(error(40) / error(80))


@pytest.mark.parametrize(("block", "order"), [("E", 1), ("H", 2), ("P", 2)])
@pytest.mark.parametrize("t_end", [0.0, 0.4])
def test_inversion_has_the_order_of_the_block(float64, block, order, t_end):
    data = 0.5 * START
    exact = 1 / (1 / data - (np.sin(2 * t_end) - np.sin(2)) / 2)  # where the flow came from

    def error(steps):
        noise = sampler.invert(FLOW, jnp.asarray(data), f"{block}{steps}", t_end)
        return np.abs(np.asarray(noise) - exact).max()

    assert slope(error) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("block", "order"), [("E", 1), ("H", 3), ("P", 3)])
def test_there_and_back_errs_in_one_order_less_where_the_order_is_even(float64, block, order):
    """Of an even order, the leading errors of the two ways have one sign, and cancel."""

    def error(steps):
        data = 0.5 * jnp.asarray(START)
        noise = sampler.invert(FLOW, data, f"{block}{steps}")
        return np.abs(np.asarray(sampler.sample(FLOW, noise, f"{block}{steps}") - data)).max()

    assert slope(error) == pytest.approx(order, abs=0.2)


def test_inversion_is_the_blocks_on_the_grid_reversed():
    x = jnp.asarray(START, jnp.float32)
    schedule = ft.Schedule.parse("H1P2E1@0.5")
    grid = schedule.time_grid()[::-1]
    state = State(x, velocity(x, grid[0]))
    for run, first, last in schedule.intervals():
        for i in range(first, last):
            state = sampler.BLOCKS[run.block](FLOW, state, grid[i], grid[i + 1])
    np.testing.assert_allclose(sampler.invert(FLOW, x, schedule), state.x, rtol=0, atol=1e-6)


def test_a_refiner_does_not_go_backwards():
    with pytest.raises(InputError, match=r"H1R1 refines.*E, H, P and A"):
        sampler.invert(FLOW, jnp.ones((1, 2)), "H1R1")


def test_a_renoised_point_has_the_distribution_of_the_path():
    rng = np.random.default_rng(0)
    noise, fresh = (jnp.asarray(rng.standard_normal((200_000, 1)), jnp.float32) for _ in range(2))
    data = jnp.full_like(noise, 2.0)
    t, before = jnp.float32(0.7), jnp.float32(0.4)
    x = path.renoise(path.interpolate(noise, data, t), fresh, t, before)
    # Four standard errors of 200,000 samples.
    assert float(x.mean()) == pytest.approx(0.4 * 2.0, abs=0.006)
    assert float(x.std()) == pytest.approx(0.6, abs=0.004)


def test_each_step_is_made_as_often_as_asked_from_where_it_began():
    seen = []

    def rewind(state, t, t_before, number):
        jax.debug.callback(
            lambda *given: seen.append(tuple(map(float, given))), t, t_before, number
        )
        return state._replace(x=state.x - 1)  # undoes what a step adds, and half of it more

    flow = Flow(lambda x, t: jnp.ones_like(x))
    x = jnp.zeros((1, 1))
    state, _ = sampler.integrate(flow, x, "E2", rewind=rewind, tries=3)
    # Of three tries of a step two are undone: each nets 0.5 - 1, and the last adds 0.5.
    assert float(state.x[0, 0]) == pytest.approx(2 * (2 * (0.5 - 1) + 0.5))
    jax.effects_barrier()
    assert [number for _, _, number in sorted(seen, key=lambda item: item[2])] == [0, 1, 3, 4]
    assert {(t, before) for t, before, _ in seen} == {(0.5, 0.0), (1.0, 0.5)}


def test_a_try_again_starts_from_the_state_that_rewinding_gives():
    flow = Flow(velocity)
    x = jnp.asarray(START, jnp.float32)
    start = State(x, velocity(x, jnp.float32(0)))
    again, _ = sampler.integrate(flow, x, "P1", rewind=lambda *_: start, tries=3)
    plain, _ = sampler.integrate(flow, x, "P1")
    np.testing.assert_allclose(again.x, plain.x, atol=1e-6)
    zero = State(x, jnp.zeros_like(x))
    other, _ = sampler.integrate(flow, x, "P1", rewind=lambda *_: zero, tries=2)
    assert np.abs(other.x - plain.x).max() > 0.01


@pytest.mark.parametrize("tries", [0, 2])
def test_tries_without_a_way_back_are_refused(tries):
    with pytest.raises(InputError, match=f"tries is {tries}"):
        sampler.integrate(FLOW, jnp.ones((1, 2)), "H1", tries=tries)
