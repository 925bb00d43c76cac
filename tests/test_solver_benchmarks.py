"""The scripts that measure learnt solvers: what they print, and how they refuse."""

import json
import shutil

import pytest
import tiny
from test_commands import run

from benchmarks import solver_refiner, solvers
from flowturbo_jax.__main__ import main as package_main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a refiner and solver S2R1, and the folder of its fine solutions."""
    place = tmp_path_factory.mktemp("solver_benchmarks")
    directory = tiny.save_model(place / "m")
    search = ["--schedule=S2R1", "--steps=2", "--noises=8", "--held-out=8", "--batch-size=8"]
    assert run(package_main, "solve", str(directory), f"--out={place / 'solve'}", *search) == 0
    return directory


def cells(printed):
    """The rows of a Markdown table, without its heading."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed.splitlines()
        if line.startswith("|")
    ][2:]


def test_the_distance_of_schedules_with_their_scores_and_times(model, tmp_path, capsys):
    card = {"schedule": "H4", "guidance": "paired", "guidance_scale": 1.5}
    card |= {"predictor_evaluations": 8, "refiner_evaluations": 0}
    rows = [{"card": card, "results": {"frechet_distance": value}} for value in (1.0, 3.0)]
    (tmp_path / "scores.json").write_text(json.dumps(rows))
    speed = {"rows": [{"schedule": "H4", "batch_size": 8, "ms_per_image": 2.5}]}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    files = [f"--scores={tmp_path / 'scores.json'}", f"--speed={tmp_path / 'speed.json'}"]
    given = [f"--model={model}", f"--out={tmp_path}", "--noises=8", "--schedules=H4,H1,S2R1"]
    assert run(solvers.main, *files, *given) == 0
    fine, coarse, learnt = cells(capsys.readouterr().out)
    assert fine[:5] == ["`H4`", "8", "0", "2.0000 ± 1.4142", "2.50"]
    assert learnt[:5] == ["`S2R1`", "2", "1", "", ""]
    assert 0 < float(fine[5]) < float(coarse[5])


def test_another_models_solvers_carry_over(model, tmp_path, capsys):
    bare = shutil.copytree(model, tmp_path / "bare")
    shutil.rmtree(bare / "solvers")
    given = [f"--model={bare}", f"--out={tmp_path}", "--noises=8", "--schedules=S2R1"]
    assert run(solvers.main, *given) == 2
    assert "no solver S2R1" in capsys.readouterr().err
    assert run(solvers.main, *given, f"--solvers={model}", "--scales=1.5,2") == 0
    ((*_, near, far),) = cells(capsys.readouterr().out)
    assert 0 < float(near) != float(far) > 0


def test_a_refiner_is_trained_further_beside_the_numbers_alone(model, tmp_path, capsys):
    given = [f"--model={model}", "--schedule=S2R1", "--steps=3", "--noises=32"]
    assert run(solver_refiner.main, *given, f"--out={tmp_path / 'x'}") == 0
    first, last = cells(capsys.readouterr().out)
    assert first[1:3] == first[3:5]  # from the same start
    assert last[2] != last[4]
    curves = json.loads((tmp_path / "x" / "solver_refiner.json").read_text())["curves"]
    assert [row["step"] for row in curves["numbers"]] == [0, 3]
    assert curves["numbers"][1]["learnt_from"] != curves["numbers"][0]["learnt_from"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (solvers, ["--out=x"], "say what to measure"),
        (solvers, ["--out=x", "--schedules=H1", "--speed=nowhere"], "is no file of"),
        (solver_refiner, ["--out=x", "--schedule=S5"], "is not learnt with a refiner"),
        (solver_refiner, ["--out=x", "--schedule=H1R1"], "is not learnt with a refiner"),
    ],
)
def test_bad_input_is_one_clear_line(script, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(script.main, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:")
    assert message in line
    assert not list(tmp_path.iterdir())
