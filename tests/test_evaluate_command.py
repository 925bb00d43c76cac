"""The evaluate command: killed and continued, alone at its file, clear about what it refuses."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_commands import run
from test_faults import wait_for
from train_runs import finish

from flowturbo_jax import model_directory
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.commands import output_file
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import Preset
from flowturbo_jax.models import family
from flowturbo_jax.pipelines import judging

ROOT = Path(__file__).parents[1]
# More, to search for a moment that does harm: FLOWTURBO_TEST_KILLS=20 python -m pytest -k killed
KILLS = int(os.environ.get("FLOWTURBO_TEST_KILLS", "2"))
SAMPLES, SEEDS = 320, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with a preset."""
    directory = tiny.save_model(tmp_path_factory.mktemp("model") / "m")
    loaded = model_directory.load(directory)
    presets = {"fast": Preset("H1", "paired")}
    described = dataclasses.replace(loaded.description, schedules=presets)
    model_directory.save(directory, described, loaded.predictor_params, loaded.refiner_params)
    return directory


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """Results of four images, and how they were asked for; not to be changed."""
    out = tmp_path_factory.mktemp("done") / "results.json"
    asked = ["evaluate", str(model), "--schedules=fast", "--samples=4", "--labels=random"]
    asked += ["--guidance-scale=2", "--guidance-interval=0.1:0.8", "--batch-size=4", "--seeds=5"]
    assert run(package_main, *asked, f"--out={out}") == 0
    return asked, out


def rows_of(out):
    """The measurements, without what differs from run to run."""
    rows = json.loads(out.read_text())
    for row in rows:
        row["results"].pop("ms_per_image", None)
    return rows


@pytest.fixture
def processes():
    """Those started, which end with the test however it ends."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(arguments, processes):
    """Starts the command on one device."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "flowturbo_jax", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    processes.append(process)
    return process


def arguments_of(model, folder):
    asked = ["evaluate", str(model), "--schedules=H1", f"--samples={SAMPLES}", "--batch-size=4"]
    places = {"out": "results.json", "images": "png", "npz": "npz"}
    asked += [f"--{name}={folder / place}" for name, place in places.items()]
    return [*asked, f"--seeds={','.join(map(str, range(SEEDS)))}"]


def images_done(folder):
    """How many images are measured, of all seeds together."""
    out = folder / "results.json"
    finished = len(json.loads(out.read_text())) if out.exists() else 0
    sizes = []
    for file in folder.glob(".*.work/*/label_right.rows"):
        with contextlib.suppress(FileNotFoundError):  # its results were just written
            sizes.append(file.stat().st_size)
    # A whole one may be among the finished, or be about to be.
    return finished * SAMPLES + max((size for size in sizes if size < SAMPLES), default=0)


