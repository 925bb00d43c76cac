"""The command lines: what they write, and that bad input ends in one line and exit code 2."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

import sample as sample_script
import train as train_script
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.commands import entry

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save_model(tmp_path_factory.mktemp("model") / "m"))


def run(main, *arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        entry.run(main, ["command", *arguments])
    return stop.value.code


SMALL = ("--config.samples=20", "--config.batch_size=8", "--config.schedule=H1P1R1")


def test_sample_writes_a_picture_a_card_and_a_table(model, tmp_path, capsys):
    given = [f"--config.model_dir={model}", f"--config.out={tmp_path}", "--config.baseline=H2"]
    code = run(sample_script.main, *given, *SMALL)
    table = capsys.readouterr().out
    assert code == 0
    assert "H1P1R1" in table
    assert "H2" in table
    assert "Fréchet" in table
    report = json.loads((tmp_path / "digits.json").read_text())
    cards = [row["card"] for row in report["schedules"]]
    assert [card["schedule"] for card in cards] == ["H2", "H1P1R1"]
    assert cards[1]["predictor_evaluations"] == 3
    assert cards[1]["samples"] == 20
    assert {"guidance", "guidance_scale", "dtype", "seed", "versions"} <= cards[0].keys()
    assert 0 <= report["schedules"][0]["results"]["label_accuracy"] <= 1
    picture = Image.open(tmp_path / "digits.png")
    assert json.loads(picture.text["protocol_cards"]) == cards
    assert picture.width > 300


def test_sample_settings_reach_the_card(model, tmp_path):
    code = run(
        sample_script.main,
        f"--config.model_dir={model}",
        f"--config.out={tmp_path}",
        "--config.baseline=",
        "--config.data=",
        "--config.guidance_scale=2",
        "--config.guidance=official",
        "--config.seed=5",
        "--config.labels=3",
        "--config.dtype=bfloat16",
        *SMALL,
    )
    assert code == 0
    (row,) = json.loads((tmp_path / "digits.json").read_text())["schedules"]
    card = row["card"]
    assert (card["guidance"], card["guidance_scale"], card["seed"]) == ("official", 2.0, 5)
    assert (card["label_sampling"], card["dtype"]) == ("in turn: 3", "bfloat16")
    assert "frechet_distance" not in row["results"]


def test_one_class_is_not_scored_against_all_digits(model, tmp_path, capsys):
    given = [f"--config.model_dir={model}", f"--config.out={tmp_path}", "--config.labels=3"]
    assert run(sample_script.main, *given, "--config.baseline=", *SMALL) == 0
    (row,) = json.loads((tmp_path / "digits.json").read_text())["schedules"]
    assert "frechet_distance" not in row["results"]
    assert "label_accuracy" in row["results"]
    assert "Fréchet" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.schedul=H1"], "unknown config key schedul"),
        (["--config.schedule=Q4"], "unknown block 'Q'|cannot be read"),
        (["--config.schedule="], "has no steps"),
        (["--config.schedule=R4"], "starts with R"),
        (["--config.samples=many"], "invalid literal"),
        (["--config.samples=0"], "samples is 0"),
        (["--config.labels=10"], "label 10 is out of range"),
        (["--config.model_dir=nowhere"], "no model directory at 'nowhere'"),
        (["--config.guidance=strong"], "guidance is 'strong'"),
        (["--config.dtype=int8"], "dtype is 'int8'"),
        (["--config.seed=-1"], "seed is -1"),
        (["--config=nowhere.py"], "no config file at 'nowhere.py'"),
        (["--nonsense=3"], "Unknown command line flag 'nonsense'"),
        (["H1P3R2"], "unexpected argument 'H1P3R2'"),
    ],
)
def test_bad_input_to_sample_is_one_clear_line(model, tmp_path, capsys, arguments, message):
    given = [f"--config.model_dir={model}", f"--config.out={tmp_path / 'out'}", *SMALL]
    code = run(sample_script.main, *given, *arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_one_clear_line(model, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    code = run(
        sample_script.main, f"--config.model_dir={model}", f"--config.out={tmp_path}/file", *SMALL
    )
    assert code == 2
    assert "cannot write to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_train_says_where_the_model_is(model, tmp_path, capsys):
    config = tmp_path / "recipe.py"
    config.write_text(
        "from flowturbo_jax.train_config import TrainConfig\n"
        f"def get_config(): return TrainConfig.create({tiny.recipe().to_dict()!r}).to_config_dict()"
    )
    workdir = f"--workdir={tmp_path / 'run'}"
    assert run(train_script.main, f"--config={config}", workdir, "--config.steps=2") == 0
    assert f"wrote {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    assert run(train_script.main, f"--config={config}", workdir, "--config.steps=3") == 2
    assert "steps: 2 -> 3" in capsys.readouterr().err


def test_evaluate_continues_its_file_and_prints_means(model, tmp_path, capsys):
    out = tmp_path / "results.json"
    common = ["evaluate", model, "--samples=20", "--batch-size=10", f"--out={out}"]
    assert run(package_main, *common, "--schedules=H1", "--seeds=0") == 0
    first = json.loads(out.read_text())
    assert run(package_main, *common, "--schedules=H1,H1P1R1", "--seeds=0,1") == 0
    rows = json.loads(out.read_text())
    assert rows[0] == first[0]  # time and all: it was not measured again
    assert len(rows) == 4
    table = capsys.readouterr().out
    assert "±" in table
    assert "| H1P1R1 | paired 1.5 | 3 | 2 |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "unknown command 'dance'; known are convert, encode, evaluate"),
        (["evaluate"], "give a model directory and --out, or --compare"),
        (["evaluate", "nowhere", "--schedules=H1", "--out=x"], "no model directory"),
        (["evaluate", "digits", "--schedules=X", "--out=x"], "cannot be read"),
        (["evaluate", "digits", "--schedules=H1", "--out=x", "--seeds=a"], "--seeds is 'a'"),
        (["evaluate", "digits", "--schedules=H1", "--out=x", "--samples=1"], "--samples is 1"),
        (["evaluate", "digits", "--schedules=H1", "--out=x", "--samples=b"], "invalid int"),
    ],
)
def test_bad_input_to_the_package_is_one_clear_line(capsys, arguments, message):
    assert run(package_main, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_evaluate_does_not_overwrite_a_file_that_is_not_its_own(model, tmp_path, capsys):
    out = tmp_path / "thesis.json"
    out.write_text('{"years": 4}')
    assert run(package_main, "evaluate", model, "--schedules=H1", f"--out={out}") == 2
    assert "holds no results" in capsys.readouterr().err
    assert out.read_text() == '{"years": 4}'


def test_a_wrong_type_in_a_config_file_is_one_clear_line(tmp_path, capsys, as_users_run_it):
    config = tmp_path / "recipe.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict({ {**tiny.recipe().to_dict(), 'steps': 1.5}!r})"
    )
    assert run(train_script.main, f"--config={config}", f"--workdir={tmp_path / 'run'}") == 2
    assert "config key steps is 1.5; it must be of type int" in capsys.readouterr().err
    config.write_text(
        "from flowturbo_jax.train_config import TrainConfig\n"
        f"def get_config(): return TrainConfig(**{ {**tiny.recipe().to_dict(), 'seed': -1}!r})"
    )
    assert run(train_script.main, f"--config={config}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: config file: config key seed is -1")
    config.write_text("def get_config(): return undefined_name")
    assert run(train_script.main, f"--config={config}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "undefined_name" in line
    assert "Traceback" not in line


def test_scripts_run_as_programs_and_fail_without_a_traceback():
    for command in (["sample.py"], ["train.py"]):
        done = subprocess.run(
            [sys.executable, *command, "--config.model_dir=nowhere"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: no model directory at 'nowhere'")
        assert len(done.stderr.splitlines()) == 1
    done = subprocess.run(
        [sys.executable, "sample.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "--config.schedule=H1P3R2" in done.stdout
    assert "which block makes each step" in done.stdout
