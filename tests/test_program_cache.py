"""Stored programs: a second process neither traces nor compiles, and never loads a wrong one."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from flowturbo_jax import model_directory
from flowturbo_jax.commands import entry
from flowturbo_jax.models import SiT
from flowturbo_jax.pipelines import program_cache
from flowturbo_jax.pipelines.class_to_image import ClassToImage

ROOT = Path(__file__).parents[1]
FIRST_IMAGE = """
import json, sys
import jax, numpy as np
import flowturbo_jax as ft
from flowturbo_jax.pipelines import program_cache
events, said = [], []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
program_cache.enable(sys.argv[1])
pipe = ft.ClassToImage.load(sys.argv[2], say=said.append)
traced = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **given: traced.append(given.get("fun_name", "")))
images = np.asarray(pipe([1, 2], seeds=int(sys.argv[3]), schedule="H1P1R1"))
print(json.dumps({
    "images": images.tolist(), "said": said, "traced": traced,
    "hits": sum("cache_hits" in event for event in events),
    "misses": sum("cache_misses" in event for event in events),
}))
"""


def first_image(cache, model, seed=0):
    """What a fresh process says of its first images."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FIRST_IMAGE, str(cache), str(model), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache of its own for this process, off again afterwards."""
    monkeypatch.setattr(program_cache, "_imported", np.inf)  # somebody may be editing the source
    yield program_cache.enable(tmp_path / "cache")
    program_cache.enable("off")
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_compiled(tmp_path, model):
    first = first_image(tmp_path / "cache", model)
    second = first_image(tmp_path / "cache", model)
    other = first_image(tmp_path / "cache", model, seed=1)
    assert first["misses"] > 0
    assert second["misses"] == 0  # nothing was compiled, not even a small piece
    assert second["hits"] > 0
    assert "generate_images" not in " ".join(second["traced"])
    assert second["images"] == first["images"]
    assert other["misses"] == 0
    assert other["images"] != first["images"]
    assert first["said"][0] == "preparing H1P1R1 for a batch of 2 ..."
    assert "H1P1R1 for a batch of 2: ready after" in first["said"][1]


def test_images_of_a_stored_program_are_those_of_the_plain_one(kept, model):
    stored = np.asarray(ClassToImage.load(model)([1, 2, 3], seeds=4, schedule="H1P1R1"))
    again = np.asarray(ClassToImage.load(model)([1, 2, 3], seeds=4, schedule="H1P1R1"))
    assert len(list((kept / "programs").iterdir())) == 1
    program_cache.enable("off")
    plain = np.asarray(ClassToImage.load(model)([1, 2, 3], seeds=4, schedule="H1P1R1"))
    np.testing.assert_array_equal(stored, plain)
    np.testing.assert_array_equal(again, plain)


def test_whatever_the_program_depends_on_has_a_file_of_its_own(kept, model, tmp_path):
    def files(pipe, labels=(1, 2), **asked):
        before = set((kept / "programs").iterdir())
        pipe(list(labels), **{"schedule": "H1R1", **asked})
        return len(set((kept / "programs").iterdir()) - before)

    pipe = ClassToImage.load(model)
    assert files(pipe) == 1
    for change in (
        {"schedule": "H1R1@0.5"},
        {"schedule": "H1Rc1"},
        {"guidance": "official"},
        {"guidance": "none"},
        {"guidance_interval": (0.2, 0.8)},
        {"labels": (1, 2, 3)},
    ):
        assert files(pipe, **change) == 1, change
    for change in ({"seeds": 5}, {"guidance_scale": 3.0}, {"labels": (3, 4)}):
        assert files(pipe, **change) == 0, change
    assert files(ClassToImage.load(model, dtype="bfloat16")) == 1
    deeper = tiny.save_model(tmp_path / "deeper", num_heads=4)  # parameters of the same shapes
    assert files(ClassToImage.load(deeper)) == 1


