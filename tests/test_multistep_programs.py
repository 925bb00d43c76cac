"""Programs of multistep methods: transformed, no larger for more steps, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from multistep_by_hand import FLOW, ROUNDING, random_solver
from test_sampler import START
from traced_programs import equations

from flowturbo_jax.sampler import sample
from flowturbo_jax.schedule import Schedule

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


def numbers_of(text):
    """Numbers of a learnt schedule, None of another."""
    return random_solver(text, dtype=np.float32) if Schedule.parse(text).learnt else None


def program_size(text):
    def run(x, solver):
        return sample(FLOW, x, text, solver=solver)

    return len(equations(run, jnp.asarray(START, jnp.float32), numbers_of(text)))


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
    assert program_size(short) == program_size(long) > 10
    longer = short + "E1" if "@" not in short else "E1" + short
    assert program_size(longer) > program_size(short)


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
        solver = numbers_of(text)
        run = jax.jit(lambda x, solver, text=text: sample(FLOW, x, text, solver=solver))
        compiled.clear()
        run(x, solver)
        assert len(compiled) == 1
