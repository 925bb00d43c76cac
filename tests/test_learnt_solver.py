"""Files of learnt solvers, and what a model does with them."""

import dataclasses
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_commands import run

import flowturbo_jax as ft
import sample as sample_script
from flowturbo_jax import model_directory, solver_files
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver, Numbers
from flowturbo_jax.model_description import Preset
from flowturbo_jax.multistep import Solver
from flowturbo_jax.pipelines import stepwise
from flowturbo_jax.pipelines.evaluation import protocol_card
from flowturbo_jax.pipelines.plan import _warn_once, resolve
from flowturbo_jax.schedule import Schedule

LABELS = np.asarray([3, 1, 4], np.int32)
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8, 8, 1)), jnp.float32)
ROUNDING = {"rtol": 0, "atol": 1e-4}  # float32, through two networks


def numbers_of(text, scale=1.5, seed=0):
    """Some numbers of a learnt schedule, as a search would leave them."""
    schedule, rng = Schedule.parse(text), np.random.default_rng(seed)
    lengths = rng.uniform(0.5, 1, schedule.steps)
    times = np.concatenate([[0], np.cumsum(lengths / lengths.sum())])
    weights = rng.normal(0, 0.3, (schedule.steps, max(schedule.remembered, 1)))
    weights[:, -1] += 1 - weights.sum(axis=1)
    weights[0] = np.eye(weights.shape[1])[-1]
    for i, row in enumerate(weights):
        row[-1] += row[: max(len(row) - i - 1, 0)].sum()
    found = Solver(times, weights if schedule.learns_weights else None)
    return Numbers.of_arrays(schedule, scale, found, {"held_out_rmse": 0.03, "steps": 300})


def solver_of(text="S3", scales=(1.5,), **fields):
    each = tuple(numbers_of(text, scale, seed) for seed, scale in enumerate(scales))
    schedule = Schedule.parse(text)
    defaults = {
        "guidance": "paired",
        "guidance_interval": None,
        "predictor_sha256": "a" * 64,
        "refiner_sha256": "b" * 64 if schedule.needs_refiner else None,
        "card": {"seed": 3, "versions": {"jax": "0.0"}},
    }
    return LearntSolver(schedule, numbers=each, **{**defaults, **fields})


def made_for(pipe, text, scales=(1.5,), **fields):
    """One whose fingerprints are a model's."""
    sha256 = pipe.model.fingerprints
    refiner = sha256["refiner"] if Schedule.parse(text).needs_refiner else None
    prints = {"predictor_sha256": sha256["predictor"], "refiner_sha256": refiner}
    return solver_of(text, scales, **{**prints, **fields})


# The file.

