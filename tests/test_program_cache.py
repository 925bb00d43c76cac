"""Stored programs: a second process neither traces nor compiles, and never loads a wrong one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from flowturbo_jax import model_directory
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
def kept(tmp_path):
    """A cache of its own for this process, off again afterwards."""
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    yield program_cache.enable(tmp_path / "cache")
    program_cache.enable("off")
    for name, value in before.items():
        jax.config.update(name, value)
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
    assert first["said"][0] == "compiling H1P1R1 for a batch of 2 ..."
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
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    program_cache.enable(tmp_path / "other")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_a_pipe_still_works_under_jit_with_the_cache_on(kept, model):
    pipe = ClassToImage.load(model)
    inside = jax.jit(lambda labels: pipe(labels, schedule="H1P1"))(jnp.array([1, 2]))
    np.testing.assert_array_equal(inside, pipe([1, 2], schedule="H1P1"))


def test_attention_of_a_loaded_model_is_chosen_and_of_a_trained_one_plain(model):
    assert model_directory.load(model).predictor.attention in ("xla", "cudnn")
    built = model_directory.modules(tiny.description(), "bfloat16")
    assert built["predictor"].attention == "xla"
