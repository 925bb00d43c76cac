"""solve as users run it: what it writes, who samples with it, and how it refuses."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_text
from test_commands import run

import flowturbo_jax as ft
import sample as sample_script
from flowturbo_jax import solver_files
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.pipelines import solver_search
from flowturbo_jax.schedule import Schedule

pytestmark = pytest.mark.usefixtures("compiled_once")
QUICK = (
    "--noises=16",
    "--held-out=8",
    "--batch-size=8",
    "--steps=4",
    "--evaluate-every=2",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def solved(model, tmp_path_factory):
    """A folder of what was computed, and the model that got solvers of two scales."""
    out = tmp_path_factory.mktemp("solved")
    copy = out / "model"
    shutil.copytree(model, copy)
    given = ("--schedule=S2,S1R1", "--guidance-scales=1,1.5", f"--out={out / 'work'}")
    assert run(package_main, "solve", str(copy), *given, *QUICK) == 0
    return out / "work", copy


def test_solve_writes_a_solver_that_samples(solved, tmp_path, capsys):
    _, model = solved
    assert [str(found) for found in solver_files.learnt_schedules(model)] == ["S1R1", "S2"]
    solver = solver_files.of_model(model, Schedule.parse("S1R1"))
    assert (solver.scales, solver.guidance) == ((1.0, 1.5), "paired")
    assert {"steps", "seed", "dtype", "device", "versions", "noises"} <= solver.card.keys()
    for numbers in solver.numbers:
        results = numbers.results
        assert results["held_out_rmse"] <= results["start_rmse"]
        assert results["seconds"] > 0
    sampled = [f"--config.model_dir={model}", f"--config.out={tmp_path}", "--config.data="]
    sampled += ["--config.schedule=S1R1", "--config.baseline=H2,S2", "--config.samples=4"]
    assert run(sample_script.main, *sampled) == 0
    report = json.loads((tmp_path / "digits.json").read_text())["schedules"]
    assert [row["card"]["schedule"] for row in report] == ["H2", "S2", "S1R1"]
    assert report[2]["card"]["solver_sha256"] == solver.sha256
    assert "solver_sha256" not in report[0]["card"]
    assert "S1R1" in capsys.readouterr().out


def test_a_learnt_baseline_that_the_model_lacks_is_left_out(solved, tmp_path, capsys):
    _, model = solved
    given = [f"--config.model_dir={model}", f"--config.out={tmp_path}", "--config.data="]
    given += ["--config.samples=4", "--config.schedule=H1"]
    assert run(sample_script.main, *given, "--config.baseline=S7,S2") == 0
    report = json.loads((tmp_path / "digits.json").read_text())["schedules"]
    assert [row["card"]["schedule"] for row in report] == ["S2", "H1"]
    assert "baseline S7 is left out: " in capsys.readouterr().err
    assert run(sample_script.main, *given, "--config.schedule=S7") == 2
    assert "has no solver S7 (it has S1R1, S2)" in capsys.readouterr().err


def test_evaluate_and_tune_know_it(solved, tmp_path, capsys):
    _, model = solved
    given = ["--schedules=S2", "--samples=20", "--batch-size=10", f"--out={tmp_path / 'e.json'}"]
    assert run(package_main, "evaluate", str(model), *given) == 0
    (row,) = json.loads((tmp_path / "e.json").read_text())
    assert row["card"]["solver_sha256"]
    tune = ["--max-evaluations=2", "--max-refiner-steps=0", "--noises=8", "--batch-size=8"]
    tune += ["--latency-batch=2", "--finalists=4", "--modes=paired", "--shifts=", "--intervals="]
    tune += ["--one-order", "--spacings=", "--adams=", "--baselines=H1", "--write"]
    assert run(package_main, "tune", str(model), f"--out={tmp_path / 't'}", *tune) == 0
    (file,) = (tmp_path / "t").glob("measured-*.json")
    tried = {key.split()[0] for key in json.loads(file.read_text())["results"]}
    assert {"S2", "S1R1"} <= tried
    ft.ClassToImage.load(model)([1], schedule="best")


def test_the_same_command_searches_nothing_twice(solved, model, tmp_path, monkeypatch):
    work, done = solved
    copy = tmp_path / "m"
    shutil.copytree(model, copy)
    monkeypatch.setattr(solver_search.SolverSearch, "_advance", lambda *_: pytest.fail("again"))
    given = ("--schedule=S2,S1R1", "--guidance-scales=1,1.5", f"--out={work}")
    assert run(package_main, "solve", str(copy), *given, *QUICK) == 0
    for text in ("S2", "S1R1"):
        schedule = Schedule.parse(text)
        found, before = (solver_files.of_model(place, schedule) for place in (copy, done))
        assert found == before


def test_scale_one_keeps_the_interval_of_the_others(model, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(model, copy)
    given = ("--evaluations=2", "--guidance-scales=1,1.5", "--guidance-interval=0:0.8")
    out = f"--out={tmp_path / 'w'}"
    assert run(package_main, "solve", str(copy), *given, out, *QUICK) == 0
    solver = solver_files.of_model(copy, Schedule.parse("S2"))
    assert (solver.scales, solver.guidance_interval) == ((1.0, 1.5), (0.0, 0.8))


def test_a_solver_for_another_guidance_is_not_overwritten(solved, tmp_path, capsys):
    work, done = solved
    copy = tmp_path / "m"
    shutil.copytree(done, copy)
    before = solver_files.place(copy, Schedule.parse("S2")).read_bytes()
    for other in ("--guidance=none", "--guidance-interval=0:0.5"):
        given = ("--evaluations=2", other, f"--out={work}")
        assert run(package_main, "solve", str(copy), *given, *QUICK) == 2
        assert "move it away to learn it for another guidance" in capsys.readouterr().err
    assert solver_files.place(copy, Schedule.parse("S2")).read_bytes() == before
    solver_files.place(copy, Schedule.parse("S2")).write_text("{")
    given = ("--evaluations=2", f"--out={work}")
    assert run(package_main, "solve", str(copy), *given, *QUICK) == 2
    assert "it is not JSON" in capsys.readouterr().err


def test_another_scale_is_added_and_the_others_stay(solved, tmp_path):
    work, done = solved
    copy = tmp_path / "m"
    shutil.copytree(done, copy)
    before = solver_files.of_model(copy, Schedule.parse("S2"))
    given = ("--evaluations=2", "--guidance-scales=3", f"--out={work}")
    assert run(package_main, "solve", str(copy), *given, *QUICK) == 0
    after = solver_files.of_model(copy, Schedule.parse("S2"))
    assert after.scales == (1.0, 1.5, 3.0)
    assert after.numbers[:2] == before.numbers


def test_a_solver_of_other_weights_is_replaced(model, solved, tmp_path):
    work, _ = solved
    copy = tmp_path / "m"
    shutil.copytree(model, copy)
    given = ("--evaluations=2", f"--out={work}", *QUICK)
    assert run(package_main, "solve", str(copy), *given) == 0
    file = solver_files.place(copy, Schedule.parse("S2"))
    text = file.read_text()
    sha256 = LearntSolver.read(file).predictor_sha256
    file.write_text(
        text.replace(sha256, "0" * 64).replace('"guidance_scale": 1.5', '"guidance_scale": 9')
    )
    assert run(package_main, "solve", str(copy), *given) == 0
    assert LearntSolver.read(file).scales == (1.5,)


def test_solving_helps_even_after_few_steps(solved):
    _, model = solved
    pipe = ft.ClassToImage.load(model)
    noise = np.random.default_rng(0).normal(size=(8, *pipe.model.description.predictor.shape))
    noise = jnp.asarray(noise, jnp.float32)
    made = [pipe.sample_latents(noise, np.arange(8), schedule=text) for text in ("S2", "A2x2")]
    assert np.abs(np.asarray(made[0]) - np.asarray(made[1])).max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to learn: --evaluations=5, or --schedule=S5"),
        (["--evaluations=5", "--schedule=S5"], "one of them"),
        (["--schedule=S5", "--refiner"], "--refiner goes with --evaluations"),
        (["--evaluations=0"], "--evaluations is 0"),
        (["--schedule=H1P3"], "nothing to learn; take S5"),
        (["--schedule=Q3"], "unknown block 'Q'"),
        (["--schedule=S3Rc1"], "no chained rule"),
        (["--evaluations=2", "--guidance-scales=a"], "--guidance-scales is 'a'"),
        (["--evaluations=2", "--guidance=loud"], "guidance is 'loud'"),
        (["--evaluations=2", "--labels=x"], "--labels is 'x'"),
        (["--evaluations=2", "--labels=99"], "labels are [99]"),
        (["--evaluations=2", "--batch-size=6"], "does not split over 4 devices"),
        (["--evaluations=2", "--batch-size=64"], "needs as many noises"),
        (["--evaluations=2", "--loss=beauty"], "loss is 'beauty'"),
        (["--evaluations=2", "--remat=all"], "remat 'all'"),
        (["--evaluations=2", "--dtype=int4"], "dtype is 'int4'"),
        (["--evaluations=2", "--seed=-1"], "seed is -1"),
        (["--evaluations=2", "--learning-rate=0"], "learning_rate is 0"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    model, tmp_path, capsys, arguments, message
):
    given = ["solve", str(model), f"--out={tmp_path / 'x'}", *QUICK, *arguments]
    assert run(package_main, *given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (model / "solvers").exists()


def test_models_that_cannot_be_solved_are_refused(tmp_path, capsys):
    plain = tiny.save_model(tmp_path / "plain", refiner=False)
    out = f"--out={tmp_path / 'x'}"
    assert run(package_main, "solve", str(plain), "--schedule=S2R1", out, *QUICK) == 2
    assert "S2R1 refines, but this model has no refiner" in capsys.readouterr().err
    texts = tiny_text.save(tmp_path / "texts", refiner=False, vae=False)
    assert run(package_main, "solve", str(texts), "--schedule=S2", out, *QUICK) == 2
    assert "solve is for models of classes" in capsys.readouterr().err
    assert run(package_main, "solve", str(tmp_path / "none"), "--schedule=S2", out) == 2
    assert "no model directory" in capsys.readouterr().err


def test_a_model_that_cannot_be_written_to_is_refused_before_the_search(
    model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert run(package_main, "solve", str(model), "--evaluations=2", f"--out={tmp_path / 'x'}") == 2
    assert "copy the model to a place that can be written to" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
