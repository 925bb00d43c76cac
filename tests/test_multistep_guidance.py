"""Guidance of multistep steps, against formulas by hand: each remembered velocity is guided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multistep_by_hand import random_solver
from test_sampler import START

from flowturbo_jax import guidance
from flowturbo_jax.multistep import adams_bashforth
from flowturbo_jax.sampler import sample
from flowturbo_jax.schedule import Schedule

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
