"""Stability: right where velocities are known, resumable, and honest about refining."""

import dataclasses
import json
import os
import re
import xml.etree.ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from flowturbo_jax import guidance
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.commands import entry
from flowturbo_jax.commands import stability as command
from flowturbo_jax.interfaces import Flow, InputError
from flowturbo_jax.pipelines import stability
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.stability import Samples
from flowturbo_jax.pipelines.stability_rule import judge

STEPS = 8
DT = 1 / STEPS
T = np.arange(1, STEPS, dtype=np.float32) * DT
NOISE = np.asarray([[0.3, -1.2, 0.7], [1.5, 0.2, -0.4]], np.float32)
A, B, C = (np.asarray(v, np.float32) for v in ([1, 2, 2], [0, 3, -1], [2, 1, 0]))
ROUNDING = 1e-6 * STEPS**2  # of float32, in a second difference


def trace(velocity, refine=None):
    flow = velocity if isinstance(velocity, Flow) else Flow(velocity, refine)
    return jax.jit(lambda noise: stability.trace(flow, noise, STEPS))(jnp.asarray(NOISE))


def along_time(velocity):
    """A flow whose velocity is the same function of t everywhere."""
    return lambda x, t: jnp.broadcast_to(velocity(t)[None], x.shape)


def test_a_constant_velocity_has_no_curvature_and_can_be_kept():
    found = trace(along_time(lambda t: jnp.asarray(A)))
    np.testing.assert_array_equal(found.curvature, np.zeros((2, STEPS - 2)))
    np.testing.assert_array_equal(found.keep, np.zeros((2, STEPS - 1)))
    assert found.refine is None
    assert found.finite.shape == (2, STEPS)
    assert found.finite.all()


def test_no_velocity_at_all_counts_as_constant():
    found = trace(lambda x, t: jnp.zeros_like(x))
    np.testing.assert_array_equal(found.keep, np.zeros((2, STEPS - 1)))
    np.testing.assert_array_equal(found.curvature, np.zeros((2, STEPS - 2)))


def test_a_velocity_linear_in_time_is_straight_and_errs_by_its_slope_when_kept():
    found = trace(along_time(lambda t: A + B * t))
    np.testing.assert_allclose(found.curvature, 0, atol=ROUNDING)
    expected = DT * np.linalg.norm(B) / np.linalg.norm(A + B * T[:, None], axis=1)
    np.testing.assert_allclose(found.keep, np.stack([expected, expected]), rtol=1e-5)


def test_curvature_is_the_second_derivative_in_time_relative_to_the_velocity():
    found = trace(along_time(lambda t: A + B * t + C * t * t))
    t = T[:-1, None]  # the second difference of a parabola is exact
    expected = np.linalg.norm(2 * C) / np.linalg.norm(A + B * t + C * t * t, axis=1)
    np.testing.assert_allclose(found.curvature, np.stack([expected, expected]), atol=ROUNDING)


def test_velocities_are_those_along_the_euler_trajectory():
    found = trace(lambda x, t: x)  # Euler: v_{i+1} = (1 + dt) v_i
    np.testing.assert_allclose(found.keep, DT / (1 + DT), rtol=1e-5)
    np.testing.assert_allclose(found.curvature, 1 / (1 + DT), atol=ROUNDING)


def test_a_perfect_refiner_errs_by_nothing():
    def velocity(x, t):
        return x * jnp.cos(3 * t)

    found = trace(velocity, lambda x, t, v: velocity(x, t) - v)
    np.testing.assert_allclose(found.refine, 0, atol=1e-6)
    assert (found.keep > 1e-2).all()
    idle = trace(velocity, lambda x, t, v: jnp.zeros_like(v))
    np.testing.assert_allclose(idle.refine, idle.keep, rtol=1e-5)


def test_the_refiner_is_guided_as_in_sampling():
    scale, condition = 3.0, jnp.ones(2)

    def predictor(x, t, c):
        return jnp.broadcast_to(c[:, None], x.shape)

    def refiner(x, v, t, c):
        return jnp.where(c[:, None] == 0, 0.1, 0.0) * jnp.ones_like(x)

    found = trace(guidance.paired(predictor, refiner, condition, 0 * condition, scale))
    np.testing.assert_allclose(found.keep, 0)
    # The velocity is the scale, and the null branch's 0.1 enters times 1 - scale.
    np.testing.assert_allclose(found.refine, 0.1 * (scale - 1) / scale, rtol=1e-5)
    half = guidance.paired(predictor, refiner, condition, 0 * condition, scale, (0.0, 0.5))
    found = trace(half)
    # What P and R would start from behind the interval is the conditional velocity, which is right;
    # the velocities themselves jump.
    np.testing.assert_allclose(found.keep, 0)
    jump = (scale - 1) / scale * STEPS**2
    np.testing.assert_allclose(found.curvature.max(axis=1), jump * scale, rtol=1e-5)


