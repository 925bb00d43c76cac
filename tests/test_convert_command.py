"""python -m flowturbo_jax convert: what it writes and prints, and how it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import golden
import pytest
from PIL import Image
from safetensors.numpy import load_file

import sample as sample_script
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.commands import entry
from flowturbo_jax.weights import sha256_of

FILES = golden.FOLDER
ROOT = Path(__file__).parents[1]


def run(main, *arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        entry.run(main, ["command", *arguments])
    return stop.value.code


@pytest.fixture
def given(tmp_path):
    config = tmp_path / "heads.json"
    config.write_text('{"num_heads": 4}')
    return [
        f"--predictor={FILES / 'sit/sit.safetensors'}",
        f"--refiner={FILES / 'refiner/refiner_train.pt'}",
        f"--vae={FILES / 'vae/tiny'}",
        f"--predictor-config={config}",
        f"--refiner-config={config}",
    ]


def test_converted_weights_make_a_picture(given, tmp_path, capsys):
    out = tmp_path / "model"
    assert run(package_main, "convert", *given, f"--out={out}", "--image-size=16") == 0
    printed = capsys.readouterr().out
    assert "its 'ema'" in printed
    assert re.search(r"vae decode +0\.\d\d M +\d+\.\d\d MMAC", printed)
    assert f"wrote {out}" in printed
    code = run(
        sample_script.main,
        f"--config={ROOT / 'configs/sit_xl_2_256.py'}",
        f"--config.model_dir={out}",
        "--config.labels=1,class 7",
        "--config.samples=3",
        "--config.schedule=H1P1R1",
        "--config.dtype=bfloat16",
        f"--config.out={tmp_path}",
    )
    assert code == 0
    report = json.loads((tmp_path / "sit_xl_2_256.json").read_text())
    card = report["schedules"][0]["card"]
    assert (card["guidance"], card["guided_channels"]) == ("official", 3)
    assert (card["guidance_scale"], card["dtype"]) == (4.0, "bfloat16")
    with Image.open(tmp_path / "sit_xl_2_256.png") as picture:
        assert picture.width > 3 * 16


def test_describe_and_export_work_on_what_was_converted(given, tmp_path, capsys):
    out = tmp_path / "model"
    assert run(package_main, "convert", *given, f"--out={out}", "--weights=model") == 0
    written = capsys.readouterr().out
    assert run(package_main, "convert", f"--describe={out}") == 0
    described = capsys.readouterr().out
    assert described.splitlines()[1:-1] == written.splitlines()[4:-2]
    file = tmp_path / "refiner.safetensors"
    flags = ("--network=refiner", f"--out={file}")
    assert run(package_main, "convert", f"--export={out}", *flags) == 0
    ours, theirs = load_file(file), golden.weights("refiner/refiner")
    assert {name: array.tobytes() for name, array in ours.items()} == {
        name: array.tobytes() for name, array in theirs.items()
    }


def test_a_sha256_is_checked(given, tmp_path, capsys):
    right = sha256_of(FILES / "sit/sit.safetensors")
    flags = [*given, f"--out={tmp_path / 'model'}"]
    assert run(package_main, "convert", *flags, f"--predictor-sha256={right[::-1]}") == 2
    assert right in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert run(package_main, "convert", *flags, f"--predictor-sha256={right.upper()}") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --predictor"),
        (["--describe=digits", "--export=digits"], "give one of"),
        (["--describe=digits", "--out=x"], "--out means nothing to describe"),
        (["--export=digits", "--out=x.safetensors"], "--network is missing"),
        (["--export=digits", "--network=refiner"], "--out is missing"),
        (
            ["--export=digits", "--network=refiner", "--out=x.safetensors", "--size=SiT-S/2"],
            "--size means nothing to export",
        ),
        (["--predictor=x.pt"], "--out is missing"),
        (["--predictor=x.pt", "--out=x", "--network=vae"], "--network means nothing to convert"),
        (["--predictor=x.pt", "--out=x", "--weights=best"], "--weights is 'best'"),
        (["--predictor=x.pt", "--out=x"], "x.pt"),
        (["--predictor=https://example.org/x.pt", "--out=x"], "hf://"),
        (["--predictor=x.pt", "--out=x", "--image-size=big"], "image-size.*big"),
        (["--describe=nowhere"], "no model directory at 'nowhere'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(package_main, "convert", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert re.search(message, error[0]), error[0]
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_file_runs_nothing_in_a_process_of_its_own(tmp_path):
    environment = {"TMPDIR": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "flowturbo_jax", "convert"]
    files = [f"--predictor={FILES / 'edge/malicious_args.pt'}", f"--out={tmp_path / 'model'}"]
    done = subprocess.run(
        [*command, *files], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: predictor: ")
    assert "posix.system" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