@pytest.mark.slow
def test_killed_and_interrupted_it_ends_as_if_undisturbed_and_as_on_four_devices(
    model, tmp_path, capsys, processes
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, errors = finish(start(arguments_of(model, whole), processes))
    assert code == 0, errors
    arguments = arguments_of(model, cut)
    seed = time.time_ns()
    moments = random.Random(seed)
    for number in range(KILLS + 1):
        before = images_done(cut)
        left = SAMPLES * SEEDS - before
        goal = before + moments.randrange(left // (KILLS + 2 - number))  # each gets some way
        process = start(arguments, processes)
        assert wait_for(lambda goal=goal: images_done(cut) > goal, process), f"seed {seed}"
        if number < KILLS:
            time.sleep(moments.random() * 0.05)
            process.kill()
            finish(process)
            continue
        process.send_signal(signal.SIGSTOP)
        assert run(package_main, *arguments) == 2  # while the other is at it
        refused = capsys.readouterr().err.splitlines()[-1]
        assert f"results.json is in use by process {process.pid} on " in refused
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        code, _, errors = finish(process)
        assert code == 130
        assert errors.splitlines()[-1] == "interrupted; the same command goes on where it was"
    before = images_done(cut)
    assert before < SAMPLES * SEEDS
    code, _, errors = finish(start(arguments, processes))
    assert code == 0, f"seed {seed}: {errors}"
    bar = re.findall(rf"(\d+)/{SAMPLES} ", errors)
    assert int(bar[0]) in (before % SAMPLES // 4 * 4, SAMPLES)
    assert rows_of(cut / "results.json") == rows_of(whole / "results.json"), f"seed {seed}"
    names = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(cut) for path in cut.rglob("*")} == names
    assert len(names) == 3 + SEEDS * (1 + 1 + SAMPLES + 2)  # and nothing that is hidden
    for name in names:
        if (whole / name).is_file() and name.name != "results.json":
            assert (whole / name).read_bytes() == (cut / name).read_bytes(), f"{name}, {seed}"
    four = tmp_path / "four"
    assert run(package_main, *arguments_of(model, four)) == 0
    for ours, theirs in zip(
        rows_of(four / "results.json"), rows_of(whole / "results.json"), strict=True
    ):
        assert (ours["card"].pop("devices"), theirs["card"].pop("devices")) == (4, 1)
        assert ours["card"] == theirs["card"]
        # Batches of one image a device round otherwise: a byte in thousands may be the next one.
        assert ours["results"] == pytest.approx(theirs["results"], rel=1e-4)


def test_what_was_asked_for_reaches_the_card(done):
    _, out = done
    (row,) = rows_of(out)
    card = row["card"]
    expected = {
        "schedule": "H1",
        "guidance": "paired",
        "guidance_scale": 2.0,
        "guidance_interval": [0.1, 0.8],
        "label_sampling": "random",
        "samples": 4,
        "batch_size": 4,
        "seed": 5,
        "dtype": "float32",
        "devices": 4,
        "reference": "digits",
        "reference_samples": 1797,
        "feature_network": "pixels in [-1, 1]",
    }
    assert {key: card[key] for key in expected} == expected
    assert {"jax", "jaxlib", "flax", "numpy"} <= card["versions"].keys()
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # no work, no lock


def test_few_samples_are_warned_of_where_the_numbers_are_read(done, capsys):
    asked, out = done
    assert run(package_main, *asked, f"--out={out}") == 0  # read, not measured
    warning = "4 samples for 64 feature dimensions: the covariance is singular and the distance "
    assert f"warning: {warning}biased" in capsys.readouterr().out
    assert rows_of(out)[0]["card"]["warnings"][0].startswith(warning)


def test_rows_of_other_protocols_stay(done, tmp_path):
    asked, out = done
    (row,) = json.loads(out.read_text())
    other = {**row, "card": {**row["card"], "versions": {"jax": "0.0.1"}}, "note": "mine"}
    results = tmp_path / "results.json"
    results.write_text(json.dumps([other]))
    assert run(package_main, *asked, f"--out={results}") == 0
    first, second = json.loads(results.read_text())
    assert first == other
    assert second["card"] == row["card"]


def test_images_of_a_known_row_are_made_and_the_row_stays(done, tmp_path):
    asked, out = done
    results = tmp_path / "results.json"
    results.write_bytes(out.read_bytes())
    asked = [*asked, f"--out={results}", f"--images={tmp_path}/png", f"--npz={tmp_path}/npz"]
    assert run(package_main, *asked) == 0
    assert results.read_bytes() == out.read_bytes()
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*"))
    name = "H1-paired-2-0.1-0.8-seed5"
    assert names == [f"npz/{name}.json", f"npz/{name}.npz", f"png/{name}"]
    assert len(list((tmp_path / "png" / name).glob("*.png"))) == 4
    made = (tmp_path / "npz" / f"{name}.npz").stat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "judge", lambda *_: pytest.fail("they are there"))
        assert run(package_main, *asked) == 0
    assert (tmp_path / "npz" / f"{name}.npz").stat().st_mtime_ns == made.st_mtime_ns


def test_results_that_cannot_be_written_are_not_measured_again(done, tmp_path, capsys):
    asked, out = done
    asked = [*asked, f"--out={tmp_path / 'results.json'}"]

    def full(*_):
        raise InputError("cannot write results.json: No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_file, "replace", full)
        assert run(package_main, *asked) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / ".results.json.work"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "judge", lambda *_: pytest.fail("it was measured"))
        assert run(package_main, *asked) == 0
    assert rows_of(tmp_path / "results.json") == rows_of(out)
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_work_of_other_settings_stays_and_is_named(done, tmp_path, capsys):
    asked, out = done
    results = tmp_path / "results.json"
    results.write_bytes(out.read_bytes())
    other = tmp_path / ".results.json.work" / "0123" / "pooled.rows"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(2_000_000))
    assert run(package_main, *asked, f"--out={results}") == 0
    assert "keeps 1 unfinished measurement(s) of other settings, 2.0 MB" in capsys.readouterr().err
    assert other.exists()


