"""A learnt solver: what its text says, what tells two apart, and its numbers at any scale."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learnt_solvers import TEXTS, numbers_of, solver_of
from multistep_by_hand import random_solver

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver, Numbers
from flowturbo_jax.schedule import Schedule


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_has_what_was_learnt_to_seven_digits(text):
    schedule, learnt = Schedule.parse(text), random_solver(text, 5, np.float32)
    found = solver_of(text)
    numbers = Numbers.of_arrays(schedule, 2, learnt, {})
    found = LearntSolver.from_json(dataclasses.replace(found, numbers=(numbers,)).to_json()).at(2.0)
    np.testing.assert_allclose(found.times, learnt.times, rtol=0, atol=1.5e-7)
    assert (found.times[0], found.times[-1], found.times.dtype) == (0, 1, np.float32)
    if not schedule.learns_weights:
        assert found.weights is None
        return
    rows = np.asarray(schedule.learnt_rows)
    np.testing.assert_allclose(found.weights[rows], learnt.weights[rows], rtol=2e-7, atol=1e-6)
    assert not found.weights[~rows].any()


def test_a_person_can_read_it():
    text = solver_of("H1S2", (1.5, 4.0)).to_json()
    fields = json.loads(text)
    assert list(fields)[:3] == ["format", "schedule", "guidance"]
    first = fields["numbers"][0]
    assert (first["guidance_scale"], first["times"][0], first["times"][-1]) == (1.5, 0, 1)
    assert [row and len(row) for row in first["weights"]] == [None, 2, 3]
    for row in [first["times"], *first["weights"], *fields["numbers"][1]["weights"]]:
        assert sum(json.dumps(row) in line for line in text.splitlines()) >= 1  # each on one line
    assert max(map(len, text.splitlines())) < 100
    assert re.search(r"\d\.\d{9}", text) is None  # no digits that say nothing


def test_what_people_read_does_not_change_the_solver():
    solver = solver_of()
    other = dataclasses.replace(solver, card={"seed": 4})
    assert (other, other.sha256) == (solver, solver.sha256)
    (numbers,) = solver.numbers
    times = (*numbers.times[:1], numbers.times[1] + 1e-6, *numbers.times[2:])
    changed = solver.with_numbers(dataclasses.replace(numbers, times=times))
    assert changed.sha256 != solver.sha256
    assert changed.scales == solver.scales
    assert solver.with_numbers(numbers_of("S3", 0.5)).scales == (0.5, 1.5)
    for field in ({"guidance": "official"}, {"predictor_sha256": "c"}):
        assert dataclasses.replace(solver, **field).sha256 != solver.sha256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": Schedule.parse("H1P3")}, "schedule H1P3 is not learnt"),
        ({"guidance": "none", "guidance_interval": (0.1, 0.5)}, "'none' has no guidance_interval"),
        ({"numbers": ()}, "one or more are needed"),
        ({"numbers": (numbers_of("S4"),)}, "schedule S3 needs 4 and 3"),
        ({"numbers": (numbers_of("H1P2@learnt"),)}, "step 1 of S3 needs 1 weights, not None"),
    ],
)
def test_a_solver_is_checked_when_it_is_made(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(solver_of("S3"), **fields)


@pytest.mark.parametrize("text", ["S4", "H1S2R1", "H1P3@learnt"])
def test_numbers_are_linear_between_the_scales_and_constant_beyond(text):
    solver = solver_of(text, (1.0, 2.0, 4.0))
    ends = [solver.at(scale) for scale in (1.0, 2.0, 4.0)]
    schedule = solver.schedule

    def mixed(a, b, share):
        return jax.tree.map(lambda x, y: (1 - share) * x + share * y, a, b)

    wanted = {
        0.0: ends[0],
        1.5: mixed(ends[0], ends[1], 0.5),
        2.0: ends[1],
        3.5: mixed(ends[1], ends[2], 0.75),
        100.0: ends[2],
    }
    learnt = np.asarray(schedule.learnt_rows)
    for scale, numbers in wanted.items():
        found = solver.at(scale)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-7), found, numbers
        )
        assert (found.times[0], found.times[-1]) == (0, 1)
        assert (np.diff(found.times) > 0).all()
        if schedule.learns_weights:
            np.testing.assert_allclose(found.weights[learnt].sum(axis=1), 1, rtol=0, atol=1e-6)
            assert found.weights.shape == (schedule.steps, schedule.remembered)
        traced = jax.jit(solver.at)(jnp.float32(scale))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-7), traced, found
        )
        assert {leaf.dtype for leaf in jax.tree.leaves((found, traced))} == {np.dtype(np.float32)}
        assert isinstance(found.times, np.ndarray)
    assert np.abs(ends[0].times - ends[1].times).max() > 1e-3


def test_a_traced_scale_is_differentiable_between_scales():
    solver = solver_of("S3", (1.0, 2.0))
    slope = jax.jacobian(lambda scale: solver.at(scale).weights)(jnp.float32(1.25))
    np.testing.assert_allclose(
        slope, solver.at(2.0).weights - solver.at(1.0).weights, rtol=0, atol=1e-6
    )
