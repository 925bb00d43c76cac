"""Guidance on part of the time: where it acts, what it costs, and what it leaves alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import guidance
from flowturbo_jax.interfaces import Flow, InputError
from flowturbo_jax.sampler import sample

MODES = {"paired": guidance.paired, "official": guidance.official}
LABELS, NULL = jnp.asarray([1.0, 2.0]), jnp.asarray([0.0, 0.0])
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32)


def predictor(x, t, condition):
    return jnp.sin(x + t) * (1 + condition[:, None])


def refiner(x, v, t, condition):
    return 0.1 * jnp.cos(v + t) * (1 + condition[:, None]) + 0.01 * x


def run(mode, schedule, scale, interval):
    flow = MODES[mode](predictor, refiner, LABELS, NULL, scale, interval=interval)
    return np.asarray(jax.jit(partial(sample, flow, schedule=schedule))(NOISE))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", ["H3", "E4", "H1P3", "H1P2R2", "H1P1Rc2P1R1"])
def test_the_whole_interval_is_guidance_and_none_of_it_is_no_guidance(mode, schedule):
    whole = run(mode, schedule, 3.0, (0.0, 1.0))
    np.testing.assert_allclose(whole, run(mode, schedule, 3.0, None), atol=1e-5)
    elsewhere = run(mode, schedule, 3.0, (0.98, 0.99))  # between two points of the grid
    np.testing.assert_allclose(elsewhere, run(mode, schedule, 1.0, None), atol=1e-5)
    assert np.abs(whole - elsewhere).max() > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_predictor_steps_follow_the_velocity_that_is_guided_inside_only(mode, interval):
    low, high = interval

    def velocity(x, t):
        cond, uncond = predictor(x, t, LABELS), predictor(x, t, NULL)
        inside = (t >= low) & (t <= high)
        return jnp.where(inside, uncond + 3.0 * (cond - uncond), cond)

    for schedule in ("E8", "H4", "H1P7"):
        plain = np.asarray(sample(Flow(velocity), NOISE, schedule))
        np.testing.assert_allclose(run(mode, schedule, 3.0, interval), plain, atol=1e-5)


@pytest.mark.parametrize(("end", "ends_inside"), [(0.5, False), (0.8, False), (1.0, True)])
@pytest.mark.parametrize("chained", [False, True])
def test_refiner_steps_guide_at_the_times_that_are_inside(end, ends_inside, chained):
    dt, scale = 0.25, 3.0

    def moves(cond, uncond, inside):
        return uncond + scale * (cond - uncond) if inside else cond

    flow = guidance.paired(predictor, refiner, LABELS, NULL, scale, interval=(0.0, end))
    x = NOISE
    for i in range(3):
        cond, uncond = predictor(x, i * dt, LABELS), predictor(x, i * dt, NULL)
        x = x + dt * moves(cond, uncond, True)
    # The R step from 3/4 to 1: its first velocity is inside for ends from 3/4 on, its second for 1.
    starts_inside = end >= 0.75
    if not starts_inside:
        uncond = cond  # what is remembered counts as unguided from there on
    cond0 = cond + refiner(x, cond, 0.75, LABELS)
    uncond0 = uncond + refiner(x, uncond, 0.75, NULL) if starts_inside else cond0
    d0 = moves(cond0, uncond0, starts_inside)
    seen, seen_uncond = (cond0, uncond0) if chained else (cond, uncond)
    cond1 = cond0 + refiner(x + dt * d0, seen, 1.0, LABELS)
    uncond1 = uncond0 + refiner(x + dt * d0, seen_uncond, 1.0, NULL)
    d1 = moves(cond1, uncond1, ends_inside)
    got = sample(flow, NOISE, "E3Rc1" if chained else "E3R1")
    np.testing.assert_allclose(got, x + dt / 2 * (d0 + d1), atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_outside_the_interval_the_unconditional_branch_is_not_evaluated(mode):
    rows = []

    def counting(x, t, condition):
        jax.debug.callback(lambda: rows.append(len(x)), ordered=True)
        return predictor(x, t, condition)

    flow = MODES[mode](counting, None, LABELS, NULL, 3.0, interval=jnp.asarray([0.5, 1.0]))
    jax.block_until_ready(jax.jit(partial(sample, flow, schedule="E4"))(NOISE))
    jax.effects_barrier()
    assert rows == [2, 2, 4, 4]


@pytest.mark.parametrize("mode", MODES)
def test_another_interval_does_not_trace_again(mode):
    traced = []

    @jax.jit
    def go(noise, interval):
        traced.append(1)
        flow = MODES[mode](predictor, refiner, LABELS, NULL, 3.0, interval=interval)
        return sample(flow, noise, "H1P2R1")

    results = [go(NOISE, jnp.asarray(ends)) for ends in ((0.0, 0.5), (0.5, 1.0))]
    assert len(traced) == 1
    assert np.abs(results[0] - results[1]).max() > 1e-3


def test_gradients_and_vmap_go_through_an_interval():
    def total(noise, interval):
        flow = guidance.paired(predictor, refiner, LABELS, NULL, 3.0, interval=interval)
        return sample(flow, noise, "H1P1R1").sum()

    ends = jnp.asarray([[0.0, 0.4], [0.3, 1.0]])
    both = jax.vmap(lambda interval: jax.grad(total)(NOISE, interval))(ends)
    for i in range(2):
        np.testing.assert_allclose(both[i], jax.grad(total)(NOISE, ends[i]), atol=1e-5)


def test_a_grid_point_at_an_end_of_the_interval_is_inside():
    for steps in (3, 7, 10, 13):
        for i in range(1, steps):
            grid = jnp.float32(1) - jnp.float32(steps - i) / steps
            flow = guidance.paired(predictor, None, LABELS, NULL, 3.0, interval=(0.0, i / steps))
            cond, uncond = flow.predict(NOISE, grid)
            assert (cond != uncond).any(), (i, steps)


@pytest.mark.parametrize(
    "interval",
    [
        (0.5,),
        0.5,
        "ab",
        "0.5",
        "0.1:x",
        (0.5, 0.5),
        (0.6, 0.4),
        (-0.1, 1),
        (0, 1.1),
        (0, float("nan")),
    ],
)
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(InputError, match="guidance_interval is"):
        guidance.check_interval(interval)


def test_all_of_the_time_is_no_interval():
    assert guidance.check_interval((0, 1)) is None
    assert guidance.check_interval([0.1, 0.8]) == (0.1, 0.8)
    assert guidance.check_interval("0.1:0.8") == (0.1, 0.8)
