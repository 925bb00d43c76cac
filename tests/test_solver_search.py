"""Learning a solver: that it is worth it, goes on exactly where it was stopped, and how it ends."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_mixture import CONFIG, PARAMS, description

import flowturbo_jax as ft
from flowturbo_jax import model_directory
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.pipelines import solver_networks
from flowturbo_jax.pipelines.solver_search import SolverSearch
from flowturbo_jax.pipelines.solver_settings import Parameters, Search, solver_of, start
from flowturbo_jax.schedule import Schedule

pytestmark = pytest.mark.usefixtures("compiled_once")
QUICK = {"noises": 32, "held_out": 16, "batch_size": 16, "evaluate_every": 10}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A model whose velocity is exact and cheap."""
    directory = tmp_path_factory.mktemp("mixture") / "m"
    model_directory.save(directory, description(CONFIG), PARAMS, None)
    return ft.ClassToImage.load(directory)


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """A tiny model with a refiner."""
    return ft.ClassToImage.load(tiny.save_model(tmp_path_factory.mktemp("refined") / "m"))


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """Fine solutions, which the tests share."""
    return tmp_path_factory.mktemp("solved")


def searching(pipe, work, text="S3", scale=1.5, on_progress=lambda *_: None, **fields):
    schedule = Schedule.parse(text)
    search = Search(schedule, **{**QUICK, **fields})
    plan = pipe.plan("H1", scale)._replace(schedule=schedule)
    return SolverSearch(pipe, pipe, search, plan, work, on_progress)


def copied(solved, folder):
    """A folder with the fine solutions that are there, and no search to go on with."""
    folder.mkdir(exist_ok=True)
    if (solved / "solutions").is_dir():
        (folder / "solutions").symlink_to(solved / "solutions")
    return folder


@pytest.mark.parametrize("text", ["S3", "H1S2", "H1P2@learnt", "A2x3@learnt"])
def test_a_learnt_solver_is_nearer_on_noises_it_has_not_seen(mixture, solved, text):
    search = searching(mixture, solved, text, steps=60)
    numbers = search.run()
    results = numbers.results
    assert results["held_out_rmse"] < 0.9 * results["start_rmse"]  # clearly, not by chance
    assert results["ended"] in ("steps", "no better for long")
    # What is in the file is what was measured.
    schedule = Schedule.parse(text)
    solver = LearntSolver(schedule, "paired", None, (numbers,), "", None)
    plan = mixture.plan(solver, 1.5)
    held_out = search.held_out()
    made = mixture.sample_latents(jnp.asarray(held_out.noise), held_out.labels, **plan.settings)
    rmse = np.sqrt(np.mean((np.asarray(made) - held_out.way[:, -1]) ** 2))
    np.testing.assert_allclose(rmse, results["held_out_rmse"], rtol=1e-3)


