"""The sampler: order of convergence, hooks, starts, program size, transformations, golden paths."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from traced_programs import equations

from flowturbo_jax import blocks, guidance, sampler
from flowturbo_jax.interfaces import Flow, InputError, State
from flowturbo_jax.sampler import integrate, sample
from flowturbo_jax.schedule import Schedule

START = np.asarray([[0.3, 0.5], [0.8, -0.6]])


def velocity(x, t):
    return jnp.square(x) * jnp.cos(2 * t)


def solution(x0, t, t0=0.0):
    """Where dx/dt = x^2 cos(2 t) leads from x0 at t0."""
    return 1 / (1 / x0 - (np.sin(2 * t) - np.sin(2 * t0)) / 2)


def exact_refiner(x, t, m):
    return velocity(x, t) - m


FLOW = Flow(velocity, exact_refiner)


def order(schedule, t_start=0.0):
    """Measured order of convergence of schedule(steps): the slope from 40 to 80 steps."""
    start = solution(START, t_start)

    def error(steps):
        end = jax.jit(lambda x: sample(FLOW, x, schedule(steps), t_start))(jnp.asarray(start))
        return np.abs(np.asarray(end) - solution(START, 1.0)).max()

    return np.log2(error(40) / error(80))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("E{n}", 1),
        ("H{n}", 2),
        ("P{n}", 2),
        ("H1P{rest}", 2),
        ("E1P{rest}", 2),
        ("H1Rc{rest}", 2),
        ("(H2P3Rc5)x{tenth}", 2),
        ("(H4R1)x{fifth}", 2),
        # Every R after the first adds dt^2 / 2 dv/dt: its second offset is relative to the
        # velocity remembered from a step ago, but is added to the present one.
        ("H1R{rest}", 1),
    ],
)
def test_order_of_convergence_with_an_exact_refiner(float64, schedule, expected):
    measured = order(lambda n: schedule.format(n=n, rest=n - 1, tenth=n // 10, fifth=n // 5))
    # The slope has an error of the order of the step, 1 / 40.
    assert measured == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("schedule", "expected"), [("E{n}", 1), ("H{n}", 2), ("P{n}", 2)])
def test_order_of_convergence_from_a_later_start(float64, schedule, expected):
    assert order(lambda n: schedule.format(n=n), t_start=0.25) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("text", ["E2H1P2R2Rc1", "P3R1", "(H1P1R1)x2"])
@pytest.mark.parametrize("t_start", [0.0, 0.35])
def test_sample_is_the_blocks_one_after_another(text, t_start):
    x = jnp.asarray(START, jnp.float32)
    schedule = Schedule.parse(text)
    grid = schedule.time_grid(t_start)
    state = State(x, velocity(x, grid[0]))
    for run, first, last in schedule.intervals():
        for i in range(first, last):
            state = sampler.BLOCKS[run.block](FLOW, state, grid[i], grid[i + 1])
    # The same operations, fused by XLA: a few roundings of values near 1.
    np.testing.assert_allclose(sample(FLOW, x, text, t_start), state.x, rtol=0, atol=1e-6)


def test_leading_pseudo_corrector_begins_as_heun():
    x = jnp.asarray(START, jnp.float32)
    heun = blocks.heun(FLOW, State(x, None), jnp.asarray(0.0), jnp.asarray(1.0))
    np.testing.assert_allclose(sample(FLOW, x, "P1"), heun.x, rtol=0, atol=1e-6)


def test_first_memory_is_evaluated_for_a_leading_pseudo_corrector_only():
    def predictor_calls(text):
        # Outside the loops; inside, the program calls each block's evaluations once.
        jaxpr = jax.make_jaxpr(lambda x: sample(FLOW, x, text))(jnp.asarray(START, jnp.float32))
        return sum(eqn.primitive.name == "cos" for eqn in jaxpr.jaxpr.eqns)

    assert [predictor_calls(text) for text in ("P2", "H2", "E2R1")] == [1, 0, 0]


def program_size(text, **options):
    x = jnp.asarray(START, jnp.float32)
    return len(equations(lambda x: sample(FLOW, x, text, **options), x))


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("H2", "H50"),
        ("P3", "P40"),
        ("E1", "E500"),
        ("H1P5R3", "H20P50R30"),
        ("H2Rc2", "H9Rc9"),
    ],
)
def test_program_size_does_not_depend_on_the_number_of_steps(short, long):
    assert program_size(short) == program_size(long)
    hook = {"after_step": lambda state, t: state._replace(x=state.x * t)}
    assert program_size(short, **hook) == program_size(long, **hook) > program_size(short)


def test_program_counts_every_run():
    assert program_size("H2") < program_size("H2P2") < program_size("(H2P2)x2")


@pytest.mark.parametrize("t_start", [0.0, 0.4])
def test_hook_runs_after_every_step_at_the_time_it_reached(t_start):
    times = []

    def after_step(state, t):
        jax.debug.callback(lambda t: times.append(float(t)), t, ordered=True)
        return state

    x = jnp.asarray(START, jnp.float32)
    end = sample(FLOW, x, "H1P2R1", t_start, after_step)
    jax.block_until_ready(end)
    jax.effects_barrier()
    np.testing.assert_allclose(times, np.linspace(t_start, 1, 5)[1:], rtol=0, atol=2e-7)
    np.testing.assert_array_equal(end, sample(FLOW, x, "H1P2R1", t_start))


def test_hook_can_change_x_and_memory():
    x = jnp.asarray(START, jnp.float32)
    known = jnp.asarray([[True, False], [False, True]])

    def keep_known(state, t):
        return state._replace(x=jnp.where(known, t * 7, state.x))

    end = sample(FLOW, x, "H2P2", after_step=keep_known)
    np.testing.assert_array_equal(end[known], [7.0, 7.0])
    free = sample(FLOW, x, "H2P2")
    np.testing.assert_allclose(end[~known], free[~known], rtol=0, atol=1e-6)
    forgetful = sample(
        FLOW, x, "H2P2", after_step=lambda state, t: State(state.x, 0 * state.memory)
    )
    assert golden.deviation(forgetful, free) > 1e-2


def test_observe_records_the_trajectory():
    x = jnp.asarray(START, jnp.float32)
    state, records = integrate(
        FLOW, x, "H1P2R2", observe=lambda state: {"x": state.x, "memory": state.memory}
    )
    assert records["x"].shape == records["memory"].shape == (5, 2, 2)
    np.testing.assert_array_equal(records["x"][-1], state.x)
    np.testing.assert_array_equal(records["memory"][-1], state.memory)
    np.testing.assert_array_equal(state.x, sample(FLOW, x, "H1P2R2"))
    first = blocks.heun(FLOW, State(x, None), jnp.asarray(0.0), jnp.asarray(0.2))
    np.testing.assert_allclose(records["x"][0], first.x, rtol=0, atol=1e-6)


def test_observe_sees_what_the_hook_changed():
    x = jnp.asarray(START, jnp.float32)
    _, records = integrate(
        FLOW,
        x,
        "H2P1",
        after_step=lambda state, t: state._replace(x=jnp.full_like(state.x, t)),
        observe=lambda state: state.x,
    )
    np.testing.assert_allclose(records[:, 0, 0], [1 / 3, 2 / 3, 1], rtol=0, atol=1e-7)


def test_nothing_is_recorded_unless_asked():
    _, records = integrate(FLOW, jnp.asarray(START, jnp.float32), "H1P2")
    assert records is None


@pytest.mark.parametrize(
    ("flow", "got"),
    [
        (Flow(lambda x, t: x[:, :1]), r"float32\[2, 1\] for x float32\[2, 2\]"),
        (Flow(lambda x, t: x.astype(jnp.bfloat16)), r"bfloat16\[2, 2\] for x float32\[2, 2\]"),
        (Flow(lambda x, t: jnp.stack([x, x])), r"float32\[2, 2, 2\] for x float32\[2, 2\]"),
        (Flow(lambda x, t: x, drift=lambda m: m.sum(0)), r"float32\[2\] for x float32\[2, 2\]"),
    ],
)
@pytest.mark.parametrize("text", ["H1", "P2", "E1R1"])
def test_velocity_that_does_not_fit_x_is_refused(flow, got, text):
    flow = flow._replace(refine=lambda x, t, m: m)
    with pytest.raises(InputError, match=f"velocity is {got}; both must agree"):
        sample(flow, jnp.asarray(START, jnp.float32), text)


@pytest.mark.parametrize("text", ["H1R1", "P2Rc1", "(H1R2)x2"])
def test_refining_without_a_refiner_is_refused(text):
    with pytest.raises(InputError, match="this flow has no refiner; use a schedule of E, H and P"):
        sample(Flow(velocity), jnp.asarray(START, jnp.float32), text)


@pytest.mark.parametrize(
    ("refine", "got"),
    [
        (lambda x, t, m: m[:, :1], r"float32\[2, 1\] for a memory of float32\[2, 2\]"),
        (lambda x, t, m: m.astype(jnp.bfloat16), r"bfloat16\[2, 2\] for a memory of float32"),
        (lambda x, t, m: (m, m), r"\('float32\[2, 2\]', .* for a memory of float32"),
    ],
)
def test_offset_that_does_not_fit_the_memory_is_refused(refine, got):
    with pytest.raises(InputError, match=f"the refiner's offset is {got}.*; both must agree"):
        sample(Flow(velocity, refine), jnp.asarray(START, jnp.float32), "H1R1")


@pytest.mark.parametrize("t_start", [-0.5, 1.0, float("nan")])
def test_start_off_the_path_is_refused(t_start):
    with pytest.raises(InputError, match="t_start"):
        sample(FLOW, jnp.asarray(START, jnp.float32), "H1", t_start)


def test_wrong_schedule_is_refused_before_anything_is_evaluated():
    def predict(x, t):
        raise AssertionError("the network was called")

    with pytest.raises(InputError, match="starts with R"):
        sample(Flow(predict, exact_refiner), jnp.asarray(START, jnp.float32), "R1H1")


TEXT = "H1P2R1Rc1"


def test_jit_agrees_and_traces_each_schedule_once():
    traces = []

    def predict(x, t):
        traces.append(1)
        return velocity(x, t)

    @jax.jit
    def run(x, t_start):
        return sample(Flow(predict, exact_refiner), x, TEXT, t_start)

    x = jnp.asarray(START, jnp.float32)
    first = run(x, 0.0)
    evaluations = len(traces)
    np.testing.assert_allclose(first, sample(FLOW, x, TEXT), rtol=0, atol=1e-6)
    np.testing.assert_allclose(run(x, 0.3), sample(FLOW, x, TEXT, 0.3), rtol=0, atol=1e-6)
    assert len(traces) == evaluations


def test_vmap_over_samples_agrees_with_one_by_one():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2)), jnp.float32)
    starts = jnp.asarray([0.0, 0.2, 0.5])
    together = jax.vmap(lambda x, t: sample(FLOW, x, TEXT, t))(x, starts)
    alone = [sample(FLOW, x[i], TEXT, starts[i]) for i in range(3)]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["P3", TEXT])
def test_gradient_is_that_of_finite_differences(float64, text):
    def end(x, t_start, strength):
        flow = Flow(
            lambda x, t: strength * velocity(x, t),
            lambda x, t, m: jnp.sin(strength * x + t) - 0.5 * m,
        )
        return sample(flow, jnp.asarray(x), text, jnp.asarray(t_start))

    arguments = (jnp.asarray(START), jnp.asarray(0.1), jnp.asarray(0.8))
    # Central differences of step 1e-5 err by 1e-10 and by rounding over the step, 1e-11.
    check_grads(jax.jit(end), arguments, order=1, modes=("rev",), atol=1e-7, rtol=1e-7, eps=1e-5)
    gradient = jax.jit(jax.grad(lambda *arguments: end(*arguments).sum()))(*arguments)
    assert np.abs(gradient).min() > 0.1


def test_result_has_the_shape_and_dtype_of_the_noise(float64):
    for dtype in (jnp.float32, jnp.float64):
        noise = jnp.full((2, 3, 1, 4), 0.5, dtype)
        end = jax.jit(lambda noise: sample(FLOW, noise, "H2P2R1"))(noise)
        assert (end.shape, end.dtype) == (noise.shape, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_noise_of_low_precision_is_refused(dtype):
    with pytest.raises(InputError, match=f"noise is {dtype.__name__}; x is kept in float32"):
        sample(FLOW, jnp.ones((2, 3), dtype), "H1")


@pytest.mark.parametrize("text", ["H1P2R1", "H2P1R3"])
def test_trajectory_and_handed_velocities_match_the_official_sampler(text):
    @jax.jit
    def run(params, refiner_params, z, y, scale):
        networks = golden.predictor(params), golden.refiner(refiner_params)
        flow = guidance.official(*networks, y[:2], y[2:], scale, guided_channels=3)
        return integrate(flow, z, text, observe=tuple)

    schedule = Schedule.parse(text)
    params = golden.params("sit/sit", golden.SIT)
    refiner_params = golden.params("refiner/refiner", golden.REFINER)
    for scale in ("1.5", "4.0"):
        stored = golden.arrays(f"sampling/{text}_cfg{scale}")
        np.testing.assert_allclose(schedule.time_grid(), stored["t_grid"], rtol=0, atol=1.2e-7)
        state, (x, memory, _) = run(params, refiner_params, stored["z"], stored["y"], float(scale))
        assert golden.deviation(x, stored["x_traj"][1:, :2]) < golden.SAMPLES
        handed = memory.reshape(stored["v_handed"].shape)
        assert golden.deviation(handed, stored["v_handed"]) < golden.SAMPLES
        np.testing.assert_array_equal(state.memory.reshape(handed[0].shape), handed[-1])
        assert golden.deviation(handed[-1], stored["v_final"]) < golden.SAMPLES


@pytest.mark.parametrize("schedules", [("H2", "H40"), ("P3", "P30"), ("H1P2", "H9P20")])
def test_number_of_compilations_does_not_depend_on_the_steps(schedules):
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    flow = Flow(lambda x, t: -x * (1 + t))
    noise = jnp.ones((2, 3))
    programs = [jax.jit(lambda x, text=text: sample(flow, x, text)) for text in schedules]
    jax.monitoring.register_event_duration_secs_listener(listen)
    counts = []
    for program in programs:
        compiled.clear()
        program(noise)
        counts.append(len(compiled))
    assert counts == [1, 1]
