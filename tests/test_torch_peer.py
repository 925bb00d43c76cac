"""The benchmark beside PyTorch: its command and turns, and, with torch, that both sides agree."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from benchmarks import torch_sit, turns
from benchmarks.jax_side import JaxSide
from flowturbo_jax import InputError, Schedule, model_directory
from flowturbo_jax.commands import entry
from flowturbo_jax.models import SiTConfig, VAEConfig

ROOT = Path(__file__).parents[1]
WITH_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
WITH_DIFFUSERS = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "diffusers")),
    reason="torch or diffusers is not installed",
)
AGREED = 1e-5  # relative l2 of latents in float32: dozens of evaluations, 6e-8 by each rounding


def run(*arguments: str) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as stop:
        entry.run(torch_sit.main, ["command", *arguments])
    return stop.value.code


def save(directory: Path, **fields) -> Path:
    """A model directory of a tiny SiT; no parameter is zero, so that every part shows."""
    description = dataclasses.replace(tiny.description(), **fields)
    rng = np.random.default_rng(0)
    params = {
        f"{name}_params": jax.tree.map(
            lambda leaf: np.float32(0.3) * rng.standard_normal(leaf.shape, np.float32),
            model_directory.abstract_params(module),
        )
        for name, module in model_directory.modules(description).items()
    }
    model_directory.save(directory, description, **{"refiner_params": None, **params})
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model as the published ones in all that the two sides could see differently."""
    config = SiTConfig(**{**tiny.SIT, "in_channels": 4, "patch_size": 2, "learn_sigma": True})
    return save(
        tmp_path_factory.mktemp("model") / "m",
        predictor=config,
        refiner=config.refiner(),
        vae=VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1),
        guided_channels=3,
    )