def test_one_process_writes_a_file_at_a_time(done, tmp_path, capsys):
    asked, out = done
    results = tmp_path / "results.json"
    results.write_bytes(out.read_bytes())
    (tmp_path / "alias.json").symlink_to(results)
    with output_file.reserved(results):
        for name in ("results.json", "alias.json"):
            assert run(package_main, *asked, f"--out={tmp_path / name}") == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{results} is in use by process {os.getpid()} on " in line
    assert not list(tmp_path.glob(".*"))
    (tmp_path / ".results.json.lock").write_text("process 1 on a machine that lost power")
    assert run(package_main, *asked, f"--out={tmp_path / 'alias.json'}") == 0
    assert (tmp_path / "alias.json").is_symlink()
    assert not list(tmp_path.glob(".*"))


def test_a_model_whose_images_are_not_finite_is_one_line_with_image_and_seed(tmp_path, capsys):
    described = tiny.description(refiner=False)
    params = tiny.random_params(family("sit").predictor(described.predictor))
    params = jax.tree.map(lambda a: np.full(a.shape, np.nan, a.dtype), params)
    model_directory.save(tmp_path / "m", described, params, None)
    asked = ["evaluate", str(tmp_path / "m"), "--schedules=E1", "--samples=4", "--seeds=7"]
    assert run(package_main, *asked, f"--out={tmp_path / 'out.json'}") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: image 0 of seed 7 is not finite")
    assert not (tmp_path / "out.json").exists()


def test_latents_that_nothing_decodes_are_not_measured(tmp_path, capsys):
    model = tiny.save_model(tmp_path / "m", refiner=False, in_channels=4)
    asked = ["evaluate", str(model), "--schedules=H1", f"--out={tmp_path / 'out.json'}"]
    assert run(package_main, *asked, "--features=pixels", "--reference=digits") == 2
    assert "latents of 4 channels and has no VAE to decode them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels=fair"], "labels are to be 'fair'"),
        (["--neighbours=0"], "--neighbours is 0; it must be 1 to"),
        (["--batch-size=0"], "--batch-size is 0"),
        (["--samples=1"], "--samples is 1"),
        (["--seeds=-1"], r"--seeds has -1; a seed is in \[0, 2\^32\)"),
        (["--seeds=0,,1"], "--seeds is '0,,1'"),
        (["--schedules="], "has no steps"),
        (["--schedules=H1,best"], "this model has no schedule 'best' yet"),
        (["--guidance=none"], "has no scale, but 2.0 was given"),
        (["--guidance-interval=1"], "guidance_interval is '1'"),
        (["--dtype=int8"], "dtype is 'int8'"),
        (["--features=clip"], "features are to be 'clip'"),
        (["--reference=none.npz"], r"there is no file none\.npz"),
        (["--reference=other.npz"], "of 64 pooled features by pixels .* other.npz has 3: give"),
        (["--reference=faces"], "unknown data set 'faces'"),
        (["--reference=images:nowhere"], "there is no folder nowhere"),
        (["--reference=images:empty"], "empty holds no images"),
        (["--reference=images:broken"], r"broken/a\.png cannot be read"),
        (["--out=empty"], "--out is 'empty', a folder"),
        (["--out="], "--out is '', a folder"),
        (["--out=/dev/null"], "--out is '/dev/null', which is no regular file"),
        (["--out=file/x.json"], "cannot write .*file/x.json: .*; choose another --out"),
        (["--out=file"], "file holds no results of evaluate"),
        (["--out=sampled.json"], r"sampled\.json holds no results of evaluate"),
        (["--images=file"], "cannot write images to file/.*: "),
        (["--npz=file"], "cannot write images to file/.*: "),
        (["--images="], "--images is empty"),
        (["--allow=samples"], "--allow means nothing without --compare"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_clear_line_and_changes_nothing(
    done, tmp_path, monkeypatch, capsys, arguments, message
):
    asked, _ = done
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "sampled.json").write_text('{"picture": "a.png", "schedules": []}')
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(package_main, *asked, "--out=out.json", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
