"""The search for schedules, on exact flows where the answer is known; what it keeps and resumes."""

import json

import numpy as np
import pytest
import tiny
from test_mixture import CONFIG, PARAMS, description

import flowturbo_jax as ft
from flowturbo_jax import model_directory
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import fine_solution, tuning
from flowturbo_jax.pipelines.candidates import Space
from flowturbo_jax.pipelines.tuning import Tuner

SMALL = {"noises": 32, "batch_size": 16, "latency_batch": 2}


def evaluations(plan) -> float:
    """A cost that does not depend on the machine."""
    return plan.schedule.predictor_evaluations + 0.1 * plan.schedule.refiner_evaluations


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A model whose velocity is exact, without a refiner."""
    directory = tmp_path_factory.mktemp("mixture") / "m"
    model_directory.save(directory, description(CONFIG), PARAMS, None)
    return ft.ClassToImage.load(directory)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    return tmp_path_factory.mktemp("solved")


@pytest.fixture
def tuner(mixture, solved):
    return Tuner(mixture, mixture, solved, cost=evaluations, **SMALL)


def test_on_an_exact_flow_the_known_ordering_is_found(tuner, mixture):
    errors = {
        text: tuner.error(mixture.plan(text), 32)
        for text in ("E8", "H4", "H1P6", "H8", "H1P14", "H16")
    }
    # Of equal evaluations P is better than Heun, and Heun than Euler; more steps are better.
    assert errors["H1P6"] < errors["H4"] < errors["E8"]
    assert errors["H1P14"] < errors["H8"]
    assert errors["H16"] < errors["H8"] < errors["H4"]
    # Second order: half the step, about a quarter of the error.
    assert 2.5 < errors["H8"] / errors["H16"] < 6


def test_the_front_of_an_exact_flow_is_pseudo_correctors(tuner, mixture):
    space = tuning.space_for(
        mixture, Space(max_evaluations=8, shifts=(), intervals=(), modes=("paired",), orders=False)
    )
    front = tuner.search(space, mixture.plan("H4"))
    costs = [one.cost for one in front]
    assert costs == sorted(costs)
    assert [one.error for one in front] == sorted((one.error for one in front), reverse=True)
    runs = {one.plan.schedule.runs for one in front if one.plan.schedule.steps > 3}
    assert all(found[0].steps == 1 and found[1].block == "P" for found in runs)


def test_a_better_grid_is_found_where_there_is_one(tmp_path):
    # Narrow Gaussians: the velocity changes most where they are resolved, at the data.
    narrow = {**PARAMS, "eigenvalues": 0.02 * PARAMS["eigenvalues"]}
    model_directory.save(tmp_path / "m", description(CONFIG), narrow, None)
    pipe = ft.ClassToImage.load(tmp_path / "m")
    space = Space(max_evaluations=6, modes=("paired",), intervals=(), orders=False)
    tuner = Tuner(pipe, pipe, tmp_path, cost=evaluations, **{**SMALL, "noises": 128})
    best = tuner.search(tuning.space_for(pipe, space), pipe.plan("H3"))[-1]
    uniform = min(tuner.error(pipe.plan(text), best.noises) for text in ("H3", "H2P2", "H1P4"))
    assert best.plan.schedule.shift < 1
    assert best.error < 0.9 * uniform


def test_the_fine_solution_is_the_limit_of_ever_more_heun_steps(tuner, mixture):
    assert tuner.error(mixture.plan("H256"), 32) < 2e-4


def test_the_fine_solution_does_not_depend_on_the_batch(mixture, tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((6, 2, 2, 1)).astype(np.float32)
    labels, plan = np.asarray([0, 1, 0, 1, 0, 1], np.int32), mixture.plan("H1")
    whole = fine_solution.fine_solution(mixture, noise, labels, plan, tmp_path / "a", 6)
    parts = fine_solution.fine_solution(mixture, noise, labels, plan, tmp_path / "b", 4)
    np.testing.assert_allclose(whole, parts, atol=1e-3)  # ten times the sum of the steps' tolerance


def test_a_fine_solution_is_read_again_unless_it_is_damaged(mixture, tmp_path, monkeypatch):
    noise = np.ones((2, 2, 2, 1), np.float32)
    arguments = (mixture, noise, np.zeros(2, np.int32), mixture.plan("H1"), tmp_path)
    first = fine_solution.fine_solution(*arguments)
    (file,) = tmp_path.glob("*.npz")
    solve = fine_solution._solved
    monkeypatch.setattr(fine_solution, "_solved", lambda *_: pytest.fail("it was solved again"))
    np.testing.assert_array_equal(fine_solution.fine_solution(*arguments), first)
    monkeypatch.setattr(fine_solution, "_solved", solve)
    file.write_bytes(file.read_bytes()[:40])
    np.testing.assert_array_equal(fine_solution.fine_solution(*arguments), first)
    other = (*arguments[:3], mixture.plan("H1", 3.0), tmp_path)
    assert np.abs(fine_solution.fine_solution(*other) - first).max() > 1e-3


def test_a_velocity_that_is_not_finite_is_refused(mixture, tmp_path):
    noise = np.full((2, 2, 2, 1), np.nan, np.float32)
    labels = np.zeros(2, np.int32)
    with pytest.raises(InputError, match="the fine solution failed"):
        fine_solution.fine_solution(mixture, noise, labels, mixture.plan("H1"), tmp_path)


def test_what_was_screened_is_not_screened_again(mixture, solved, monkeypatch):
    plans = [mixture.plan(text) for text in ("H1", "H2P2")]
    first = Tuner(mixture, mixture, solved, cost=evaluations, **SMALL).screen(plans, 16, "x")
    monkeypatch.setattr(Tuner, "error", lambda *_: pytest.fail("it was measured again"))
    assert (
        Tuner(mixture, mixture, solved, cost=evaluations, **SMALL).screen(plans, 16, "x") == first
    )


def test_an_interrupted_search_goes_on_and_finds_the_same(mixture, tmp_path):
    space = Space(max_evaluations=5, modes=("paired",), intervals=(), orders=False)
    space, baseline = tuning.space_for(mixture, space), mixture.plan("H4")
    whole = Tuner(mixture, mixture, tmp_path / "a", cost=evaluations, **SMALL)
    calls = []

    def interrupt(what, done, total):
        calls.append(what)
        if len(calls) == 30:
            raise KeyboardInterrupt

    cut = Tuner(mixture, mixture, tmp_path / "b", cost=evaluations, on_progress=interrupt, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        cut.search(space, baseline)
    known = json.loads((tmp_path / "b" / "screened.json").read_text())["results"]
    assert len(known) >= 20
    again = Tuner(mixture, mixture, tmp_path / "b", cost=evaluations, **SMALL)
    assert again.search(space, baseline) == whole.search(space, baseline)


def test_numbers_of_another_model_or_seed_are_not_used(mixture, tmp_path):
    plan = mixture.plan("H2")
    first = Tuner(mixture, mixture, tmp_path, cost=evaluations, **SMALL).screen([plan], 16, "")
    other = Tuner(mixture, mixture, tmp_path, cost=evaluations, seed=1, **SMALL)
    assert other.screen([plan], 16, "")[0].error != first[0].error


def test_a_finalist_is_timed_compiled(tuner, mixture):
    found = tuner.finalist(mixture.plan("H1P2"), repeats=2)
    assert found.ms_per_image > 0
    assert found.error == found.badness == tuner.error(mixture.plan("H1P2"), 32)


def test_a_space_is_cut_to_what_the_model_can_do(mixture, tmp_path):
    space = tuning.space_for(mixture, Space())
    assert space.max_refiner_steps == 0
    assert space.modes == ("paired", "official")
    unguided = ft.ClassToImage.load(tiny.save_model(tmp_path / "m", null_class=False))
    assert tuning.space_for(unguided, Space()).modes == ("none",)


def test_few_noises_are_refused(mixture, tmp_path):
    with pytest.raises(InputError, match="at least 8 noises"):
        Tuner(mixture, mixture, tmp_path, noises=4)


def test_relative_distance_is_the_mean_over_samples():
    exact = np.asarray([[3.0, 4.0], [0.0, 2.0]])
    assert tuning.relative_distance(exact * 1.1, exact) == pytest.approx(0.1)
    apart = exact + np.asarray([[5, 0], [0, 0]])
    assert tuning.relative_distance(apart, exact) == pytest.approx(0.5)
