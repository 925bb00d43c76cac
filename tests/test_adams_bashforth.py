"""Adams-Bashforth's weights on any grid, and the orders of convergence that come of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from multistep_by_hand import EXACT, FLOW, random_grid
from test_sampler import START, solution

from flowturbo_jax.multistep import Solver, adams_bashforth
from flowturbo_jax.sampler import sample
from flowturbo_jax.schedule import Schedule

TEXTBOOK = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("xp", [np, jnp])
def test_weights_on_a_uniform_grid_are_the_textbooks(float64, order, xp):
    times = xp.linspace(0.0, 1.0, 9)
    found = adams_bashforth(times, [order] * 8, order)
    assert isinstance(found, np.ndarray) == (xp is np)
    for row in found[order - 1 :]:
        np.testing.assert_allclose(row[::-1], TEXTBOOK[order], **EXACT)
    for i in range(order - 1):  # fewer velocities: of as much lower order
        lower = TEXTBOOK.get(i + 1, (1.0,))
        np.testing.assert_allclose(found[i, ::-1][: i + 1], lower, **EXACT)
        assert not found[i, ::-1][i + 1 :].any()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("xp", [np, jnp])
def test_weights_integrate_polynomials_below_their_order_on_any_grid(float64, order, falling, xp):
    times = random_grid(7, order)[:: -1 if falling else 1]
    weights = np.asarray(adams_bashforth(xp.asarray(times.copy()), [order] * 7, 5))
    for i, power in itertools.product(range(7), range(order)):
        if power > i:  # the first steps remember too few velocities for that
            continue
        known = np.zeros(5)
        known[-min(i + 1, 5) :] = times[max(i - 4, 0) : i + 1] ** power
        wanted = (times[i + 1] ** (power + 1) - times[i] ** (power + 1)) / (power + 1)
        found = (times[i + 1] - times[i]) * (weights[i] @ known)
        assert found == pytest.approx(wanted, abs=1e-13)


def test_weights_of_too_low_an_order_do_not_integrate_the_next_power():
    """What the test above measures can be missed."""
    times = random_grid(7)
    for order in (1, 2, 3, 4):
        row = adams_bashforth(times, [order] * 7, 4)[6]
        wanted = (times[7] ** (order + 1) - times[6] ** (order + 1)) / (order + 1)
        found = (times[7] - times[6]) * (row @ times[3:7] ** order)
        assert abs(found - wanted) > 1e-5


@pytest.mark.parametrize("orders", [(1, 2, 3, 4, 4, 4), (4, 0, 2, 0, 3, 1), (3,), (2, 2)])
def test_rows_sum_to_one_or_are_zero_where_no_order_is_asked(float64, orders):
    found = adams_bashforth(random_grid(len(orders)), orders, 4)
    assert found.shape == (len(orders), 4)
    np.testing.assert_allclose(found.sum(axis=1), [order > 0 for order in orders], **EXACT)
    for i, (row, order) in enumerate(zip(found, orders, strict=True)):
        assert np.count_nonzero(row) == min(order, i + 1)
        assert not row[: 4 - min(order, i + 1)].any()


def test_weights_do_not_depend_on_the_grids_place_and_scale():
    times = random_grid(6)
    moved = adams_bashforth(3 - 0.25 * times, [4] * 6, 4)
    # Where a step is five times the one before, weights are as large as 25.
    np.testing.assert_allclose(moved, adams_bashforth(times, [4] * 6, 4), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("orders", [(1, 2, 3, 4, 4), (4, 4, 4, 4, 4), (2, 0, 3, 0, 2)])
def test_weights_can_be_differentiated_in_the_times(float64, orders):
    times = jnp.linspace(0.0, 1.0, 6) ** 1.3
    weights = jax.jit(lambda t: adams_bashforth(t, orders, 4))
    # Central differences of step 1e-6 err by some 1e-9, by their cubes and by rounding.
    check_grads(weights, (times,), order=1, atol=1e-7, rtol=1e-7, eps=1e-6)
    slopes = np.asarray(jax.jit(jax.jacobian(weights))(times))
    assert np.isfinite(slopes).all()
    assert np.abs(slopes).max() > 0.1
    np.testing.assert_allclose(slopes.sum(axis=1), 0, rtol=0, atol=1e-11)  # of rows that sum to 1


def exact_start(text, order):
    """A hook that puts x on the solution until there are as many velocities as the order needs.

    A method of order k is of that order only from k values that are as exact.
    """
    schedule = Schedule.parse(text)
    last = schedule.time_grid(0.0, jnp.float64)[min(order - 1, schedule.steps)] + 1e-9

    def after_step(state, t):
        exact = 1 / (1 / jnp.asarray(START) - jnp.sin(2 * t) / 2)
        return state._replace(x=jnp.where(t < last, exact, state.x))

    return after_step


def end_error(text, solver=None, after_step=None):
    """Distance of the last point from the exact one."""
    run = jax.jit(lambda x, solver: sample(FLOW, x, text, after_step=after_step, solver=solver))
    return np.abs(np.asarray(run(jnp.asarray(START), solver)) - solution(START, 1.0)).max()


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("grid", ["", "@0.4", "@cosine", "@sigmoid"])
def test_adams_bashforth_has_its_order_from_an_exact_start(float64, order, grid):
    def error(steps):
        text = f"A{order}x{steps}{grid}"
        return end_error(text, after_step=exact_start(text, order))

    # With half the steps the slope is off by twice as much, 0.09 to 0.36 for order 4.
    assert np.log2(error(400) / error(800)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("A2x{n}", 2),  # its Euler step errs by dt^2, once
        ("H1A2x{rest}", 2),
        ("H1A3x{rest}", 3),  # the Heun step errs by dt^3, once
        ("A3x{n}", 2),  # the Euler step spoils it
        ("H1A4x{rest}", 3),
    ],
)
def test_first_steps_of_lower_order_count_as_theory_says(float64, text, order):
    def error(steps):
        return end_error(text.format(n=steps, rest=steps - 1))

    assert np.log2(error(400) / error(800)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_bashforth_has_its_order_by_itself_where_the_first_steps_are_short(float64, order):
    def error(steps):  # Euler's step of N^-2 errs by N^-4, that of order 2 by N^-6
        return end_error(f"A{order}x{steps}@learnt", Solver(np.linspace(0, 1, steps + 1) ** 2))

    assert np.log2(error(400) / error(800)) == pytest.approx(order, abs=0.2)


def test_uniform_weights_on_other_steps_lose_the_order(float64):
    """What the variable-step formula is for: the textbook's weights are of order 1 there."""

    def error(steps):
        lengths = np.where(np.arange(steps) % 2, 1.0, 3.0)
        times = np.concatenate([[0], np.cumsum(lengths / lengths.sum())])
        times[-1] = 1
        fixed = adams_bashforth(np.linspace(0, 1, steps + 1), [2] * steps, steps)
        return (
            end_error(f"S{steps}", Solver(times, fixed)),
            end_error(f"A2x{steps}@learnt", Solver(times)),
        )

    (coarse, right), (fine, right_fine) = error(50), error(100)
    assert np.log2(coarse / fine) == pytest.approx(1, abs=0.15)
    assert np.log2(right / right_fine) == pytest.approx(2, abs=0.15)
