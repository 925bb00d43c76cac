"""What A and S steps compute, against formulas by hand; what they remember and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multistep_by_hand import EXACT, FLOW, ROUNDING, by_hand, offset, random_solver
from test_blocks import Recorder
from test_sampler import START, velocity

from flowturbo_jax import blocks
from flowturbo_jax.interfaces import Flow, InputError, State
from flowturbo_jax.multistep import Solver, adams_bashforth, check_solver, step_weights
from flowturbo_jax.sampler import integrate, sample
from flowturbo_jax.schedule import Schedule

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


@pytest.mark.parametrize("block", [blocks.multistep, blocks.refined_multistep])
def test_multistep_blocks_are_their_formula(float64, block):
    x, memory, t, t_next = jnp.asarray(START), jnp.full((2, 2), 0.4), 0.2, 0.45
    past = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2)))
    weights, recorder = jnp.asarray([-0.3, 0.1, 1.2]), Recorder(velocity, offset)
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
