"""Multistep methods written out in NumPy, and the flow and the numbers that their tests share."""

import jax.numpy as jnp
import numpy as np
from test_sampler import velocity

from flowturbo_jax.interfaces import Flow
from flowturbo_jax.multistep import Solver
from flowturbo_jax.schedule import Schedule

EXACT = {"rtol": 0, "atol": 1e-13}  # some roundings of float64 values of about 1
ROUNDING = {"rtol": 0, "atol": 2e-6}  # some roundings of float32 values of about 1


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
