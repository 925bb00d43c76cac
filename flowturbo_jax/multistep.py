"""Multistep weights: how far a step goes along each velocity that is remembered, as data.

x_{i+1} = x_i + (t_{i+1} - t_i) sum_j w_ij v_j, where v_j is the velocity that step j started from,
j <= i, and sum_j w_ij = 1. Adams-Bashforth's weights follow from the time grid alone; those of a
learnt solver, and its grid, are numbers that were searched for a model. Both are arguments of a
compiled program, so other numbers compile nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import InputError

# Gauss-Legendre's two points on [0, 1], of equal weight: exact for the cubics of order 4.
HIGHEST = 4  # order
SUM_TOLERANCE = 1e-5  # float32's, of a few weights
POINTS = (0.5 - np.sqrt(3) / 6, 0.5 + np.sqrt(3) / 6)


class Solver(NamedTuple):
    """The numbers of a learnt schedule.

    Attributes:
      times: its time grid `[N + 1]` float, from 0 (noise) to 1 (data), rising.
      weights: `[N, K]` float, of step i on the K newest velocities, the newest last; 0 where there
        are fewer. Rows of steps that are not learnt do not matter. None where no step is.
    """

    times: Float[Array, " times"]
    weights: Float[Array, "steps remembered"] | None = None


def adams_bashforth(times: Any, orders: Sequence[int], remembered: int) -> Any:
    """Weights of Adams-Bashforth's methods on any time grid, `[N, K]`.

    Row i integrates, from t_i to t_{i+1}, the polynomial through the velocities at the newest
    times. The first steps have fewer of those, and are of so much lower order.

    Args:
      times: the grid `[N + 1]`, rising or falling; NumPy's array gives one, JAX's may be traced.
      orders: of each step, 1 to 4; 0 for a row of zeros.
      remembered: K, at least the highest order.

    Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", III.5 (variable
      step sizes).
    """
    xp = np if isinstance(times, np.ndarray) else jnp
    steps, columns = len(orders), min(remembered, HIGHEST)
    newest, lag = np.arange(steps)[:, None], np.arange(columns - 1, -1, -1)[None]
    used = lag < np.minimum(np.asarray(orders)[:, None], newest + 1)  # [N, K], the newest last
    nodes = times[np.maximum(newest - lag, 0)]
    begin, length = times[:-1], times[1:] - times[:-1]
    points = begin[:, None] + length[:, None] * np.asarray([POINTS], times.dtype)  # [N, 2]
    # [N, point, node j, other node m]: Lagrange's factors, 1 where m is j or one is not used.
    others = used[:, None, :, None] & used[:, None, None, :] & ~np.eye(columns, dtype=bool)
    apart = nodes[:, None, :, None] - nodes[:, None, None, :]
    factors = (points[:, :, None, None] - nodes[:, None, None, :]) / xp.where(others, apart, 1)
    lagrange = xp.where(others, factors, 1).prod(axis=-1)
    found = xp.where(used, lagrange.mean(axis=1), 0)
    return xp.pad(found, ((0, 0), (remembered - columns, 0)))


def step_weights(schedule: Any, solver: Solver | None = None, backwards: bool = False) -> Any:
    """The weights of each step's remembered velocities, `[N, K]`; None where no step has any.

    Args:
      schedule: a `Schedule`.
      solver: the numbers of a learnt schedule; they may be traced.
      backwards: for the way from data to noise, of a schedule that is not learnt.
    """
    if not schedule.remembered:
        return None
    times = 1 - schedule.left() if solver is None else solver.times
    times = times[::-1] if backwards else times
    found = adams_bashforth(times, schedule.orders, schedule.remembered)
    if solver is None or solver.weights is None:
        return found
    xp = np if isinstance(found, np.ndarray) and isinstance(solver.weights, np.ndarray) else jnp
    return xp.where(np.asarray(schedule.learnt_rows)[:, None], solver.weights, found)


def check_solver(solver: Solver | None, schedule: Any) -> None:
    """Refuses numbers that do not fit a schedule; of those that are traced only their shapes.

    Args:
      solver: the numbers, or None.
      schedule: a `Schedule`.

    Raises:
      InputError: a learnt schedule has none, another one has some, the shapes are others, times do
        not rise from 0 to 1, or weights do not sum to 1 or are of velocities that there are not.
    """
    if not schedule.learnt:
        if solver is not None:
            raise InputError(
                f"schedule {schedule} is not learnt, and has no use for a solver's numbers; leave "
                "them out, or take a schedule such as S5 or H1P3@learnt"
            )
        return
    if solver is None:
        raise InputError(
            f"schedule {schedule} is learnt, so it needs the numbers of a solver: "
            "sample(..., solver=Solver(times, weights))"
        )
    if not isinstance(solver, Solver):
        raise InputError(
            f"the solver is a {type(solver).__name__}; give a Solver, which a LearntSolver has by "
            ".at(guidance_scale)"
        )
    times, weights = solver
    if np.shape(times) != (schedule.steps + 1,):
        raise InputError(
            f"the solver has {np.shape(times)} times; schedule {schedule} of {schedule.steps} "
            f"steps needs [{schedule.steps + 1}]"
        )
    wanted = (schedule.steps, schedule.remembered) if schedule.learns_weights else None
    if (None if weights is None else np.shape(weights)) != wanted:
        shape = "no" if weights is None else list(np.shape(weights))
        needed = "none" if wanted is None else list(wanted)
        raise InputError(f"the solver has {shape} weights; schedule {schedule} needs {needed}")
    _check_values(solver, schedule)


def _check_values(solver: Solver, schedule: Any) -> None:
    """Refuses values that are known and make no method."""
    if not isinstance(solver.times, jax.core.Tracer):
        times = np.asarray(solver.times)
        if (times[0], times[-1]) != (0, 1) or not (np.diff(times) > 0).all():
            raise InputError(f"the solver's times are {times}; they must rise from 0 to 1")
    if solver.weights is None or isinstance(solver.weights, jax.core.Tracer):
        return
    weights, learnt = np.asarray(solver.weights), np.asarray(schedule.learnt_rows)
    lag = np.arange(schedule.remembered - 1, -1, -1)
    missing = lag > np.arange(schedule.steps)[:, None]
    off = np.abs(weights.sum(axis=1) - 1) > SUM_TOLERANCE * np.abs(weights).sum(axis=1).clip(1)
    wrong = learnt & (off | (missing & (weights != 0)).any(axis=1))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"the solver's weights of step {row + 1} are {weights[row]}; they must sum to 1, the "
            f"newest of {min(row + 1, schedule.remembered)} last and zeros before them"
        )
