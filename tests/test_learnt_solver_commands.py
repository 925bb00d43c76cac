"""Commands that meet a learnt solver: they measure by it and name it, or refuse its file."""

import json
import shutil

import pytest
from learnt_solvers import FIRST, edited, put, saved_with_solvers
from test_commands import run

import sample as sample_script
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.pipelines.evaluation import protocol_card


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return saved_with_solvers(tmp_path_factory.mktemp("model") / "m")


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
