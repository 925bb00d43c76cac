"""The search for schedules, on exact flows where the answer is known; what it keeps and resumes."""

import dataclasses
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
        mixture,
        Space(
            max_evaluations=8,
            shifts=(),
            intervals=(),
            modes=("paired",),
            orders=False,
            spacings=(),
            adams=(),
        ),
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
    (file,) = (tmp_path / "b").glob("measured-*.json")
    known = json.loads(file.read_text())["results"]
    assert len(known) >= 20
    again = Tuner(mixture, mixture, tmp_path / "b", cost=evaluations, **SMALL)
    assert again.search(space, baseline) == whole.search(space, baseline)


def test_numbers_of_another_model_or_seed_are_not_used(mixture, tmp_path):
    plan = mixture.plan("H2")
    first = Tuner(mixture, mixture, tmp_path, cost=evaluations, **SMALL).screen([plan], 16, "")
    other = Tuner(mixture, mixture, tmp_path, cost=evaluations, seed=1, **SMALL)
    assert other.screen([plan], 16, "")[0].error != first[0].error


def test_finalists_are_timed_compiled_and_without_their_compilation(tuner, mixture, monkeypatch):
    plans = [mixture.plan("H1P3"), mixture.plan("H2P2")]
    seconds = iter([100.0, 100.0, 3.0, 5.0, 1.0, 50.0, 2.0, 4.0])  # the first of each compiles
    monkeypatch.setattr(Tuner, "_call", lambda self, plan: next(seconds))
    found = tuner.finalists(plans, repeats=3)
    assert [one.ms_per_image for one in found] == [1e3, 2.5e3]  # medians, of two images
    assert [one.error for one in found] == [tuner.error(plan, 32) for plan in plans]
    # And they stay as they are, so that a second command recommends the same.
    assert tuner.finalists(plans, repeats=3) == found


def test_a_call_of_the_compiled_sampler_takes_time(tuner, mixture):
    assert 0 < tuner._call(mixture.plan("H1")) < 60


def changed(pipe, **fields):
    """The pipe of a model with other networks or another description."""
    return ft.ClassToImage(dataclasses.replace(pipe.model, **fields))


def test_numbers_of_another_model_are_not_used(mixture, tmp_path, monkeypatch):
    plan = mixture.plan("H1P2")
    Tuner(mixture, mixture, tmp_path, cost=evaluations, **SMALL).screen([plan], 16, "")
    moved = {**mixture.model.predictor_params, "means": mixture.model.predictor_params["means"] + 1}
    others = {
        "parameters": changed(mixture, predictor_params=moved),
        "guided channels": changed(
            mixture, description=dataclasses.replace(mixture.model.description, guided_channels=1)
        ),
    }
    measured = []
    monkeypatch.setattr(Tuner, "error", lambda self, *_: measured.append(1) or 0.5)
    for name, pipe in others.items():
        Tuner(pipe, pipe, tmp_path, cost=evaluations, **SMALL).screen([plan], 16, "")
        assert measured.pop(), name
    for fields in ({"seed": 1}, {"latency_batch": 3}):
        other = Tuner(mixture, mixture, tmp_path, cost=evaluations, **{**SMALL, **fields})
        other.screen([plan], 16, "")
        assert measured.pop(), fields
    Tuner(mixture, mixture, tmp_path, cost=evaluations, **SMALL).screen([plan], 16, "")
    assert not measured


def test_numbers_of_another_dtype_are_not_used(tmp_path, monkeypatch):
    directory = tiny.save_model(tmp_path / "m")
    measured = []
    monkeypatch.setattr(Tuner, "error", lambda self, *_: measured.append(1) or 0.5)
    for dtype in ("float32", "bfloat16", "float32"):
        pipe = ft.ClassToImage.load(directory, dtype)
        Tuner(pipe, pipe, tmp_path, cost=evaluations, **SMALL).screen([pipe.plan("H1")], 16, "")
    assert len(measured) == 2


