"""The benchmark beside diffusers' U-Net: its command, and, with it, that both sides agree."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text

from benchmarks import torch_unet, turns
from benchmarks.jax_side import SMALL, JaxSide, StatesToImage
from flowturbo_jax import (
    InputError,
    Schedule,
    TextToImage,
    convert,
)
from flowturbo_jax.commands import entry
from flowturbo_jax.models import family

ROOT = Path(__file__).parents[1]
WITH_DIFFUSERS = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "diffusers")),
    reason="torch or diffusers is not installed",
)
IMPORTS = pytest.mark.filterwarnings("default")  # diffusers' own warn
AGREED = 1e-5  # relative l2 of latents in float32: dozens of evaluations, 6e-8 by each rounding
# Head counts are no head sizes, and no two resolutions alike.
UNET = {
    "in_channels": 4,
    "block_out_channels": (16, 32),
    "attention_heads": (2, 8),
}


def run(*arguments: str) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as stop:
        entry.run(torch_unet.main, ["command", *arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of texts; no parameter is zero, so that every part shows."""
    return tiny_text.save(tmp_path_factory.mktemp("model") / "m", vae=False, **UNET)


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_help_and_a_clear_line_need_neither_torch_nor_diffusers(
    missing, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch_unet.torch_command, "installed", lambda name: name != missing)
    assert run("--help") == 0
    assert "--guidance-scale" in capsys.readouterr().out
    assert run(f"--out={tmp_path / 'a.json'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"pip install {missing}\n" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=SD 1.x U-Net", "--small"], "give one of --size, --model and --small"),
        (["--size=SD 1.x U-Net", "--model=m"], "give one of --size, --model and --small"),
        (["--size=SiT-XL/2"], "known are SD 1.x U-Net"),
        (["--schedules=H1,"], "no steps"),
        (["--schedules=E4"], "PyTorch's side has H, P and R"),
        (["--batch-sizes=1,x"], "give numbers"),
        (["--rounds=0"], "--rounds has 0"),
        (["--dtype=float16"], "--dtype"),
        (["--guidance=none"], "--guidance"),
        (["--out=."], "--out"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert run(f"--out={tmp_path / 'a.json'}", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_each_benchmark_refuses_the_models_of_the_other(model, tmp_path):
    with pytest.raises(InputError, match=r"torch_sit\.py"):
        JaxSide(tmp_path, None, "digits", decode=False, family="unet").open()
    with pytest.raises(InputError, match="class-conditional"):
        JaxSide(tmp_path, None, str(model), decode=False).open()


def test_acceleration_is_of_the_pairs_that_are_measured():
    def row(schedule, batch_size, jax, pytorch):
        ms = {"jax": jax, "pytorch": pytorch}
        return {"schedule": schedule, "batch_size": batch_size, "ms_per_image": ms}

    rows = [row("H1P2R2", 1, 9.0, 9.0), row("H1P2R2", 8, 3.0, 5.0), row("H4", 8, 4.0, 4.0)]
    rows += [row("H8", 8, 10.0, 10.0)]
    (found,) = torch_unet.acceleration(rows)
    assert found["saved_percent"] == {"jax": 25.0, "pytorch": -25.0, "paper": 34.5}
    last = "| H1P2R2 beside H4 | 8 | 25.0 % | -25.0 % | 34.5 % |"
    assert torch_unet.acceleration_table([found]).splitlines()[-1] == last


def test_the_schedules_measured_by_default_make_every_pair():
    row = {"batch_size": 8, "ms_per_image": {"jax": 1.0, "pytorch": 1.0}}
    rows = [{**row, "schedule": text} for text in torch_unet.SCHEDULES.split(",")]
    assert len(torch_unet.acceleration(rows)) == len(torch_unet.PAIRS)


@pytest.mark.parametrize("guidance", ["paired", "none"])
def test_given_states_are_sampled_as_the_text_encoders_own(model, guidance):
    pipe = TextToImage.load(model)
    tokens = pipe.tokens(["a red circle", "a blue cross"], ["", "a grey square"])
    encoder, params = pipe.model.text_encoder, pipe.model.text_encoder_params
    pairs = [encoder.apply({"params": params}, jnp.asarray(tokens[:, i])) for i in range(2)]
    noise = jax.random.normal(jax.random.key(0), (2, *pipe.model.description.predictor.shape))
    how = {"schedule": "H1P1R1", "guidance": guidance}
    ours = StatesToImage.load(model).sample_latents(noise, np.stack(pairs, axis=1), **how)
    theirs = pipe.sample_latents(noise, tokens, **how)
    assert turns.distance(np.asarray(ours), np.asarray(theirs))["relative_l2"] < AGREED


@pytest.fixture(scope="module")
def sides(model, tmp_path_factory):
    """The library and PyTorch, over the same weights."""
    from benchmarks.unet_peer import UNetPeer

    side = JaxSide(tmp_path_factory.mktemp("weights"), None, str(model), False, "unet")
    return side, UNetPeer(side.open()["model"], "cpu", "float32", "none")


def both(sides, schedule: str, how: dict, what: str = "latents"):
    """What the library samples and what PyTorch does."""
    from benchmarks.torch_peer import Plan

    side, peer = sides
    how = {"schedule": schedule, "guidance_scale": 1.5, **how}
    noise, states = side.start(2)
    parsed = Schedule.parse(schedule)
    steps = "".join(run.block * run.steps for run in parsed.runs)
    plan = Plan(steps, parsed.times(), *side.guidance(how))
    return (
        getattr(side, what)("float32", how, noise, states),
        getattr(peer, what)(noise, states, plan),
    )


@WITH_DIFFUSERS
@IMPORTS
@pytest.mark.parametrize(
    ("schedule", "how"),
    [
        ("H1P2R2", {"guidance": "paired"}),
        ("H1P2R2", {"guidance": "official", "guidance_scale": 3.0}),
        ("P1R1H1@0.6", {"guidance": "paired", "guidance_scale": 1.0}),  # one branch
    ],
)
def test_diffusers_samples_the_same_latents(sides, schedule, how):
    ours, theirs = both(sides, schedule, how)
    assert ours.shape == theirs.shape == (2, 8, 8, 4)
    assert turns.distance(ours, theirs)["relative_l2"] < AGREED
    assert np.std(ours) > 0.1


@WITH_DIFFUSERS
@IMPORTS
@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["paired", "official"])
@pytest.mark.parametrize("schedule", torch_unet.SCHEDULES.split(","))
def test_diffusers_samples_the_same_latents_by_every_schedule_measured(sides, schedule, guidance):
    ours, theirs = both(sides, schedule, {"guidance": guidance})
    assert turns.distance(ours, theirs)["relative_l2"] < AGREED


@WITH_DIFFUSERS
@IMPORTS
def test_diffusers_shows_the_same_images_of_the_small_model(tmp_path):
    from benchmarks.unet_peer import UNetPeer

    side = JaxSide(tmp_path, SMALL, None, decode=True, family="unet")
    peer = UNetPeer(side.open()["model"], "cpu", "float32", "none")
    ours, theirs = both((side, peer), "H1", {"guidance": "paired"}, "images")
    assert ours.shape == theirs.shape == (2, 64, 64, 3)
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1  # a level, where rounding tips
    assert difference.mean() < 0.01
    assert np.std(ours) > 10


@WITH_DIFFUSERS
@IMPORTS
def test_diffusers_takes_every_tensor_or_refuses():
    from benchmarks.unet_peer import TextUNet, torch

    described = tiny_text.description(**UNET, transformer_layers=2, linear_projection=True)
    for network in (described.predictor, described.refiner):
        params = tiny_text.random_params(family("unet").predictor(network))
        state = convert.state_from_params("unet", network, params)
        tensors = {name: torch.tensor(array) for name, array in state.items()}
        assert set(TextUNet(dataclasses.asdict(network), tensors).unet.state_dict()) == set(tensors)
        del tensors["conv_in.bias"]
        with pytest.raises(RuntimeError, match="Missing key"):
            TextUNet(dataclasses.asdict(network), tensors)


@WITH_DIFFUSERS
@pytest.mark.slow
def test_the_command_writes_tables_and_a_card(tmp_path):
    out = tmp_path / "results.json"
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/torch_unet.py",
            "--small",
            "--schedules=H4,H1P2R2",
            "--batch-sizes=2",
            "--dtype=bfloat16",
            "--decode",
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
    assert "| H1P2R2 | 2 |" in done.stdout
    assert "| H1P2R2 beside H4 | 2 |" in done.stdout
    report = json.loads(out.read_text())
    assert report["card"]["model"] == f"{SMALL}, random weights"
    assert report["card"]["dtype"] == "bfloat16"
    assert "diffusers" in report["card"]["versions"]
    for row in report["rows"]:
        assert row["agreement"]["float32"]["relative_l2"] < AGREED
        assert AGREED < row["agreement"]["bfloat16"]["relative_l2"] < turns.AGREEMENT["bfloat16"]
    (pair,) = report["acceleration"]
    assert pair["saved_percent"]["paper"] == 34.5
    assert not [path for path in tmp_path.iterdir() if path != out]