def test_with_more_steps_it_comes_nearer(mixture, solved):
    errors = [
        searching(mixture, solved, text, steps=40).run().results["held_out_rmse"]
        for text in ("S2", "S3", "S5")
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_refiner_can_take_part(refined, tmp_path):
    numbers = searching(refined, tmp_path, "S2R1", steps=10).run()
    assert [len(row) for row in numbers.weights] == [1, 2, 3]
    assert numbers.results["held_out_rmse"] < numbers.results["start_rmse"]


def test_a_search_goes_on_exactly_where_it_was_stopped(mixture, solved, tmp_path):
    whole = searching(mixture, copied(solved, tmp_path / "whole"), steps=30).run()
    parts = copied(solved, tmp_path / "parts")

    def stop(what, done, total):
        if what == "S3" and done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searching(mixture, parts, steps=30, on_progress=stop).run()
    said = []
    resumed = searching(
        mixture, parts, steps=30, on_progress=lambda what, done, total: said.append((what, done))
    ).run()
    assert [done for what, done in said if what == "S3"] == [20, 30]
    assert (resumed.times, resumed.weights) == (whole.times, whole.weights)
    assert resumed.results == whole.results
    (file,) = parts.glob("search-*.json")
    before = file.read_bytes()
    assert searching(mixture, parts, steps=30).run().results == whole.results
    assert file.read_bytes() == before


def test_a_search_that_diverges_stops_and_keeps_the_best(mixture, solved, tmp_path):
    work = copied(solved, tmp_path / "wild")
    numbers = searching(mixture, work, steps=300, learning_rate=9.0, batch_size=8).run()
    assert numbers.results["ended"] in ("diverged", "no better for long")
    assert numbers.results["steps"] < 300
    assert numbers.results["held_out_rmse"] <= numbers.results["start_rmse"]


def test_divergence_is_said(mixture, solved, tmp_path, monkeypatch):
    work = copied(solved, tmp_path / "nan")
    search = searching(mixture, work, steps=30)
    measured = iter([0.2, 0.1, float("nan")])
    monkeypatch.setattr(search, "rmse", lambda solver, held_out: next(measured))
    numbers = search.run()
    assert numbers.results["ended"] == "diverged"
    assert numbers.results["best_step"] == 10
    (file,) = work.glob("search-*.json")
    curve = json.loads(file.read_text())["results"]["state"]["curve"]
    assert curve == [[0, 0.2], [10, 0.1], [20, None]]


def test_a_start_that_is_not_finite_is_refused(mixture, solved, tmp_path, monkeypatch):
    search = searching(mixture, copied(solved, tmp_path / "bad"))
    monkeypatch.setattr(search, "rmse", lambda solver, held_out: float("inf"))
    with pytest.raises(InputError, match="latents are not finite; look at the weights"):
        search.run()


def test_patience_ends_a_search(mixture, solved, tmp_path, monkeypatch):
    search = searching(mixture, copied(solved, tmp_path / "long"), steps=300, patience=2)
    measured = iter([0.3, 0.2, 0.25, 0.21, 0.1])
    monkeypatch.setattr(search, "rmse", lambda solver, held_out: next(measured))
    results = search.run().results
    assert (results["ended"], results["steps"]) == ("no better for long", 30)
    assert (results["best_step"], results["held_out_rmse"]) == (10, 0.2)


def test_labels_can_be_left_out_and_are_measured_apart(mixture, solved):
    results = searching(mixture, solved, steps=20, labels=(0,)).run().results
    assert 0 < results["held_out_rmse_other_labels"] < 2 * results["start_rmse"]
    assert "held_out_rmse_other_labels" not in searching(mixture, solved, steps=20).run().results


def test_without_a_way_only_the_end_counts(mixture, solved):
    search = searching(mixture, solved, trajectory_weight=0.0)
    with_way = searching(mixture, solved)
    examples = search.held_out()
    far = examples._replace(way=np.concatenate([examples.way[:, :-1] + 1, examples.way[:, -1:]], 1))
    parameters = start(Schedule.parse("S3"))
    for one, differs in ((search, False), (with_way, True)):
        losses = [
            float(jax.jit(one.loss)(parameters, one.frozen, some)) for some in (examples, far)
        ]
        assert (losses[0] != losses[1]) == differs


def test_recomputing_changes_memory_not_gradients(refined, tmp_path):
    found = []
    for remat in ("none", "evaluations", "blocks"):
        search = searching(refined, tmp_path, "S2R1", remat=remat)
        examples = search.held_out()
        gradients = jax.jit(jax.grad(search.loss))(
            start(Schedule.parse("S2R1")), search.frozen, examples
        )
        found.append(jnp.concatenate([leaf.reshape(-1) for leaf in gradients]))
    assert np.abs(found[0]).max() > 1e-3
    # The same arithmetic in another order: float32 rounding.
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-6)


def test_any_parameters_make_a_solver():
    schedule = Schedule.parse("H1S3R2")
    for seed in range(5):
        draw = np.random.default_rng(seed).normal
        parameters = Parameters(
            jnp.asarray(draw(0, 3, 6), jnp.float32), jnp.asarray(draw(0, 5, (6, 6)), jnp.float32)
        )
        times, weights = solver_of(schedule, parameters)
        assert (times[0], times[-1]) == (0, 1)
        assert (np.diff(times) > 0).all()
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
        assert (np.tril(np.ones((6, 6)))[:, ::-1][np.abs(weights) > 0] == 1).all()


def test_a_batch_has_to_split_over_the_devices(mixture, tmp_path):
    with pytest.raises(InputError, match="batch_size 6 does not split over 4 devices"):
        searching(mixture, tmp_path, batch_size=6)


def test_another_scale_is_searched_by_the_same_programs(mixture, solved, tmp_path):
    first = searching(mixture, copied(solved, tmp_path / "a"), steps=10)
    first.run()
    plan = mixture.plan("H1", 3.0)._replace(schedule=Schedule.parse("S3"))
    count = []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda name, *_, **__: count.append(name) if "backend_compile" in name else None)
    shared = first.at(plan, lambda *_: None)
    data = shared.data()
    del count[:]
    moving = shared.step(shared.begin(), data[0].rows(np.arange(16)))
    assert not [name for name in count if "backend_compile" in name]
    apart = searching(mixture, copied(solved, tmp_path / "b"), scale=3.0, steps=10)
    other = apart.step(apart.begin(), data[0].rows(np.arange(16)))
    for a, b in zip(jax.tree.leaves(moving), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": Schedule.parse("H1P3")}, "nothing to learn; take S5"),
        ({"schedule": Schedule.parse("H1P3@0.5")}, "or H1P3@learnt$"),
        ({"schedule": Schedule.parse("S99")}, "up to 64 are learnt"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 1024}, "needs as many noises"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"loss": "feelings"}, "known are latents, pixels"),
        ({"remat": "all"}, "known are"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Search(**{"schedule": Schedule.parse("S3"), **fields})


def test_an_unknown_label_is_refused(mixture, tmp_path):
    with pytest.raises(InputError, match="labels are"):
        searching(mixture, tmp_path, labels=(0, 99)).run()


def test_the_search_knows_when_to_recompute_blocks(refined, monkeypatch):
    assert solver_networks.remat_of(refined, "") == "evaluations"
    monkeypatch.setattr(solver_networks, "LARGE", 10)
    assert solver_networks.remat_of(refined, "") == "blocks"
    assert solver_networks.remat_of(refined, "none") == "none"