def test_what_is_not_finite_is_known_by_sample_and_time():
    found = trace(lambda x, t: jnp.where((t > 0.6) & (x[:, :1] > 1), jnp.nan, 0 * x))
    np.testing.assert_array_equal(np.argwhere(~found.finite), [[1, 5], [1, 6], [1, 7]])
    with pytest.raises(InputError, match=r"velocity at t = 0\.625 is .* noise 3 of seed 7 .* 4;"):
        stability._refuse_not_finite(jax.device_get(found), 6, Samples(7, 8, (1, 4)), STEPS)


def test_the_program_does_not_grow_with_the_steps():
    flow = Flow(lambda x, t: x * t, lambda x, t, v: x)

    def equations(steps):
        return len(jax.make_jaxpr(lambda x: stability.trace(flow, x, steps))(NOISE).eqns)

    assert equations(5) == equations(50)


def test_labels_are_spread_over_all_classes_or_named(monkeypatch):
    digits, none = tiny.description(), tiny.description(refiner=False, num_classes=0)
    monkeypatch.setattr(tiny, "NAMES", tuple(f"class {i}" for i in range(1000)))
    many = tiny.description(num_classes=1000)
    assert stability.choose_labels(digits) == tuple(range(10))
    assert stability.choose_labels(many) == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert stability.choose_labels(none) == (0,)
    assert stability.choose_labels(digits, "seven, 2,7") == (7, 2)
    with pytest.raises(InputError, match=r"no classes: use label 0"):
        stability.choose_labels(none, "1")


@pytest.mark.parametrize(
    ("refine", "limit", "better", "safe", "words"),
    [
        ((1, 1, 1, 1), 0.05, (0.2, 0.8), (0.2, 0.8), "is safe from t = 0.2 on"),
        (
            (9, 9, 2, 3),
            0.05,
            (0.6, 0.8),
            (0.6, 0.8),
            "t = 0.6 on.*than 5 %.*0.8 it errs 3.0 %",
        ),
        ((3, 3, 3, 2), 0.025, (0.2, 0.8), (0.8, 0.8), r"0.8 on.*\(less than .* t = 0.2 on\)"),
        ((1, 1, 3, 3), 0.02, (0.2, 0.8), None, r"t = 0.2 on, but.*\(only from t = 0.2 to 0.4\)"),
        ((1, 3, 1, 3), 0.02, (0.2, 0.8), None, r"only at t = 0.2 and at t = 0.6\)"),
        ((3, 3, 3, 3), 0.01, (0.2, 0.8), None, "in no range up to t = 1 also less than 1 % of"),
        ((1, 1, 1, 5), 0.05, None, None, "errs no less than keeping in any range.* 5.0 %.* 4.0 %"),
    ],
)
def test_the_rule_wants_less_than_keeping_and_than_the_threshold_up_to_the_end(
    refine, limit, better, safe, words
):
    t, keep = [0.2, 0.4, 0.6, 0.8], [0.04] * 4
    verdict = judge(t, keep, [value / 100 for value in refine], limit)
    assert verdict[:2] == (better, safe)
    assert re.search(words, verdict.sentence), verdict.sentence


def test_without_a_refiner_the_rule_is_about_keeping():
    t, keep = [0.2, 0.4, 0.6, 0.8], [0.01, 0.01, 0.09, 0.02]
    assert "5 % of |v| from t = 0.2 to 0.4 and at t = 0.8." in judge(t, keep, None, 0.05).sentence
    assert "0.5 % of |v| at no t." in judge(t, keep, None, 0.005).sentence


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def request_of(model_dir):
    pipe = ClassToImage.load(model_dir)
    plan, samples = pipe.plan("E5"), Samples(3, 5, (0, 4, 9))
    return pipe.model, plan, samples, stability.describe(pipe, plan, samples)


def measure(request_of, work, batch_size=8, on_images=max):
    model, plan, samples, card = request_of
    rows = stability.open_rows(work, card)
    return stability.measure(model, plan, samples, rows, batch_size=batch_size, on_images=on_images)


def test_numbers_depend_on_neither_batch_size_nor_interruption(request_of, tmp_path):
    whole = measure(request_of, tmp_path / "whole")
    assert {name: a.shape for name, a in whole.items()} == {
        "curvature": (15, 3),
        "keep": (15, 4),
        "refine": (15, 4),
    }
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(request_of, tmp_path / "parts", on_images=stop)
    again = measure(request_of, tmp_path / "parts", on_images=lambda *done: seen.append(done))
    assert seen == [(0, 15), (8, 15), (8, 15), (15, 15)]
    small = measure(request_of, tmp_path / "small", batch_size=4)
    for name, expected in whole.items():
        np.testing.assert_array_equal(again[name], expected)
        # Another batch size adds up in another order.
        np.testing.assert_allclose(small[name], expected, rtol=1e-4)


