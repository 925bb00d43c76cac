"""The sample blocks against their formulas, one step at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import blocks
from flowturbo_jax.interfaces import Flow, State

# Formulas are checked where rounding hides nothing.
pytestmark = pytest.mark.usefixtures("float64")
EXACT = {"rtol": 0, "atol": 1e-14}  # a few roundings of float64 values near 1


def velocity(x, t):
    return jnp.square(x) * jnp.cos(t)


def offset(x, t, v):
    return jnp.sin(x) * t + 0.3 * jnp.square(v)


class Recorder:
    """A flow that keeps the arguments of every call."""

    def __init__(self, predict=velocity, refine=offset):
        self.predicted, self.refined = [], []
        self.flow = Flow(self._predict, self._refine)
        self._velocity, self._offset = predict, refine

    def _predict(self, x, t):
        self.predicted.append((x, t))
        return self._velocity(x, t)

    def _refine(self, x, t, memory):
        self.refined.append((x, t, memory))
        return self._offset(x, t, memory)


@pytest.fixture
def step():
    """x, its remembered velocity, and the two times."""
    x = jnp.asarray([[0.3, -0.7], [1.1, 0.2]])
    m = jnp.asarray([[0.5, 0.1], [-0.2, 0.9]])
    return x, m, jnp.asarray(0.2), jnp.asarray(0.45)


def test_euler_follows_the_velocity_and_hands_it_on(step):
    x, m, t, t_next = step
    recorder = Recorder()
    x1, memory, _ = blocks.euler(recorder.flow, State(x, m), t, t_next)
    v = velocity(x, t)
    np.testing.assert_allclose(x1, x + 0.25 * v, **EXACT)
    np.testing.assert_allclose(memory, v, **EXACT)
    assert (len(recorder.predicted), len(recorder.refined)) == (1, 0)


def test_heun_is_its_formula_and_hands_on_the_predicted_velocity(step):
    x, m, t, t_next = step
    recorder = Recorder()
    x1, memory, _ = blocks.heun(recorder.flow, State(x, m), t, t_next)
    d0 = velocity(x, t)
    d1 = velocity(x + 0.25 * d0, t_next)
    np.testing.assert_allclose(x1, x + 0.125 * (d0 + d1), **EXACT)
    np.testing.assert_allclose(memory, d1, **EXACT)
    assert (len(recorder.predicted), len(recorder.refined)) == (2, 0)


def test_pseudo_corrector_starts_from_the_remembered_velocity(step):
    x, m, t, t_next = step
    recorder = Recorder()
    x1, memory, _ = blocks.pseudo_corrector(recorder.flow, State(x, m), t, t_next)
    d1 = velocity(x + 0.25 * m, t_next)
    np.testing.assert_allclose(x1, x + 0.125 * (m + d1), **EXACT)
    np.testing.assert_allclose(memory, d1, **EXACT)
    assert (len(recorder.predicted), len(recorder.refined)) == (1, 0)


@pytest.mark.parametrize("chained", [False, True])
def test_refine_is_its_formula_and_hands_on_the_first_velocity(step, chained):
    x, m, t, t_next = step
    recorder = Recorder()
    x1, memory, _ = blocks.refine(recorder.flow, State(x, m), t, t_next, chained=chained)
    d0 = m + offset(x, t, m)
    d1 = d0 + offset(x + 0.25 * d0, t_next, d0 if chained else m)
    np.testing.assert_allclose(x1, x + 0.125 * (d0 + d1), **EXACT)
    np.testing.assert_allclose(memory, d0, **EXACT)
    assert (len(recorder.predicted), len(recorder.refined)) == (0, 2)


@pytest.mark.parametrize(
    ("block", "times"),
    [
        (blocks.euler, [0.2]),
        (blocks.heun, [0.2, 0.45]),
        (blocks.pseudo_corrector, [0.45]),
        (blocks.refine, [0.2, 0.45]),
    ],
)
def test_networks_are_told_the_time_of_the_point_they_see(step, block, times):
    x, m, t, t_next = step
    recorder = Recorder()
    block(recorder.flow, State(x, m), t, t_next)
    assert [float(call[1]) for call in recorder.predicted + recorder.refined] == times


@pytest.mark.parametrize(
    "block", [blocks.euler, blocks.heun, blocks.pseudo_corrector, blocks.refine]
)
def test_memory_may_be_any_pytree_that_drift_understands(step, block):
    x, m, t, t_next = step
    plain = block(Flow(velocity, offset), State(x, m), t, t_next)

    def wrap(v):
        return {"sum": 3 * v, "rest": (-v, -v)}

    def drift(memory):
        return memory["sum"] + memory["rest"][0] + memory["rest"][1]

    wrapped = Flow(
        lambda x, t: wrap(velocity(x, t)), lambda x, t, m: wrap(offset(x, t, drift(m))), drift
    )
    state = block(wrapped, State(x, wrap(m)), t, t_next)
    np.testing.assert_allclose(state.x, plain.x, **EXACT)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **EXACT), state.memory, wrap(plain.memory)
    )


def test_predicted_points_of_the_pseudo_corrector_are_adams_bashforth():
    dt, steps = 0.1, 8
    recorder = Recorder()
    state = State(jnp.asarray([[0.5]]), jnp.zeros((1, 1)))
    for i in range(steps):
        block = blocks.heun if i == 0 else blocks.pseudo_corrector
        state = block(recorder.flow, state, jnp.asarray(i * dt), jnp.asarray((i + 1) * dt))
    points = [x for x, _ in recorder.predicted[1:]]  # the first is the start of the Heun step
    slopes = [velocity(x, t) for x, t in recorder.predicted[1:]]
    assert len(points) == steps
    for i in range(steps - 2):
        expected = points[i + 1] + dt * (1.5 * slopes[i + 1] - 0.5 * slopes[i])
        np.testing.assert_allclose(points[i + 2], expected, **EXACT)


def exact_refiner(x, t, m):
    """What a perfect refiner answers: the true velocity, less the remembered one."""
    return velocity(x, t) - m


def test_exact_refiner_makes_the_chained_rule_heun(step):
    x, m, t, t_next = step
    refined = blocks.refine(Flow(velocity, exact_refiner), State(x, m), t, t_next, chained=True)
    heun = blocks.heun(Flow(velocity), State(x, m), t, t_next)
    np.testing.assert_allclose(refined.x, heun.x, **EXACT)
    np.testing.assert_allclose(refined.memory, velocity(x, t), **EXACT)


def test_exact_refiner_makes_the_official_rule_heun_plus_what_it_remembers_wrongly(step):
    x, m, t, t_next = step
    flow = Flow(velocity, exact_refiner)
    heun = blocks.heun(flow, State(x, m), t, t_next)
    refined = blocks.refine(flow, State(x, m), t, t_next)
    # The second offset is relative to m, but is added to the first velocity.
    np.testing.assert_allclose(refined.x, heun.x + 0.125 * (velocity(x, t) - m), **EXACT)
    exact = blocks.refine(flow, State(x, velocity(x, t)), t, t_next)
    np.testing.assert_allclose(exact.x, heun.x, **EXACT)