def test_another_version_of_the_source_never_loads_this_ones(kept, model, monkeypatch):
    ClassToImage.load(model)([1], schedule="H1")
    monkeypatch.setattr(program_cache, "source_digest", lambda: "another")
    ClassToImage.load(model)([1], schedule="H1")
    assert len(list((kept / "programs").iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_program_is_made_anew(kept, model, damage, caplog):
    image = np.asarray(ClassToImage.load(model)([1], schedule="H1"))
    (file,) = (kept / "programs").iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped if damage is None else damage)
    np.testing.assert_array_equal(ClassToImage.load(model)([1], schedule="H1"), image)
    assert len(caplog.records) == 1
    np.testing.assert_array_equal(ClassToImage.load(model)([1], schedule="H1"), image)
    assert len(caplog.records) == 1  # it is whole again


def test_a_folder_that_cannot_be_written_turns_the_cache_off(tmp_path, model):
    (tmp_path / "file").write_text("")
    assert program_cache.enable(tmp_path / "file" / "cache") is None
    assert not program_cache.enabled()
    assert ClassToImage.load(model)([1], schedule="H1").shape == (1, 8, 8, 1)


def test_the_environment_says_where_and_off(tmp_path, monkeypatch, kept):
    monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / "here"))
    assert program_cache.enable() == tmp_path / "here"
    monkeypatch.setenv(program_cache.VARIABLE, "off")
    assert program_cache.enable() is None
    monkeypatch.delenv(program_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert program_cache.enable() == tmp_path / "xdg" / "flowturbo_jax"


def test_a_cache_that_jax_was_given_stays_where_it_is(kept, tmp_path):
    program_cache.enable("off")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    try:
        program_cache.enable(tmp_path / "other")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    finally:
        program_cache.enable("off")
        jax.config.update("jax_compilation_cache_dir", None)


def test_a_pipe_still_works_under_jit_with_the_cache_on(kept, model):
    pipe = ClassToImage.load(model)
    inside = jax.jit(lambda labels: pipe(labels, schedule="H1P1"))(jnp.array([1, 2]))
    np.testing.assert_array_equal(inside, pipe([1, 2], schedule="H1P1"))


def test_attention_of_a_loaded_model_is_chosen_and_of_a_trained_one_plain(model, monkeypatch):
    chosen = ("chosen", "by a test")
    monkeypatch.setattr(model_directory, "for_device", lambda *given: chosen)
    assert model_directory.load(model).predictor.attention == "chosen"
    built = model_directory.modules(tiny.description(), "bfloat16")
    assert built["predictor"].attention == "xla"


def stored(kept):
    return len(list((kept / "programs").iterdir()))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("jax_random_seed_offset", 7), ("jax_default_matmul_precision", "float32")],
)
def test_settings_of_jax_are_part_of_the_key(kept, model, setting, value):
    first = np.asarray(ClassToImage.load(model)([1], schedule="H1"))
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        second = np.asarray(ClassToImage.load(model)([1], schedule="H1"))
    finally:
        jax.config.update(setting, before)
    assert stored(kept) == 2
    assert np.any(first != second) == (setting == "jax_random_seed_offset")


def test_networks_of_others_are_compiled_and_not_stored(kept, model):
    class Mine(SiT):
        def __call__(self, x, t, condition):
            return -super().__call__(x, t, condition)

    loaded = model_directory.load(model)
    mine = dataclasses.replace(loaded, predictor=Mine(loaded.predictor.config))
    images = np.asarray(ClassToImage(mine)([1], schedule="H1"))
    assert stored(kept) == 0
    assert np.any(images != np.asarray(ClassToImage(loaded)([1], schedule="H1")))
    assert stored(kept) == 1


def test_source_that_changed_after_its_import_stores_nothing(kept, model, monkeypatch):
    monkeypatch.setattr(program_cache, "_imported", 0.0)
    assert program_cache.source_digest() is None
    assert ClassToImage.load(model)([1], schedule="H1").shape == (1, 8, 8, 1)
    assert stored(kept) == 0


def test_arguments_on_another_device_work_as_without_the_cache(kept, model):
    other = jax.devices()[-1]
    assert other != jax.devices()[0]
    pipe = ClassToImage.load(model)
    here = np.asarray(pipe([1, 2], schedule="H1", guidance_scale=2.0))
    pipe.params = jax.device_put(pipe.params, other)
    np.testing.assert_array_equal(pipe([1, 2], schedule="H1", guidance_scale=2.0), here)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_programs_are_stored_apart(kept, model, kind):
    plain = np.asarray(ClassToImage.load(model)([1, 2], schedule="H1"), np.int32)
    first, again = (
        np.asarray(ClassToImage.load(model, quantization=kind)([1, 2], schedule="H1"), np.int32)
        for _ in range(2)
    )
    assert stored(kept) == 2
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() < 64


def test_what_jax_cannot_store_is_compiled(kept, caplog):
    def talkative(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    made = program_cache.program(talkative, (jnp.ones(2),), {})
    np.testing.assert_array_equal(made(jnp.ones(2)), [2, 2])
    assert stored(kept) == 0
    assert "a program is not kept" in caplog.text


def test_a_folder_that_others_can_write_is_refused(tmp_path, caplog):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert program_cache.enable(tmp_path / "open") is None
    assert "others can write" in caplog.text
    program_cache.enable(tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    program_cache.enable("off")


def test_without_a_home_nothing_is_kept_and_nothing_fails(monkeypatch, caplog):
    monkeypatch.delenv(program_cache.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert program_cache.enable() is None
    assert "Could not determine home directory" in caplog.text


def test_off_and_failing_leave_jax_as_it_was(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    for last in ("off", "/proc/nowhere"):
        assert program_cache.enable(tmp_path / "a") == tmp_path / "a"
        assert program_cache.enable(tmp_path / "b") == tmp_path / "b"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "b" / "xla")
        assert program_cache.enable(last) is None
        assert not program_cache.enabled()
        assert jax.config.jax_compilation_cache_dir == before


def test_what_is_old_goes(tmp_path):
    program_cache.enable(tmp_path / "c")
    for part in ("programs", "xla"):
        for name, days in (("old", 100), ("new", 1)):
            file = tmp_path / "c" / part / name
            file.write_text("")
            os.utime(file, (time.time() - days * 86400,) * 2)
    program_cache.enable(tmp_path / "c")
    left = sorted(str(file.relative_to(tmp_path / "c")) for file in (tmp_path / "c").rglob("*w"))
    program_cache.enable("off")
    assert left == ["programs/new", "xla/new"]


def test_commands_keep_their_programs(monkeypatch, tmp_path):
    monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / "cache"))
    found = []
    with pytest.raises(SystemExit):
        entry.run(lambda argv: found.append(program_cache.enabled()), ["command"])
    assert found == [True]
