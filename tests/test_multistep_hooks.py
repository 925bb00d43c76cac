"""Multistep methods under hooks, in tries, and on the way back: what the history then is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multistep_by_hand import EXACT, FLOW, ROUNDING, by_hand, random_solver
from test_sampler import START, velocity

from flowturbo_jax import sampler
from flowturbo_jax.inpainting import Known
from flowturbo_jax.interfaces import Flow, InputError, State
from flowturbo_jax.sampler import integrate, invert, sample
from flowturbo_jax.schedule import Schedule


def dated(x, t):
    """A memory that says where and when it was evaluated."""
    return {"v": velocity(x, t), "x": x, "t": jnp.full(x.shape[:1], t)}


DATED = Flow(dated, drift=lambda memory: memory["v"])


def back_to_the_start(state, t, t_before, number):
    """What undoes a step of A or S exactly: the memory says where it began."""
    return State(state.memory["x"], state.memory)


@pytest.mark.parametrize("text", ["A3x5", "S4", "A2x2S2"])
@pytest.mark.parametrize("tries", [2, 4])
def test_a_step_that_is_made_again_is_remembered_once(text, tries):
    x = jnp.asarray(START, jnp.float32)
    solver = random_solver(text, dtype=np.float32) if "S" in text else None
    options = {"solver": solver, "observe": lambda state: (state.x, state.history["t"])}
    _, (points, _) = integrate(DATED, x, text, **options)
    again, (same, times) = integrate(
        DATED, x, text, rewind=back_to_the_start, tries=tries, **options
    )
    np.testing.assert_allclose(same, points, **ROUNDING)
    schedule = Schedule.parse(text)
    grid = np.asarray(schedule.time_grid(0.0, times=None if solver is None else solver.times))
    for i, remembered in enumerate(times[:, :, 0]):
        there = min(i + 1, schedule.remembered)
        np.testing.assert_array_equal(remembered[-there:], grid[: i + 1][-there:])
        assert not remembered[:-there].any()  # none of those there are none of
    np.testing.assert_array_equal(again.x, same[-1])


@pytest.mark.parametrize("text", ["A3x5", "H1S2R2"])
def test_a_hook_that_makes_a_state_of_its_own_does_not_lose_the_history(text):
    x = jnp.asarray(START, jnp.float32)
    solver = random_solver(text, dtype=np.float32) if "S" in text else None
    plain = sample(FLOW, x, text, solver=solver)
    found = sample(FLOW, x, text, 0.0, lambda state, t: State(state.x, state.memory), solver)
    np.testing.assert_allclose(found, plain, **ROUNDING)
    other = State(x, x, jnp.full((5, 2, 2), 7.0))  # of this only x and memory count

    def replaced(state, t):
        return other._replace(x=state.x, memory=state.memory)

    np.testing.assert_allclose(sample(FLOW, x, text, 0.0, replaced, solver), plain, **ROUNDING)


def test_a_hook_that_returns_no_state_is_refused():
    with pytest.raises(InputError, match="after_step must return a State"):
        sample(FLOW, jnp.asarray(START, jnp.float32), "A2x2", after_step=lambda state, t: state.x)


@pytest.mark.parametrize("text", ["A2x5", "H1A3x3", "S4"])
@pytest.mark.parametrize("tries", [1, 3])
def test_inpainting_keeps_what_is_known_and_tries_again(text, tries):
    rng = np.random.default_rng(0)
    noise, data = (jnp.asarray(rng.standard_normal((2, 6)), jnp.float32) for _ in range(2))
    free = jnp.asarray(rng.random((2, 6)) < 0.5)
    known = Known(noise, data, free)

    def predict(x, t):
        return jnp.cos(2 * t) * (x.mean(axis=1, keepdims=True) - 0.5 * x)

    def fresh(number):
        return jax.random.normal(jax.random.fold_in(jax.random.key(3), number), noise.shape)

    solver = random_solver(text, dtype=np.float32) if text.startswith("S") else None
    state, (points, histories) = integrate(
        known.pinned(Flow(predict)),
        noise,
        text,
        after_step=known.after_step,
        observe=lambda state: (state.x, state.history),
        rewind=lambda state, t, before, number: known.rewound(state, t, before, fresh(number)),
        tries=tries,
        solver=solver,
    )
    schedule = Schedule.parse(text)
    grid = schedule.time_grid(0.0, times=None if solver is None else solver.times)
    for i, (t, x) in enumerate(zip(grid[1:], points, strict=True)):
        on_path = (1 - t) * noise + t * data
        np.testing.assert_allclose(np.where(free, 0, x), np.where(free, 0, on_path), **ROUNDING)
        there = min(i + 1, schedule.remembered)
        velocities = np.broadcast_to(data - noise, (there, *noise.shape))
        remembered = histories[i][-there:]
        wanted = np.where(free, remembered, velocities)
        np.testing.assert_allclose(remembered, wanted, **ROUNDING)
    assert np.isfinite(state.x).all()
    np.testing.assert_array_equal(np.where(free, 0, state.x), np.where(free, 0, data))


@pytest.mark.parametrize("text", ["A2x5", "A4x6@0.5", "H1A3x4", "P1A2x3E1@cosine"])
@pytest.mark.parametrize("t_end", [0.0, 0.4])
def test_inversion_is_the_formulas_on_the_grid_reversed(float64, text, t_end):
    data = 0.5 * START
    found = jax.jit(lambda x: invert(FLOW, x, text, t_end))(jnp.asarray(data))
    wanted = by_hand(text, data, t_start=t_end, backwards=True)[-1]
    np.testing.assert_allclose(found, wanted, **EXACT)


@pytest.mark.parametrize(("text", "order"), [("A2x{n}", 2), ("H1A3x{rest}", 3)])
def test_there_and_back_errs_less_the_more_steps(float64, text, order):
    data = 0.5 * jnp.asarray(START)

    def error(steps):
        schedule = text.format(n=steps, rest=steps - 1)
        there = jax.jit(lambda x: sample(FLOW, invert(FLOW, x, schedule), schedule))
        return np.abs(there(data) - data).max()

    # Of an even order, the leading errors of the two ways may cancel, which is one order more.
    assert np.log2(error(40) / error(80)) > order - 0.2
    assert error(80) < 1e-3


@pytest.mark.parametrize("text", ["S4", "H1S2", "H1P3@learnt", "A3x4@learnt"])
def test_what_is_learnt_goes_forward_only(text):
    with pytest.raises(InputError) as error:
        invert(FLOW, jnp.ones((1, 2)), text)
    assert str(error.value).startswith(f"schedule {text} is learnt, and a solver goes from noise")
    assert sampler.INVERSION in str(error.value)