def test_plans_that_differ_in_the_last_digit_are_told_apart(tuner, mixture, monkeypatch):
    measured = []
    monkeypatch.setattr(Tuner, "error", lambda self, *_: measured.append(1) or 0.5)
    plans = [mixture.plan("H2P1", scale) for scale in (1.75, 1.7500001)]
    plans += [mixture.plan("H2P1", 1.75, "paired", (0.1, end)) for end in (0.5, 0.50000001)]
    tuner.screen([*plans, mixture.plan("H2P1", 1.75, "official")], 16, "")
    assert len(measured) == 5


def test_fine_solutions_of_other_problems_are_kept_apart(mixture, tmp_path):
    noise, labels = np.ones((2, 2, 2, 1), np.float32), np.zeros(2, np.int32)
    moved = {**mixture.model.predictor_params, "means": mixture.model.predictor_params["means"] + 1}
    partial = dataclasses.replace(mixture.model.description, guided_channels=1)
    problems = [
        (mixture, noise, labels, mixture.plan("H1")),
        (mixture, 2 * noise, labels, mixture.plan("H1")),
        (mixture, noise, labels + 1, mixture.plan("H1")),
        (mixture, noise, labels, mixture.plan("H1", 1.6)),
        (mixture, noise, labels, mixture.plan("H1", guidance="none")),
        (changed(mixture, predictor_params=moved), noise, labels, mixture.plan("H1")),
        (changed(mixture, description=partial), noise, labels, mixture.plan("H1", 1.5, "official")),
    ]
    for problem in problems:
        fine_solution.fine_solution(*problem, tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == len(problems)


def test_errors_are_of_the_model_as_it_computes_not_of_its_exact_twin(mixture, tmp_path):
    moved = {**mixture.model.predictor_params, "means": mixture.model.predictor_params["means"] + 1}
    coarse = changed(mixture, predictor_params=moved)
    plan = mixture.plan("H1P6")
    assert Tuner(coarse, mixture, tmp_path, cost=evaluations, **SMALL).error(plan, 16) > 0.3


def test_the_official_mode_of_some_channels_has_a_fine_solution_of_its_own(tmp_path):
    pipe = ft.ClassToImage.load(tiny.save_model(tmp_path / "m", in_channels=4))
    description = dataclasses.replace(pipe.model.description, guided_channels=3)
    pipe = changed(pipe, description=description)
    tuner = Tuner(pipe, pipe, tmp_path, cost=evaluations, noises=8, latency_batch=1)
    for mode in ("paired", "official"):
        assert tuner.error(pipe.plan("H24", 3.0, mode), 8) < 0.05
    assert len(list((tmp_path / "solutions").glob("*.npz"))) == 2


def test_labels_of_the_first_screen_are_spread_over_many_classes(tmp_path):
    pipe = ft.ClassToImage.load(tiny.save_model(tmp_path / "m"))
    labels = Tuner(pipe, pipe, tmp_path, noises=128, cost=evaluations).labels
    assert len(set(labels[:16])) == 10
    assert np.bincount(labels, minlength=10).min() >= 12


def test_a_space_is_cut_to_what_the_model_can_do(mixture, tmp_path):
    space = tuning.space_for(mixture, Space())
    assert space.max_refiner_steps == 0
    assert space.modes == ("paired", "official")
    assert tuning.space_for(mixture, Space(modes=("none",))).modes == ("none",)
    unguided = ft.ClassToImage.load(tiny.save_model(tmp_path / "m", null_class=False))
    assert tuning.space_for(unguided, Space()).modes == ("none",)
    with pytest.raises(InputError, match="cannot be guided"):
        tuning.space_for(unguided, Space(modes=("paired",)))


def test_few_noises_are_refused(mixture, tmp_path):
    with pytest.raises(InputError, match="at least 8 noises"):
        Tuner(mixture, mixture, tmp_path, noises=4)


def test_relative_distance_is_the_mean_over_samples():
    exact = np.asarray([[3.0, 4.0], [0.0, 2.0]])
    assert tuning.relative_distance(exact * 1.1, exact) == pytest.approx(0.1)
    apart = exact + np.asarray([[5, 0], [0, 0]])
    assert tuning.relative_distance(apart, exact) == pytest.approx(0.5)
