"""python -m flowturbo_jax convert: what it writes and prints, and how it refuses."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
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


@pytest.mark.parametrize(
    ("network", "file"),
    [
        ("predictor", "sit/sit.safetensors"),
        ("refiner", "refiner/refiner_train.pt"),
        ("vae", "vae/tiny/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_sha256_is_checked(given, tmp_path, capsys, network, file):
    right = sha256_of(FILES / file)
    flags = [*given, f"--out={tmp_path / 'model'}"]
    assert run(package_main, "convert", *flags, f"--{network}-sha256={right[::-1]}") == 2
    assert right in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert run(package_main, "convert", *flags, f"--{network}-sha256={right.upper()}") == 0


def test_a_disk_too_small_is_one_clear_line(given, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(package_main, "convert", *given, f"--out={tmp_path / 'new' / 'model'}") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"needs 0\.00 GB, and 0\.00 GB are free; make room", error)
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_half_way_ends_in_a_clear_line_and_leaves_nothing(given, tmp_path):
    """A limit on the size of a file fails a write as a disk that fills up meanwhile does.

    Orbax's threads print their own lines before ours.
    """
    command = shlex.join([sys.executable, "-m", "flowturbo_jax", "convert"])
    for task in (
        [*given, f"--out={tmp_path / 'new' / 'model'}"],
        ["--export=digits", "--network=predictor", f"--out={tmp_path / 'new' / 'p.safetensors'}"],
    ):
        done = subprocess.run(
            ["bash", "-c", f"trap '' XFSZ; ulimit -f 100; exec {command} {shlex.join(task)}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        assert done.returncode == 2, done.stderr
        assert "error: cannot write" in done.stderr.splitlines()[-1]
        assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("out", ["file/model", "x" * 300, "/proc/nothere/model"])
@pytest.mark.parametrize("job", ["convert", "export"])
def test_a_place_that_cannot_be_is_refused_before_anything_is_read(
    given, tmp_path, monkeypatch, capsys, out, job
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    if job == "convert":
        arguments = ["--predictor=nowhere.pt", f"--out={out}"]
    else:
        arguments = ["--export=digits", "--network=refiner", f"--out={out}.safetensors"]
    assert run(package_main, "convert", *arguments) == 2
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_conversion_that_is_ended_leaves_nothing(given, tmp_path):
    command = [sys.executable, "-m", "flowturbo_jax", "convert", *given]
    with subprocess.Popen(
        [*command, f"--out={tmp_path / 'new' / 'model'}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not list(tmp_path.glob("new/.model-*")):
            time.sleep(0.01)
        process.terminate()
    assert process.returncode in (143, 0)  # 0: it was done before the signal came
    assert not list(tmp_path.glob("new/.model-*"))


def test_an_exported_file_may_be_read_by_all(tmp_path):
    out = tmp_path / "refiner.safetensors"
    assert run(package_main, "convert", "--export=digits", "--network=refiner", f"--out={out}") == 0
    assert out.stat().st_mode & 0o777 == 0o644


def test_the_command_it_prints_makes_a_picture(given, tmp_path, capsys):
    assert run(package_main, "convert", *given, f"--out={tmp_path / 'model'}") == 0
    command = capsys.readouterr().out.strip().splitlines()[-1].partition("python sample.py ")[2]
    config, *flags = shlex.split(command)
    small = ["--config.samples=2", f"--config.out={tmp_path}"]
    config = config.replace("configs/", f"{ROOT}/configs/")
    assert run(sample_script.main, config, *flags, *small, "--config.schedule=H1") == 0
    assert (tmp_path / "sit_xl_2_256.png").exists()


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
        (["--describe=digits", "--image-size=0"], "--image-size means nothing to describe"),
        (["--describe="], "--describe is empty"),
        (["--predictor=x.pt", "--out=x", "--vae-sha256=abc"], "of the vae is given, but no --vae"),
        (["--predictor=x.pt", "--out=x", "--refiner-config=c"], "given, but no --refiner"),
        (["--predictor=x.pt", "--out=x", "--guidance-scal=3"], "unrecognized arguments"),
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
    marker = Path("/tmp/pwned_flowturbo")  # what its payload makes
    assert not marker.exists()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "flowturbo_jax", "convert"]
    files = [f"--predictor={FILES / 'edge/malicious_args.pt'}", f"--out={tmp_path / 'model'}"]
    done = subprocess.run(
        [*command, *files], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: predictor: ")
    assert "posix.system" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not marker.exists()
    assert list(tmp_path.iterdir()) == []
