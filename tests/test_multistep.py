"""Multistep methods: Adams-Bashforth's weights, what S and A steps compute, and their numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from test_sampler import START, solution, velocity

from flowturbo_jax import blocks, guidance, sampler
from flowturbo_jax.inpainting import Known
from flowturbo_jax.interfaces import Flow, InputError, State
from flowturbo_jax.multistep import Solver, adams_bashforth, check_solver, step_weights
from flowturbo_jax.sampler import integrate, invert, sample
from flowturbo_jax.schedule import Schedule

EXACT = {"rtol": 0, "atol": 1e-13}  # some roundings of float64 values of about 1
ROUNDING = {"rtol": 0, "atol": 2e-6}  # some roundings of float32 values of about 1
TEXTBOOK = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@pytest.fixture
def float64():
    """For this test only: rounding far below the errors that are measured."""
    with jax.enable_x64(True):
        yield


def offset(x, t, m):
    return 0.3 * jnp.sin(x + t) - 0.2 * m


FLOW = Flow(velocity, offset)


def random_grid(steps, seed=0):
    """Flow times from 0 to 1, each step up to five times another."""
    lengths = np.random.default_rng(seed).uniform(0.2, 1, steps)
    inner = np.cumsum(lengths / lengths.sum())[:-1]
    return np.concatenate([[0.0], inner, [1.0]])


def random_solver(text, seed=0, dtype=np.float64):
    """Numbers of a learnt schedule, with rows that sum to 1."""
    schedule = Schedule.parse(text)
    times = random_grid(schedule.steps, seed).astype(dtype)
    if not schedule.learns_weights:
        return Solver(times)
    weights = np.random.default_rng(seed + 1).normal(size=(schedule.steps, schedule.remembered))
    lag = np.arange(schedule.remembered - 1, -1, -1)
    weights = np.where(lag <= np.arange(schedule.steps)[:, None], weights, 0)
    weights[:, -1] += 1 - weights.sum(axis=1)
    return Solver(times, weights.astype(dtype))


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


# What steps compute, written out.


def row_by_hand(times, order):
    """Weights that integrate powers exactly, from times t_0 to t_i the step to the last time."""
    nodes = times[:-1][-order:]
    length = times[-1] - times[-2]
    places = (nodes - times[-2]) / length
    powers = np.arange(len(nodes))
    return np.linalg.solve(places[None] ** powers[:, None], 1 / (powers + 1))


def by_hand(text, x, solver=None, t_start=0.0, backwards=False):
    """The trajectory by formulas in NumPy, with a list of velocities that grows."""
    schedule = Schedule.parse(text)
    grid = 1 - schedule.left() if solver is None else np.asarray(solver.times)
    grid = 1 - (1 - t_start) * (1 - grid)
    grid = grid[::-1] if backwards else grid
    letters = [run.block for run in schedule.runs for _ in range(run.steps)]

    def v(x, t):
        return np.square(x) * np.cos(2 * t)

    def r(x, t, m):
        return 0.3 * np.sin(x + t) - 0.2 * m

    past, points, memory = [], [], v(x, grid[0])
    for i, (letter, t, t_next) in enumerate(zip(letters, grid[:-1], grid[1:], strict=True)):
        dt = t_next - t
        if letter in ("E", "H", "S") or letter.startswith("A"):
            first = v(x, t)
        elif letter == "P":
            first = memory
        else:
            first = memory + r(x, t, memory)
        past.append(first)
        if letter in ("H", "P"):
            memory = v(x + dt * first, t_next)
            x = x + dt / 2 * (first + memory)
            points.append(x)
            continue
        if letter in ("R", "Rc"):
            second = first + r(x + dt * first, t_next, first if letter == "Rc" else memory)
            x = x + dt / 2 * (first + second)
        elif letter == "E":
            x = x + dt * first
        else:
            row = row_by_hand(grid[: i + 2], int(letter[1:])) if letter.startswith("A") else None
            row = solver.weights[i][-(i + 1) :] if row is None else row
            x = x + dt * sum(w * p for w, p in zip(row, past[-len(row) :], strict=True))
        memory = first
        points.append(x)
    return np.stack(points)


COMPOSED = [
    "A2x5",
    "A4x6@0.6",
    "A3x5@cosine",
    "H1A3x3P1R1",
    "P2A4x5@sigmoid",
    "A2x3E1A4x3@learnt",
    "H1P3@learnt",
    "H1R2Rc1@learnt",
    "S1",
    "S5",
    "H1S4",
    "S2H1S2",
    "P1S3",
    "E1S1P2A2x2S2",
    "S4R1",
    "S2R1S2",
    "(S1R1)x2",
    "H1R1S2R2P1",
]


@pytest.mark.parametrize("text", COMPOSED)
@pytest.mark.parametrize("t_start", [0.0, 0.35])
def test_blocks_compose_as_written_out(float64, text, t_start):
    solver = random_solver(text) if Schedule.parse(text).learnt else None
    run = jax.jit(
        lambda x, solver, t: integrate(
            FLOW, x, text, t, observe=lambda state: state.x, solver=solver
        )
    )
    state, points = run(jnp.asarray(START), solver, t_start)
    np.testing.assert_allclose(points, by_hand(text, START, solver, t_start), **EXACT)
    np.testing.assert_array_equal(state.x, points[-1])


@pytest.mark.parametrize(
    ("learnt", "plain", "orders"),
    [
        ("S6", "E6", [1] * 6),
        ("S6", "A2x6", [2] * 6),
        ("S6", "A3x6", [3] * 6),
        ("H1S5", "H1A3x5", [0] + [3] * 5),
    ],
)
@pytest.mark.parametrize("grid", ["", "@0.4", "@sigmoid"])
def test_weights_of_known_methods_make_s_those_methods(learnt, plain, orders, grid):
    schedule, x = Schedule.parse(plain + grid), jnp.asarray(START, jnp.float32)
    times = 1 - schedule.left()
    solver = Solver(times, adams_bashforth(times, orders, 6))
    found = sample(FLOW, x, learnt, solver=solver)
    np.testing.assert_allclose(found, sample(FLOW, x, schedule), **ROUNDING)
    other = Solver(times, adams_bashforth(times, [order and 5 - order for order in orders], 6))
    assert np.abs(sample(FLOW, x, learnt, solver=other) - found).max() > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_points_that_p_predicts_are_adams_bashforths_of_order_two(float64, steps):
    """x_{i+1} = x_i + dt (m_i + m_{i+1}) / 2, m_i being the velocity at the predicted y_i."""
    x, dt = jnp.asarray(START), 1 / steps
    _, (points, memories) = integrate(
        FLOW, x, f"P{steps}", observe=lambda state: (state.x, state.memory)
    )
    starts = np.concatenate([START[None], points[:-1]])
    remembered = np.concatenate([velocity(x, 0.0)[None], memories[:-1]])
    predicted = starts + dt * remembered
    # An independent recurrence, from an Euler step.
    y, slopes = START, []
    for i in range(steps):
        slopes.append(np.square(y) * np.cos(2 * i * dt))
        y = y + dt * (slopes[0] if i == 0 else 1.5 * slopes[i] - 0.5 * slopes[i - 1])
        np.testing.assert_allclose(predicted[i], y, **EXACT)
    np.testing.assert_allclose(sample(FLOW, x, f"A2x{steps}"), predicted[-1], **EXACT)


class Recorder:
    """A flow that keeps the arguments of every call; to be used outside of loops."""

    def __init__(self):
        self.predicted, self.refined = [], []
        self.flow = Flow(self._predict, self._refine)

    def _predict(self, x, t):
        self.predicted.append((x, t))
        return velocity(x, t)

    def _refine(self, x, t, memory):
        self.refined.append((x, t, memory))
        return offset(x, t, memory)


@pytest.mark.parametrize("block", [blocks.multistep, blocks.refined_multistep])
def test_multistep_blocks_are_their_formula(float64, block):
    x, memory, t, t_next = jnp.asarray(START), jnp.full((2, 2), 0.4), 0.2, 0.45
    past = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2)))
    weights, recorder = jnp.asarray([-0.3, 0.1, 1.2]), Recorder()
    times = (jnp.asarray(t), jnp.asarray(t_next))
    state = block(recorder.flow, State(x, memory, past), *times, weights)
    refines = block is blocks.refined_multistep
    newest = memory + offset(x, t, memory) if refines else velocity(x, t)
    wanted = x + 0.25 * (-0.3 * past[1] + 0.1 * past[2] + 1.2 * newest)
    np.testing.assert_allclose(state.x, wanted, **EXACT)
    np.testing.assert_allclose(state.memory, newest, **EXACT)
    np.testing.assert_allclose(state.history, jnp.stack([past[1], past[2], newest]), **EXACT)
    calls, others = recorder.refined, recorder.predicted
    calls, others = (calls, others) if refines else (others, calls)
    assert (len(calls), len(others)) == (1, 0)
    np.testing.assert_array_equal(calls[0][0], x)
    assert float(calls[0][1]) == t
    if refines:
        np.testing.assert_array_equal(calls[0][2], memory)


@pytest.mark.parametrize("text", ["S2R2", "H1S1R1S1R1", "S1R1H1S1"])
def test_r_beside_s_calls_the_refiner_once_with_what_was_handed_on(text):
    calls = []

    def note(kind):
        return lambda x, t, m: calls.append((kind, float(t), np.asarray(x), np.asarray(m)))

    def predict(x, t):
        jax.debug.callback(note("predict"), x, t, x, ordered=True)
        return velocity(x, t)

    def refine(x, t, m):
        jax.debug.callback(note("refine"), x, t, m, ordered=True)
        return offset(x, t, m)

    schedule, solver = Schedule.parse(text), random_solver(text, dtype=np.float32)
    x = jnp.asarray(START, jnp.float32)
    _, (points, memories) = integrate(
        Flow(predict, refine), x, schedule, observe=lambda s: (s.x, s.memory), solver=solver
    )
    jax.block_until_ready(points)
    jax.effects_barrier()
    assert len(calls) == schedule.predictor_evaluations + schedule.refiner_evaluations
    letters = [run.block for run in schedule.runs for _ in range(run.steps)]
    refined = [call for call in calls if call[0] == "refine"]
    steps = [i for i, letter in enumerate(letters) if letter == "Rs"]
    assert len(refined) == len(steps)
    for i, (_, t, seen, memory) in zip(steps, refined, strict=True):
        assert t == pytest.approx(float(solver.times[i]), abs=1e-6)
        np.testing.assert_array_equal(seen, points[i - 1])
        np.testing.assert_array_equal(memory, memories[i - 1])


def test_each_learnt_weight_matters(float64):
    text = "H1S2R2"
    solver, x = random_solver(text), jnp.asarray(START)
    slope = jax.jit(
        jax.jacobian(lambda w: sample(FLOW, x, text, solver=solver._replace(weights=w)))
    )
    found = np.abs(np.asarray(slope(jnp.asarray(solver.weights)))).max(axis=(0, 1))
    lag = np.arange(4, -1, -1)
    learnt = (np.arange(5)[:, None] >= 1) & (lag <= np.arange(5)[:, None])
    assert (found[learnt] > 1e-3).all()
    assert (found[0] == 0).all()  # the Heun step's row does not matter


@pytest.mark.parametrize("text", ["A3x4", "S4"])
def test_memory_may_be_any_pytree_in_any_precision(text):
    def drift(m):
        return (m["halves"][0] + m["halves"][1]).astype(jnp.float32)

    def predict(x, t):
        half = (velocity(x, t) / 2).astype(jnp.bfloat16)
        return {"halves": (half, half)}

    x = jnp.asarray(START, jnp.float32)
    solver = random_solver(text, dtype=np.float32) if text.startswith("S") else None
    state, _ = integrate(Flow(predict, drift=drift), x, text, solver=solver)
    plain = sample(FLOW, x, text, solver=solver)
    np.testing.assert_allclose(state.x, plain, rtol=0, atol=0.05)  # bfloat16 has 8 bits
    assert state.x.dtype == jnp.float32
    assert state.history["halves"][0].dtype == jnp.bfloat16
    assert len(state.history["halves"][0]) == Schedule.parse(text).remembered


# Guidance.

LABELS, NULL, SCALE = np.array([[0.7], [-0.4]]), np.array([[0.1], [0.1]]), 2.5


def branch(x, t, label):
    return np.square(x) * np.cos(2 * t) + label * np.ones_like(x)


def branch_offset(x, v, t, label):
    return 0.3 * np.sin(x + t) * label - 0.2 * v


def guided_by_hand(mode, channels, interval, times, weights, letters):
    """The end of S and R steps under guidance, in NumPy."""
    x, past, memory = START, [], None

    def guide(pair):
        if mode == "paired":
            return pair
        cond, uncond = pair
        both = uncond + SCALE * (cond - uncond)
        mask = np.arange(x.shape[1]) < (x.shape[1] if channels is None else channels)
        return np.where(mask, both, cond), np.where(mask, both, uncond)

    for i, (letter, t, t_next) in enumerate(zip(letters, times[:-1], times[1:], strict=True)):
        inside = interval is None or interval[0] <= t <= interval[1]

        def recalled(pair, inside=inside):
            return pair if inside else (pair[0], pair[0])

        nulls = NULL if inside else LABELS
        if letter == "S":
            newest = guide((branch(x, t, LABELS), branch(x, t, nulls)))
        else:
            m = recalled(memory)
            offsets = [branch_offset(x, v, t, y) for v, y in zip(m, (LABELS, nulls), strict=True)]
            newest = tuple(a + b for a, b in zip(m, guide(offsets), strict=True))
        past.append(newest)
        memory = newest
        total = 0
        for w, (cond, uncond) in zip(weights[i][-(i + 1) :], map(recalled, past), strict=True):
            total += w * (uncond + SCALE * (cond - uncond) if mode == "paired" else cond)
        x = x + (t_next - t) * total
    return x


@pytest.mark.parametrize(
    ("mode", "channels"), [("paired", None), ("official", None), ("official", 1)]
)
@pytest.mark.parametrize("interval", [None, (0.3, 0.75), (0.0, 0.5)])
@pytest.mark.parametrize("text", ["S6", "A3x6", "S2R2S1R1"])
def test_guidance_is_of_each_remembered_velocity_by_the_time_of_the_step(
    float64, mode, channels, interval, text
):
    def predictor(x, t, y):
        return jnp.square(x) * jnp.cos(2 * t) + y * jnp.ones_like(x)

    def refiner(x, v, t, y):
        return 0.3 * jnp.sin(x + t) * y - 0.2 * v

    parts = (predictor, refiner, jnp.asarray(LABELS), jnp.asarray(NULL), SCALE)
    if mode == "paired":
        flow = guidance.paired(*parts, interval)
    else:
        flow = guidance.official(*parts, channels, interval)
    solver = random_solver(text) if text.startswith("S") else None
    end = jax.jit(lambda x: sample(flow, x, text, solver=solver))(jnp.asarray(START))
    schedule = Schedule.parse(text)
    times = np.linspace(0, 1, 7) if solver is None else solver.times
    weights = adams_bashforth(times, [3] * 6, 6) if solver is None else solver.weights
    letters = ["R" if run.block == "Rs" else "S" for run in schedule.runs for _ in range(run.steps)]
    wanted = guided_by_hand(mode, channels, interval, times, weights, letters)
    np.testing.assert_allclose(end, wanted, rtol=0, atol=1e-11)  # values of up to some tens


# Transformations and programs.

LEARNT = ("S4", "H1S2R1", "A3x4@learnt", "H1P2R1@learnt")


@pytest.mark.parametrize("text", LEARNT)
def test_the_solvers_numbers_can_be_mapped(text):
    x = jnp.asarray(START, jnp.float32)
    several = [random_solver(text, seed, np.float32) for seed in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *several)
    together = jax.jit(jax.vmap(lambda solver: sample(FLOW, x, text, solver=solver)))(stacked)
    one = jax.jit(lambda solver: sample(FLOW, x, text, solver=solver))
    for found, solver in zip(together, several, strict=True):
        np.testing.assert_allclose(found, one(solver), **ROUNDING)
        np.testing.assert_allclose(found, sample(FLOW, x, text, solver=solver), **ROUNDING)
    assert np.abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.parametrize("text", LEARNT)
def test_the_solvers_numbers_can_be_differentiated(float64, text):
    solver = jax.tree.map(jnp.asarray, random_solver(text))

    def end(x, solver):
        return sample(FLOW, x, text, solver=solver)

    x = jnp.asarray(START)
    # Central differences of step 1e-5 err by 1e-10 and by rounding over the step, 1e-11.
    check_grads(jax.jit(end), (x, solver), 1, ("rev",), atol=1e-7, rtol=1e-7, eps=1e-5)
    slopes = jax.jit(jax.grad(lambda solver: end(x, solver).sum()))(solver)
    assert np.abs(slopes.times[1:-1]).min() > 1e-4


def equations(text, learnt=False):
    """How many the traced program has, those of inner programs included."""

    def count(jaxpr):
        return len(jaxpr.eqns) + sum(
            count(getattr(leaf, "jaxpr", leaf))
            for eqn in jaxpr.eqns
            for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program)
            if _is_program(leaf)
        )

    x, solver = jnp.asarray(START, jnp.float32), None
    if learnt:
        solver = random_solver(text, dtype=np.float32)
    traced = jax.make_jaxpr(lambda x, solver: sample(FLOW, x, text, solver=solver))(x, solver)
    return count(traced.jaxpr)


def _is_program(leaf):
    return hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("S4", "S12"),
        ("A2x4", "A2x40"),
        ("A4x5@cosine", "A4x60@cosine"),
        ("H1S3R2", "H4S20R9"),
        ("A3x4@learnt", "A3x50@learnt"),
        ("H1P3@learnt", "H9P30@learnt"),
    ],
)
def test_program_size_does_not_depend_on_the_number_of_steps(short, long):
    learnt = Schedule.parse(short).learnt
    assert equations(short, learnt) == equations(long, learnt) > 10
    assert equations(short + "E1" if "@" not in short else "E1" + short, learnt) > equations(
        short, learnt
    )


@pytest.fixture
def compiled():
    """What is compiled while a test runs, one entry per program."""
    found = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("text", LEARNT)
def test_other_numbers_compile_nothing(compiled, text):
    run = jax.jit(lambda x, solver: sample(FLOW, x, text, solver=solver))
    x = jnp.asarray(START, jnp.float32)
    ends = []
    for seed in range(3):
        solver = random_solver(text, seed, np.float32)
        compiled.clear()
        ends.append(np.asarray(run(x, solver)))
        assert len(compiled) == (1 if seed == 0 else 0)
    assert not np.array_equal(ends[0], ends[1])


@pytest.mark.parametrize("texts", [("A2x3", "A2x40"), ("S3", "S12")])
def test_number_of_compilations_does_not_depend_on_the_steps(compiled, texts):
    x = jnp.asarray(START, jnp.float32)
    for text in texts:
        learnt = Schedule.parse(text).learnt
        solver = random_solver(text, dtype=np.float32) if learnt else None
        run = jax.jit(lambda x, solver, text=text: sample(FLOW, x, text, solver=solver))
        compiled.clear()
        run(x, solver)
        assert len(compiled) == 1


# Hooks, tries, and the way back.


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


# Numbers that do not fit.


@pytest.mark.parametrize(
    ("text", "solver", "message"),
    [
        ("S4", None, r"schedule S4 is learnt, so it needs the numbers of a solver"),
        ("H1P3@learnt", None, r"schedule H1P3@learnt is learnt, so it needs"),
        ("H1P3", Solver(np.linspace(0, 1, 5)), "H1P3 is not learnt, and has no use for"),
        ("A2x4", Solver(np.linspace(0, 1, 5)), "A2x4 is not learnt, and has no use for"),
        ("S4", random_solver("S5"), r"has \(6,\) times; schedule S4 of 4 steps needs \[5\]"),
        ("S4", Solver(np.eye(5), None), r"has \(5, 5\) times"),
        ("S4", Solver(np.linspace(0, 1, 5)), r"has no weights; schedule S4 needs \[4, 4\]"),
        ("S4", random_solver("H1A2x3@learnt"), r"has no weights; schedule S4 needs \[4, 4\]"),
        ("S4", random_solver("S4")._replace(weights=np.eye(4)[:, :2]), r"has \[4, 2\] weights"),
        ("H1P3@learnt", random_solver("S4"), r"has \[4, 4\] weights; .* needs none"),
    ],
)
def test_numbers_that_do_not_fit_the_schedule_are_refused(text, solver, message):
    with pytest.raises(InputError, match=message):
        check_solver(solver, Schedule.parse(text))
    with pytest.raises(InputError, match=message):
        sample(FLOW, jnp.asarray(START, jnp.float32), text, solver=solver)


def test_a_schedule_without_multistep_blocks_remembers_nothing():
    x = jnp.asarray(START, jnp.float32)
    for text in ("H1P2R1", "E3"):
        state, _ = integrate(FLOW, x, text)
        assert state.history is None
        assert step_weights(Schedule.parse(text)) is None
    assert [Schedule.parse(t).remembered for t in ("A2x8", "A4x2", "S5", "H1S4", "S2H3")] == [
        2,
        2,
        5,
        5,
        2,
    ]


@pytest.mark.parametrize("refine", [None, offset])
def test_r_beside_s_needs_a_refiner(refine):
    x, solver = jnp.asarray(START, jnp.float32), random_solver("S3R1", dtype=np.float32)
    if refine is None:
        with pytest.raises(InputError, match="schedule S3R1 refines, but this flow has no refiner"):
            sample(Flow(velocity), x, "S3R1", solver=solver)
    else:
        assert np.isfinite(sample(Flow(velocity, refine), x, "S3R1", solver=solver)).all()
