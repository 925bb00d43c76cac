"""What a model does with its learnt solvers: it samples, edits and is guided by them."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learnt_solvers import made_for, numbers_of, saved_with_solvers

import flowturbo_jax as ft
from flowturbo_jax import solver_files
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import stepwise
from flowturbo_jax.pipelines.plan import _warn_once, resolve
from flowturbo_jax.schedule import Schedule

LABELS = np.asarray([3, 1, 4], np.int32)
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 8, 1)), jnp.float32)
ROUNDING = {"rtol": 0, "atol": 1e-4}  # float32, through two networks


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return saved_with_solvers(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def warnings(caplog):
    _warn_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records]


def latents(pipe, schedule, **settings):
    return np.asarray(pipe.sample_latents(NOISE, LABELS, schedule=schedule, **settings))


@pytest.mark.parametrize("text", ["S3", "S2R1", "H1P2@learnt"])
def test_a_model_samples_by_its_solver(pipe, warnings, text):
    found = latents(pipe, text)
    assert np.isfinite(found).all()
    plan = pipe.plan(text)
    assert plan.solver == solver_files.of_model(pipe.model.directory, plan.schedule)
    assert (
        np.abs(found - latents(pipe, {"S3": "A2x3", "S2R1": "E2R1"}.get(text, "H1P2"))).max() > 1e-3
    )
    np.testing.assert_array_equal(plan.times, plan.solver.at(1.5).times)
    assert warnings() == []


@pytest.mark.parametrize("text", ["S3", "S2R1", "H1P2@learnt", "A2x3", "H1A4x3@cosine", "A2x2R1"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance_scale": 2.2}, {"guidance_scale": 1}, {"guidance_interval": (0.2, 0.6)}],
)
def test_block_by_block_is_the_compiled_sampler(pipe, text, settings):
    plan = pipe.plan(text, **settings)
    found = stepwise.sample_latents(pipe, NOISE, LABELS, plan)
    np.testing.assert_allclose(found, latents(pipe, text, **settings), **ROUNDING)


def test_another_scale_is_an_argument_and_no_program(pipe):
    latents(pipe, "S3")
    said = []
    pipe._say, before = said.append, pipe._say
    try:
        ends = [latents(pipe, "S3", guidance_scale=scale) for scale in (1.5, 2.0, 3.0)]
        other = made_for(pipe, "S3", (1.5, 3.0))
        other = other.with_numbers(numbers_of("S3", 1.5, seed=9))
        ends.append(latents(pipe, other))
    finally:
        pipe._say = before
    assert said == []
    assert all(np.abs(ends[0] - end).max() > 1e-4 for end in ends[1:])


def test_a_traced_scale_samples_as_a_number(pipe):
    run_traced = jax.jit(
        lambda scale: pipe.sample_latents(NOISE, LABELS, schedule="S3", guidance_scale=scale)
    )
    for scale in (1.5, 2.5):
        found = run_traced(jnp.float32(scale))
        np.testing.assert_allclose(found, latents(pipe, "S3", guidance_scale=scale), **ROUNDING)


def test_a_solver_that_is_not_there_names_the_command(pipe):
    with pytest.raises(InputError) as error:
        pipe.plan("S5")
    directory = pipe.model.directory
    assert str(error.value) == (
        f"the model in {directory} has no solver S5 (it has S2R1, S3, H1P2@learnt); learn it: "
        f"python -m flowturbo_jax solve {directory} --schedule=S5"
    )
    empty = dataclasses.replace(pipe.model, directory=None)
    with pytest.raises(InputError, match="lies in no directory, so it has no solver S3"):
        ft.ClassToImage(empty).plan("S3")
    with pytest.raises(InputError, match="S3 is learnt, and this model has no solvers"):
        resolve(pipe.model.description, "S3")


@pytest.mark.parametrize(
    ("text", "network"), [("S3", "predictor"), ("S2R1", "predictor"), ("S2R1", "refiner")]
)
def test_the_solver_of_another_model_is_refused(pipe, tmp_path, text, network):
    solver = made_for(pipe, text, **{f"{network}_sha256": "0" * 64})
    message = f"solver {text} was learnt for another {network}; learn one .* --schedule={text}$"
    with pytest.raises(InputError, match=message):
        solver.check_model(pipe.model.fingerprints)
    directory = tmp_path / "m"
    shutil.copytree(pipe.model.directory, directory)
    other = ft.ClassToImage.load(directory)
    solver_files.write(directory, solver)
    with pytest.raises(InputError, match=message):
        latents(other, text)
    found = latents(other, solver)  # who passes it means it
    assert np.isfinite(found).all()
    made_for(pipe, text).check_model(pipe.model.fingerprints)


def test_a_solver_stands_in_place_of_its_schedule(pipe):
    solver = made_for(pipe, "S3", (1.5, 3.0))
    np.testing.assert_array_equal(latents(pipe, solver), latents(pipe, "S3"))
    plan = pipe.plan(solver)
    assert (plan.schedule, plan.solver) == (Schedule.parse("S3"), solver)
    assert plan.settings["schedule"] is solver
    np.testing.assert_array_equal(
        pipe(LABELS, seeds=0, schedule=solver), pipe(LABELS, seeds=0, schedule="S3")
    )
    images = np.zeros((3, 8, 8, 1), np.uint8)
    edits = [
        pipe.edit(images, LABELS, strength=0.5, schedule=way, seeds=0) for way in (solver, "S3")
    ]
    np.testing.assert_array_equal(*edits)
    pipe.check(LABELS, solver)


def test_a_preset_may_name_a_learnt_schedule(pipe):
    np.testing.assert_array_equal(latents(pipe, "fast"), latents(pipe, "S3"))
    assert pipe.plan("fast").solver == pipe.plan("S3").solver


@pytest.mark.parametrize("way", ["S3", "S2R1", "H1P2@learnt"])
def test_a_learnt_schedule_does_not_invert(pipe, way):
    images = np.zeros((3, 8, 8, 1), np.uint8)
    with pytest.raises(InputError, match="invert with a schedule of E, H, P and A"):
        pipe.invert(images, LABELS, schedule=way)


def test_another_guidance_mode_is_refused(pipe):
    message = "solver S3 was learnt under guidance 'paired', not 'official'; leave guidance out"
    with pytest.raises(InputError, match=message):
        pipe.plan("S3", guidance="official")
    official = made_for(pipe, "S3", guidance="official")
    assert pipe.plan(official).guidance == "official"  # the solver says how to guide
    with pytest.raises(InputError, match="learnt under guidance 'official', not 'paired'"):
        pipe.plan(official, guidance="paired")


def test_another_scale_warns_once_and_samples(pipe, warnings):
    for _ in range(2):
        assert np.isfinite(latents(pipe, "S3", guidance_scale=4.0)).all()
    (said,) = warnings()
    assert said.startswith("solver S3 was learnt at guidance scale 1.5 to 3; at 4 it is less exact")
    pipe.plan("S3", 2.0)  # between those it was learnt at
    pipe.plan("S3", jnp.float32(9.0))  # an array may be traced, so its value is not looked at
    assert warnings() == [said]
    pipe.plan(made_for(pipe, "S3", (1.5,)), 2.0)
    assert "learnt at guidance scale 1.5; at 2 it" in warnings()[-1]


def test_scale_one_is_unguided(pipe, warnings):
    plan = pipe.plan("S3", 1)
    assert (plan.guidance, plan.scale, plan.interval) == ("none", 1, None)
    found = latents(pipe, "S3", guidance_scale=1)
    np.testing.assert_array_equal(found, latents(pipe, "S3", guidance="none"))
    assert np.isfinite(found).all()
    assert len(warnings()) == 1  # it was learnt at 1.5 to 3
    learnt_there = made_for(pipe, "S3", (1.0, 1.5))
    latents(pipe, learnt_there, guidance_scale=1)
    assert len(warnings()) == 1


def test_an_unguided_solver_samples_unguided(pipe, warnings):
    solver = made_for(pipe, "S3", (1.0,), guidance="none")
    assert pipe.plan(solver)[1:4] == ("none", 1, None)
    with pytest.raises(InputError, match="learnt under guidance 'none', not 'paired'"):
        pipe.plan(solver, 2.0, "paired")
    assert warnings() == ["solver S3 was learnt without guidance, and samples without it"]
    with pytest.raises(InputError, match="so it takes no guidance_scale"):
        pipe.plan(solver, 2.0)


def test_the_interval_is_the_solvers_unless_another_is_asked_for(pipe, warnings):
    solver = made_for(pipe, "S3", guidance_interval=(0.2, 0.7))
    assert pipe.plan(solver).interval == (0.2, 0.7)
    assert warnings() == []
    assert pipe.plan(solver, None, None, (0.0, 0.5)).interval == (0.0, 0.5)
    (said,) = warnings()
    assert "learnt for the guidance interval (0.2, 0.7), not (0.0, 0.5)" in said