TEXTS = ["S1", "S5", "H1S3", "S2R1", "(S1R1)x2", "H1P3@learnt", "H1A3x2@learnt", "E1S1P1S1R2"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("scales", [(1.5,), (1.0, 1.5, 4.0)])
@pytest.mark.parametrize("interval", [None, (0.1, 0.75)])
def test_a_solver_survives_its_file(tmp_path, text, scales, interval):
    solver = solver_of(text, scales, guidance_interval=interval)
    file = solver_files.write(tmp_path, solver)
    assert (
        file
        == tmp_path / "solvers" / f"{text}.json"
        == solver_files.place(tmp_path, solver.schedule)
    )
    found = solver_files.of_model(tmp_path, Schedule.parse(text))
    assert found == solver
    assert (found.sha256, hash(found), repr(found)) == (solver.sha256, hash(solver), repr(solver))
    assert found.card == solver.card
    assert [one.results for one in found.numbers] == [one.results for one in solver.numbers]
    assert found.to_json() == solver.to_json() == file.read_text()
    assert solver_files.learnt_schedules(tmp_path) == [solver.schedule]


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_has_what_was_learnt_to_seven_digits(text):
    schedule, rng = Schedule.parse(text), np.random.default_rng(5)
    times = np.sort(np.concatenate([[0, 1], rng.uniform(size=schedule.steps - 1)]))
    times = times.astype(np.float32)
    weights = None
    if schedule.learns_weights:
        weights = rng.normal(size=(schedule.steps, schedule.remembered))
        lag = np.arange(schedule.remembered - 1, -1, -1)
        weights = np.where(lag <= np.arange(schedule.steps)[:, None], weights, 0)
        weights[:, -1] += 1 - weights.sum(axis=1)
        weights = weights.astype(np.float32)
    found = solver_of(text)
    numbers = Numbers.of_arrays(schedule, 2, Solver(times, weights), {})
    found = LearntSolver.from_json(dataclasses.replace(found, numbers=(numbers,)).to_json()).at(2.0)
    np.testing.assert_allclose(found.times, times, rtol=0, atol=1.5e-7)
    assert (found.times[0], found.times[-1], found.times.dtype) == (0, 1, np.float32)
    if weights is None:
        assert found.weights is None
        return
    learnt = np.asarray(schedule.learnt_rows)
    np.testing.assert_allclose(found.weights[learnt], weights[learnt], rtol=2e-7, atol=1e-6)
    assert not found.weights[~learnt].any()


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


def edited(change, text="S3", scales=(1.5, 3.0)):
    """The text of a file after a change of its fields."""
    fields = json.loads(solver_of(text, scales).to_json())
    change(fields)
    return json.dumps(fields)


def put(*path_and_value):
    """A change: sets what is at a path, such as ("numbers", 0, "times", 1)."""
    *path, last, value = path_and_value

    def change(fields):
        for key in path:
            fields = fields[key]
        fields[last] = value

    return change


def drop(*path):
    *path, last = path

    def change(fields):
        for key in path:
            fields = fields[key]
        del fields[last]

    return change


NAN, INF = float("nan"), float("inf")
FIRST = ("numbers", 0)
WRONG_FILES = {
    "sum": (
        put(*FIRST, "weights", 2, [0.5, 0.5, 0.5]),
        "the weights of step 3 sum to 1.5, not to 1",
    ),
    "sum of the second scale": (
        put("numbers", 1, "weights", 0, [0.99]),
        "at guidance scale 3.0 the weights of step 1 sum to 0.99",
    ),
    "times fall": (put(*FIRST, "times", [0, 0.6, 0.4, 1]), "do not rise from 0 to 1"),
    "times stand": (put(*FIRST, "times", [0, 0.5, 0.5, 1]), "do not rise from 0 to 1"),
    "times stand in float32": (put(*FIRST, "times", [0, 0.5, 0.50000001, 1]), "do not rise"),
    "start": (put(*FIRST, "times", 0, 0.01), "do not rise from 0 to 1"),
    "end": (put(*FIRST, "times", 3, 0.99), "do not rise from 0 to 1"),
    "few times": (
        put(*FIRST, "times", [0, 0.5, 1]),
        "has 3 times and 3 rows of weights; .* needs 4",
    ),
    "many times": (put(*FIRST, "times", [0, 0.2, 0.5, 0.7, 1]), "has 5 times"),
    "few rows": (drop(*FIRST, "weights", 2), "4 times and 2 rows of weights"),
    "many rows": (put(*FIRST, "weights", [[1]] * 4), "4 times and 4 rows"),
    "long row": (put(*FIRST, "weights", 1, [0, 0, 1]), "step 2 of S3 needs 2 weights"),
    "short row": (put(*FIRST, "weights", 2, [0, 1]), "step 3 of S3 needs 3 weights"),
    "empty row": (put(*FIRST, "weights", 0, []), "step 1 of S3 needs 1 weights"),
    "no row": (put(*FIRST, "weights", 0, None), "step 1 of S3 needs 1 weights, not None"),
    "number for a row": (put(*FIRST, "weights", 0, 1), "not iterable"),
    "NaN weight": (put(*FIRST, "weights", 2, [NAN, 0, 1]), "not all .* are finite numbers"),
    "infinite weight": (put(*FIRST, "weights", 2, [INF, -INF, 1]), "not all .* are finite"),
    "NaN time": (put(*FIRST, "times", 1, NAN), "not all .* are finite"),
    "infinite scale": (put(*FIRST, "guidance_scale", INF), "not all .* are finite"),
    "bool weight": (put(*FIRST, "weights", 0, [True]), "not all .* are finite"),
    "bool time": (put(*FIRST, "times", 0, False), "not all .* are finite"),
    "text weight": (put(*FIRST, "weights", 0, ["1"]), "not all .* are finite"),
    "text row": (put(*FIRST, "weights", 0, "1"), "not all .* are finite"),
    "text scale": (put("numbers", [{}]), "need the keys guidance_scale, times, weights, results"),
    "huge weights": (put(*FIRST, "weights", 2, [1e39, -1e39, 1]), "not all .* below 1e6"),
    "huge integer": (put(*FIRST, "guidance_scale", 10**400), "not all .* below 1e6"),
    "scales fall": (
        put(*FIRST, "guidance_scale", 5),
        "scales are .*; one or more are needed, rising",
    ),
    "scales twice": (put(*FIRST, "guidance_scale", 3.0), "scales are .*rising"),
    "no numbers": (put("numbers", []), "one or more are needed"),
    "numbers are null": (put("numbers", None), "not iterable"),
    "numbers is text": (put("numbers", "S3"), "need the keys"),
    "numbers miss a key": (drop(*FIRST, "weights"), "need the keys guidance_scale, times"),
    "numbers with more": (put(*FIRST, "grid", 1), "need the keys guidance_scale, times"),
    "results": (put(*FIRST, "results", 3), "results must be a JSON object"),
    "card": (put("card", [1]), "card must be a JSON object"),
    "missing": (drop("guidance"), r"wrong keys: missing \['guidance'\], unknown \[\]"),
    "unknown": (put("grid", "fine"), r"wrong keys: missing \[\], unknown \['grid'\]"),
    "format": (put("format", 2), "not of format 1"),
    "no format": (drop("format"), "not of format 1"),
    "mode": (put("guidance", "strong"), "guidance is 'strong'; it must be one of"),
    "mode is a list": (put("guidance", []), "guidance is"),
    "interval": (put("guidance_interval", [0.5, 0.2]), "must rise within"),
    "interval of one": (put("guidance_interval", [0.5]), "two flow times"),
    "schedule": (put("schedule", "Q3"), "unknown block 'Q'"),
    "schedule is a number": (put("schedule", 3), "schedule is 3, not text"),
    "plain schedule": (put("schedule", "H3"), "schedule H3 is not learnt"),
    "longer schedule": (put("schedule", "S4"), "needs 5 and 4"),
    "refining schedule": (put("schedule", "S2R1"), "refiner_sha256 is None; it must be the text"),
    "no fingerprint": (put("predictor_sha256", None), "predictor_sha256 is None; it must be"),
    "number for a fingerprint": (put("predictor_sha256", 7), "predictor_sha256 is 7; it must be"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_file_edited_wrongly_is_refused_in_a_line(tmp_path, as_users_run_it, wrong):
    change, message = WRONG_FILES[wrong]
    file = tmp_path / "solvers" / "S3.json"
    file.parent.mkdir()
    file.write_text(edited(lambda fields: None))
    solver_files.of_model(tmp_path, Schedule.parse("S3"))  # as it was, it is good
    file.write_text(edited(change))
    with pytest.raises(InputError, match=message) as error:
        solver_files.of_model(tmp_path, Schedule.parse("S3"))
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"S3", "it is not JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b'[["format", 1]]', "must hold a JSON object"),
        (b"\x93NUMPY\x01\x00\xff\xfe", "it is no text"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"format": ' + b"1" * 5000 + b"}", "it is not JSON"),
        (b'{"format": 1}', "wrong keys: missing"),
    ],
    ids=["empty", "cut", "word", "list", "null", "pairs", "binary", "deep", "digits", "bare"],
)
def test_what_is_no_such_file_is_refused_in_a_line(tmp_path, as_users_run_it, content, message):
    file = tmp_path / "solvers" / "S3.json"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        solver_files.of_model(tmp_path, Schedule.parse("S3"))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_under_another_name_is_refused(tmp_path):
    file = solver_files.write(tmp_path, solver_of("S3"))
    other = file.with_name("S4.json")
    file.rename(other)
    with pytest.raises(InputError, match=r"S4\.json is the solver of S3; give it back its name"):
        solver_files.of_model(tmp_path, Schedule.parse("S4"))


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


def test_only_canonical_names_of_learnt_schedules_are_listed(tmp_path):
    for text in ("S5", "S3", "H1P3@learnt", "(S1R1)x2", "S2R1"):
        solver_files.write(tmp_path, solver_of(text))
    for name in ("notes.json", "H1P3.json", "S4Rs1.json", "S6@learnt.json", "S7.txt", ".S8.json-1"):
        (tmp_path / "solvers" / name).write_text("{}")
    found = [str(schedule) for schedule in solver_files.learnt_schedules(tmp_path)]
    assert found == ["S2R1", "(S1R1)x2", "S3", "H1P3@learnt", "S5"]
    assert solver_files.learnt_schedules(tmp_path / "nowhere") == []


def test_writing_replaces_whole_files_only(tmp_path, monkeypatch):
    file = solver_files.write(tmp_path, solver_of("S3"))
    before = file.read_text()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(InputError, match=r"cannot write .*S3\.json: No space left on device"):
            solver_files.write(tmp_path, solver_of("S3", (2.0,)))
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == ["S3.json"]  # and no draft
    solver_files.write(tmp_path, solver_of("S3", (2.0,)))
    assert LearntSolver.read(file).scales == (2.0,)
    assert [path.name for path in file.parent.iterdir()] == ["S3.json"]


@pytest.mark.parametrize("obstacle", ["file", "denied", "gone"])
def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch, obstacle):
    directory = tmp_path / "model"
    if obstacle != "gone":
        directory.mkdir()
    if obstacle == "file":
        (directory / "solvers").write_text("in the way")
    if obstacle == "denied":  # as on a read-only file system, whoever runs the tests

        def refuse(self, *_, **__):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(type(directory), "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot write .*S3\.json: .*; copy the model") as error:
        solver_files.write(directory, solver_of("S3"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*S3*"))


# Between and beyond the scales.


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


# With a model.


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A model with the solvers S3, S2R1 and H1P2@learnt, and the preset fast, which is S3."""
    directory = tiny.save_model(tmp_path_factory.mktemp("model") / "m")
    loaded = model_directory.load(directory)
    described = dataclasses.replace(loaded.description, schedules={"fast": Preset("S3", "paired")})
    model_directory.save(directory, described, loaded.predictor_params, loaded.refiner_params)
    pipe = ft.ClassToImage.load(directory)
    for text in ("S3", "S2R1", "H1P2@learnt"):
        solver_files.write(directory, made_for(pipe, text, (1.5, 3.0)))
    return pipe


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


def test_the_protocol_card_says_which_solver(pipe):
    settings = {"seed": 0, "samples": 3, "batch_size": 3, "judges": None}
    plan = pipe.plan("S3")
    card = protocol_card(pipe, plan, **settings)
    assert (card["schedule"], card["solver_sha256"]) == ("S3", plan.solver.sha256)
    assert card["predictor_evaluations"] == 3
    assert "solver_sha256" not in protocol_card(pipe, pipe.plan("A2x3"), **settings)


def test_evaluate_measures_learnt_schedules(pipe, tmp_path):
    out = tmp_path / "results.json"
    asked = [str(pipe.model.directory), "--schedules=S3,S2R1,A2x3", "--samples=4", "--batch-size=4"]
    assert run(package_main, "evaluate", *asked, "--labels=random", f"--out={out}") == 0
    cards = [row["card"] for row in json.loads(out.read_text())]
    assert [card["schedule"] for card in cards] == ["S3", "S2R1", "A2x3"]
    assert ["solver_sha256" in card for card in cards] == [True, True, False]
    assert cards[1]["refiner_evaluations"] == 1


@pytest.mark.parametrize("command", ["evaluate", "benchmark", "sample"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), (edited(put(*FIRST, "times", 0, 0.1)), "do not rise from 0 to 1")],
    ids=["cut", "edited"],
)
def test_a_broken_file_ends_a_command_in_one_line(
    pipe, tmp_path, capsys, command, content, message
):
    directory = tmp_path / "m"
    shutil.copytree(pipe.model.directory, directory)
    (directory / "solvers" / "S3.json").write_text(content)
    out = tmp_path / "out"
    if command == "sample":
        given = [f"--config.model_dir={directory}", f"--config.out={out}", "--config.schedule=S3"]
        code = run(sample_script.main, *given, "--config.samples=10")
    else:
        code = run(package_main, command, str(directory), "--schedules=S3", f"--out={out}")
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {directory / 'solvers' / 'S3.json'}: ")
    assert message in line
    assert not out.exists() or not list(out.iterdir())