def test_help_and_a_clear_line_need_no_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    assert run("--help") == 0
    assert "--guidance-scale" in capsys.readouterr().out
    assert run("--model=digits", f"--out={tmp_path / 'a.json'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install torch" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --size or --model"),
        (["--size=SiT-B/2", "--model=digits"], "give either --size or --model"),
        (["--size=SiT-Q/2"], "unknown SiT size"),
        (["--model=digits", "--schedules=H1,"], "no steps"),
        (["--model=digits", "--schedules=E4"], "PyTorch's side has H, P and R"),
        (["--model=digits", "--batch-sizes=1,x"], "give numbers"),
        (["--model=digits", "--batch-sizes=0"], "--batch-sizes has 0"),
        (["--model=digits", "--rounds=0"], "--rounds has 0"),
        (["--model=digits", "--dtype=float16"], "--dtype"),
        (["--model=digits", "--guidance=none"], "--guidance"),
        (["--model=digits", "--compile=eager"], "--compile"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert run(*arguments, f"--out={tmp_path / 'a.json'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_sides_take_turns_and_every_other_round_goes_backwards():
    order = []

    def side(name):
        return lambda calls: order.append((name, calls)) or float(len(order))

    times = turns.take_turns({"a": side("a"), "b": side("b")}, 3, 3)
    assert order == [(name, 3) for name in "abbaab"]
    assert times == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


@pytest.mark.parametrize("wrong", [2.0, np.nan])
def test_sides_that_disagree_are_not_timed(wrong):
    class Same:
        def __init__(self, value):
            self.value = value

        def latents(self, noise, labels, plan):
            return np.full(noise.shape, self.value, np.float32)

    noise, labels = np.zeros((1, 2, 2, 4), np.float32), np.zeros(1, np.int32)
    job = turns.Job({"schedule": "H1"}, "H", np.array([0, 1]), ("none", 1.0), noise, labels)

    def library(value):
        return lambda name, dtype, how, noise, labels: Same(value).latents(noise, labels, None)

    found = turns.agreement(library(1.0), Same(1.0), job, "float32", plan=None)
    assert found == {"max_abs": 0, "relative_l2": 0}
    with pytest.raises(InputError, match="nothing is timed"):
        turns.agreement(library(wrong), Same(1.0), job, "float32", plan=None)


def test_images_that_disagree_are_not_timed():
    images = np.full((1, 2, 2, 3), 100, np.uint8)
    assert turns.image_agreement(images, images, "float32")["max_levels"] == 0
    assert turns.image_agreement(images, images + 3, "bfloat16")["mean_levels"] == 3
    with pytest.raises(InputError, match="nothing is timed"):
        turns.image_agreement(images, images - 1, "float32")


def test_the_table_shows_the_ratio_and_what_it_was_between():
    row = {
        "schedule": "H1P5R3",
        "batch_size": 4,
        "ms_per_image": {"jax": 250.0, "pytorch": 200.0},
        "ratio": 1.25,
        "ratio_range": [1.2, 1.375],
        "agreement": {
            "float32": {"relative_l2": 1e-7, "max_abs": 1e-6},
            "bfloat16": {"relative_l2": 1e-2, "max_abs": 0.25},
        },
    }
    last = "| H1P5R3 | 4 | 250.0 | 200.0 | 1.250 (1.200..1.375) | 1.0e-02, at most 2.5e-01 |"
    assert turns.table([row]).splitlines()[-1] == last


def test_a_model_that_the_other_side_does_not_state_is_refused(tmp_path):
    config = SiTConfig(**{**tiny.SIT, "num_classes": 0, "null_class": False})
    unconditional = {"predictor": config, "refiner": None, "class_names": (), "guidance": "none"}
    directory = save(tmp_path / "m", **unconditional)
    with pytest.raises(InputError, match="class-conditional"):
        JaxSide(tmp_path, None, str(directory), decode=False).open()
    with pytest.raises(InputError, match="no VAE"):
        JaxSide(tmp_path, None, "digits", decode=True).open()


def both_sides(model: Path, folder: Path, schedule: str, how: dict, decode: bool = False):
    """A function that samples with the library, one with PyTorch."""
    from benchmarks.torch_peer import Peer, Plan

    side = JaxSide(folder, None, str(model), decode)
    peer = Peer(side.open()["model"], "cpu", "float32", "none")
    how = {"schedule": schedule, "guidance_scale": 1.5, **how}
    noise, labels = side.start(3)
    parsed = Schedule.parse(schedule)
    steps = "".join(run.block * run.steps for run in parsed.runs)
    plan = Plan(steps, parsed.times(), *side.guidance(how))
    what = "images" if decode else "latents"
    return (
        getattr(side, what)("float32", how, noise, labels),
        getattr(peer, what)(noise, labels, plan),
    )


@WITH_TORCH
@pytest.mark.parametrize(
    ("schedule", "how"),
    [
        ("H1P2R3", {"guidance": "official"}),
        ("H1P2R3", {"guidance": "paired"}),
        ("P2H2R1P1@0.6", {"guidance": "official", "guidance_scale": 3.0}),
        ("P1R1H1", {"guidance": "paired", "guidance_scale": 1.0}),  # one branch
    ],
)
def test_pytorch_samples_the_same_latents(model, tmp_path, schedule, how):
    ours, theirs = both_sides(model, tmp_path, schedule, how)
    assert ours.shape == theirs.shape
    assert turns.distance(ours, theirs)["relative_l2"] < AGREED
    assert np.std(ours) > 0.1


@WITH_DIFFUSERS
@pytest.mark.filterwarnings("default")  # of diffusers' imports
def test_pytorch_shows_the_same_images(model, tmp_path):
    ours, theirs = both_sides(model, tmp_path, "H1", {"guidance": "official"}, decode=True)
    assert ours.shape == theirs.shape == (3, 16, 16, 3)
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1  # a level, where rounding tips
    assert difference.mean() < 0.01


@WITH_TORCH
@pytest.mark.slow
def test_the_command_writes_a_table_and_a_card_without_paths(model, tmp_path):
    out = tmp_path / "results.json"
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/torch_sit.py",
            f"--model={model}",
            "--schedules=H1P1R1",
            "--batch-sizes=2",
            "--guidance=paired",
            "--dtype=bfloat16",
            "--rounds=2",
            "--compile=none",
            f"--out={out}",
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| H1P1R1 | 2 |" in done.stdout
    text = out.read_text()
    assert str(model.parent) not in text
    report = json.loads(text)
    assert report["card"]["dtype"] == "bfloat16"
    assert report["card"]["torch_compile"] == "none"
    (row,) = report["rows"]
    assert row["agreement"]["float32"]["relative_l2"] < AGREED
    assert AGREED < row["agreement"]["bfloat16"]["relative_l2"] < turns.AGREEMENT["bfloat16"]
    assert row["ratio"] > 0
    assert len(row["rounds_ms_per_image"]["pytorch"]) == 2
    assert not [path for path in tmp_path.iterdir() if path != out]
