"""The solvers of a model directory: their names, and that they are written whole or not at all."""

import os

import pytest
from learnt_solvers import TEXTS, solver_of

from flowturbo_jax import solver_files
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.schedule import Schedule


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


def test_a_file_under_another_name_is_refused(tmp_path):
    file = solver_files.write(tmp_path, solver_of("S3"))
    other = file.with_name("S4.json")
    file.rename(other)
    with pytest.raises(InputError, match=r"S4\.json is the solver of S3; give it back its name"):
        solver_files.of_model(tmp_path, Schedule.parse("S4"))


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