def test_each_sample_is_its_noise_under_its_label(request_of, tmp_path):
    model, plan, samples, card = request_of
    whole = measure(request_of, tmp_path / "whole")
    one = samples._replace(labels=(4,))
    alone = measure((model, plan, one, card | {"labels": [4]}), tmp_path / "alone")
    np.testing.assert_allclose(alone["refine"], whole["refine"][1::3], rtol=1e-4)
    assert samples.name(4) == "noise 1 of seed 3 under label 4"


def test_weights_that_are_not_finite_are_refused(request_of, tmp_path):
    model, *others = request_of
    broken = dataclasses.replace(
        model, predictor_params=jax.tree.map(lambda a: a * np.nan, model.predictor_params)
    )
    with pytest.raises(InputError, match=r"t = 0 is not finite, of noise 0 .* label 0; look at"):
        measure((broken, *others), tmp_path)
    broken = dataclasses.replace(
        model, refiner_params=jax.tree.map(lambda a: a * np.nan, model.refiner_params)
    )
    with pytest.raises(InputError, match=r"the refined velocity at t = 0\.2 is not finite"):
        measure((broken, *others), tmp_path)


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        entry.run(package_main, ["command", "stability", *map(str, arguments)])
    return stop.value.code


SMALL = ("--noises=2", "--steps=4", "--labels=3,seven")


def test_the_command_writes_numbers_and_pictures(model_dir, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run(model_dir, f"--out={out}", "--guidance-scale=2", *SMALL) == 0
    written = sorted(name for name in os.listdir(out) if not name.startswith("."))
    assert written == ["stability.json", "stability.png", "stability.svg"]
    result = json.loads((out / "stability.json").read_text())
    card = result["card"]
    assert (card["steps"], card["dt"], card["noises"], card["labels"]) == (4, 0.25, 2, [3, 7])
    assert (card["guidance"], card["guidance_scale"], card["seed"]) == ("paired", 2.0, 0)
    assert {"device", "versions", "predictor_sha256", "refiner_sha256", "dtype"} <= card.keys()
    assert result["t"] == [0, 0.25, 0.5, 0.75]
    assert result["curvature"]["t"] == [0.25, 0.5]
    for name, count in (("curvature", 2), ("keep", 3), ("refine", 3)):
        curve = result[name]
        assert [len(curve[key]) for key in ("t", "mean", "std", "q10", "q90")] == [count] * 5
        assert all(a <= b for a, b in zip(curve["q10"], curve["q90"], strict=True))
    printed = capsys.readouterr().out
    assert result["sentence"] in printed
    assert "| 0.25 | " in printed
    with Image.open(out / "stability.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    svg = xml.etree.ElementTree.parse(out / "stability.svg")
    assert svg.getroot().tag.endswith("}svg")


def test_a_second_run_writes_the_same_files(model_dir, tmp_path):
    for name in ("a", "b"):
        assert run(model_dir, f"--out={tmp_path / name}", *SMALL) == 0
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_without_a_refiner_is_measured_without_one(tmp_path, capsys):
    model_dir = tiny.save_model(tmp_path / "m", refiner=False)
    assert run(model_dir, f"--out={tmp_path}", "--guidance=none", "--dtype=bfloat16", *SMALL) == 0
    result = json.loads((tmp_path / "stability.json").read_text())
    assert result["refine"] is None
    printed = capsys.readouterr().out
    assert "This model has no refiner to measure" in printed
    assert "warning: the curvature has the rounding of bfloat16 in it" in printed


def test_a_flow_without_curvature_can_be_drawn():
    measured = {"curvature": np.zeros((3, 2)), "keep": np.zeros((3, 3))}
    card = {"steps": 4, "dt": 0.25, "samples": 3, "noises": 3, "labels": [0], "guidance": "none"}
    result, verdict = command.report(card, measured, 0.05)
    assert command.draw(result, verdict).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=2"], "--steps is 2; it must lie between 3 and 1000"),
        (["--noises=0"], "--noises is 0"),
        (["--batch-size=0"], "--batch-size is 0"),
        (["--seed=-1"], "--seed is -1"),
        (["--safe-below=0"], "--safe-below is 0; it is a fraction"),
        (["--safe-below=nan"], "--safe-below is nan"),
        (["--labels=eleven"], "no class is called 'eleven'"),
        (["--labels=3,10"], "label 10 is out of range; this model has the classes 0 to 9"),
        (["--guidance=strong"], "guidance is 'strong'"),
        (["--guidance=none", "--guidance-scale=2"], "guidance 'none' has no scale"),
        (["--guidance-interval=0.8:0.1"], "must rise within"),
        (["--dtype=int8"], "dtype is 'int8'"),
        (["--steps=x"], "invalid int value"),
    ],
)
def test_bad_input_is_one_clear_line(model_dir, tmp_path, capsys, arguments, message):
    assert run(model_dir, f"--out={tmp_path / 'out'}", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_line(model_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert run(model_dir, f"--out={out}", *SMALL) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot write to" in line
        assert line.endswith("choose another --out")
    assert (tmp_path / "file").read_text() == "in the way"
