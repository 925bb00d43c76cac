"""latents:DIR: what is drawn from cached moments, what is refused, and what reading takes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_latents

from flowturbo_jax import data
from flowturbo_jax.data import latents
from flowturbo_jax.data.latent_writer import writing
from flowturbo_jax.interfaces import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("caches") / "cache"
    tiny_latents.write(directory, unreadable=(6,))
    return directory


@pytest.fixture
def copy(cache, tmp_path):
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def stored(source, index):
    """The moments of the image behind an example: image 6 was left out."""
    moments = tiny_latents.moments(source.latents, index + (index >= 6))
    return moments.astype(np.float16).astype(np.float32)


def test_a_source_says_what_it_is(cache):
    source = data.open_source(f"latents:{cache}", 8)
    assert isinstance(source.examples, data.Examples)
    assert (source.name, len(source.examples), source.shape) == (f"latents:{cache}", 9, (4, 4, 3))
    assert source.class_names == tiny_latents.CLASSES
    assert source.latents.vae == tiny_latents.CONFIG
    assert source.latents.directory == cache
    assert source.fingerprint == source.latents.fingerprint
    assert data.open_source(f"latents:{cache}").fingerprint == source.fingerprint


def test_examples_are_the_moments_that_were_written(cache):
    source = data.open_source(f"latents:{cache}")
    for index in range(9):
        example = source.examples[index]
        assert example["moments"].dtype == np.float16
        np.testing.assert_array_equal(example["moments"], stored(source, index))
        assert (example["label"].dtype, example["label"]) == (np.int32, (index + (index >= 6)) % 2)
    assert source.examples.name(4) == f"record 0 of {cache}/latents-00001-of-00003.array_record"
    for index in (-1, 9):
        with pytest.raises(IndexError):
            source.examples[index]


def test_draws_have_the_moments_mean_and_spread(cache):
    source = data.open_source(f"latents:{cache}")
    example, generator = source.examples[3], np.random.default_rng(0)
    count = 4000
    drawn = np.stack([source.draw(example, generator, False)["data"] for _ in range(count)])
    assert (drawn.shape, drawn.dtype) == ((count, 4, 4, 3), np.float32)
    mean, logvar = np.split(stored(source, 3)[0], 2, axis=-1)
    deviation = 0.5 * np.exp(logvar / 2)
    # Five standard errors: a mean's is deviation / sqrt(n), a spread's deviation / sqrt(2 n).
    error = np.abs(drawn.mean(0) - 0.5 * (mean - 0.25)) / deviation
    assert error.max() < 5 / np.sqrt(count)
    assert np.abs(drawn.std(0) / deviation - 1).max() < 5 / np.sqrt(2 * count)


@pytest.mark.parametrize("flip", [False, True])
def test_the_mirror_images_moments_are_taken_in_half_of_the_cases(cache, flip):
    source = data.open_source(f"latents:{cache}")
    moments = np.full((2, 4, 4, 6), -30.0, np.float32)  # no spread to speak of
    moments[0, ..., :3], moments[1, ..., :3] = 1.0, 2.0
    example = {"moments": moments, "label": np.asarray(1, np.int32)}
    generator = np.random.default_rng(0)
    drawn = [source.draw(example, generator, flip) for _ in range(400)]
    assert all(set(one) == {"data", "label"} and one["label"] == 1 for one in drawn)
    values = np.array([float(one["data"][0, 0, 0]) for one in drawn])
    mirrored = np.isclose(values, 0.5 * (2.0 - 0.25), atol=1e-5)
    assert np.isclose(values[~mirrored], 0.5 * (1.0 - 0.25), atol=1e-5).all()
    # Five standard deviations, sqrt(400) / 2 each, around the half.
    assert 150 < mirrored.sum() < 250 if flip else mirrored.sum() == 0


def test_batches_depend_on_seed_and_step_alone(cache):
    def batch(seed, step, **options):
        source = data.open_source(f"latents:{cache}")
        return data.batches(source, 6, seed, flip=True, **options)[step]

    first = batch(1, 2)
    assert set(first) == {"data", "label", "unreadable"}
    assert (first["data"].shape, first["data"].dtype) == ((6, 4, 4, 3), np.float32)
    again = batch(1, 2)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    parts = [batch(1, 2, part=(i, 2))["data"] for i in range(2)]
    np.testing.assert_array_equal(parts[0], first["data"][::2])
    np.testing.assert_array_equal(parts[1], first["data"][1::2])
    assert not np.array_equal(batch(2, 2)["data"], first["data"])
    streamed = data.stream(data.open_source(f"latents:{cache}"), 6, 1, flip=True, first_step=2)
    np.testing.assert_array_equal(next(streamed)["data"], first["data"])


def test_an_epoch_draws_other_noise_than_the_one_before(cache):
    source = data.open_source(f"latents:{cache}")
    batches = data.batches(source, 9, 0)
    sums = [np.sort(batches[step]["data"].sum((1, 2, 3))) for step in range(3)]
    assert len({tuple(values) for values in sums}) == 3


def test_a_damaged_record_is_unreadable_and_the_others_are_not(copy):
    path = copy / "latents-00001-of-00003.array_record"
    content = bytearray(path.read_bytes())
    record = tiny_latents.moments(tiny_latents.plan(copy), 5).astype(np.float16).tobytes()
    content[bytes(content).index(record) + 10] ^= 1
    path.write_bytes(content)
    source = data.open_source(f"latents:{copy}")
    with pytest.raises(data.UnreadableError, match="the shard is damaged or missing"):
        source.examples[5]
    for index in (4, 6, 7):
        np.testing.assert_array_equal(source.examples[index]["moments"], stored(source, index))
    unreadable = data.Unreadable(source, limit=0.2)
    said = [unreadable.note(data.batches(source, 9, 0)[step]["unreadable"]) for step in range(2)]
    assert len(said[0]) == 1
    assert "record 1 of" in said[0][0]
    assert said[1] == []


def test_a_shard_that_vanishes_while_training_is_unreadable(copy):
    source = data.open_source(f"latents:{copy}")
    (copy / "latents-00000-of-00003.array_record").unlink()
    with pytest.raises(data.UnreadableError, match="damaged or missing"):
        source.examples[0]
    assert source.examples[8]["label"] == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("open() failed: Too many open files; opening shard"),
        RuntimeError("pread() failed: Input/output error"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_failing_machine_ends_the_run(copy, monkeypatch, error):
    def fail(number):
        raise error

    source = data.open_source(f"latents:{copy}")
    monkeypatch.setattr(source.examples, "_reader", fail)
    with pytest.raises(InputError, match=r"cannot read record 0 of .*latents-00000.*; "):
        source.examples[0]


def test_few_files_are_open_at_once_and_any_thread_may_read(cache, monkeypatch):
    monkeypatch.setattr(latents, "MAX_OPEN", 1)
    source = data.open_source(f"latents:{cache}")
    wanted = [source.examples[index]["moments"] for index in range(9)]
    assert len(source.examples._readers) == 1
    order = np.random.default_rng(0).integers(9, size=2000)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda index: source.examples[int(index)]["moments"], order))
    assert all(np.array_equal(a, wanted[i]) for a, i in zip(read, order, strict=True))


@pytest.mark.parametrize(
    ("argument", "image_size", "message"),
    [
        ("", 0, "'latents:' needs the name of a folder"),
        ("{cache}", 16, "are of 8 pixel images, not 16; leave image_size out"),
        ("{cache}/nowhere", 0, r"no cached latents at .*nowhere"),
        ("{cache}/vae", 0, r"no cached latents at .*vae: it has no manifest\.json"),
    ],
)
def test_what_cannot_be_opened_is_refused(cache, argument, image_size, message):
    with pytest.raises(InputError, match=message):
        data.open_source(f"latents:{argument.format(cache=cache)}", image_size)


def test_an_unfinished_cache_is_refused(tmp_path):
    with writing(tiny_latents.plan(tmp_path), tiny_latents.params()):
        pass
    with pytest.raises(InputError, match="not finished; run the same encode command again"):
        data.open_source(f"latents:{tmp_path}")


def test_missing_and_cut_shards_are_refused_when_it_is_opened(copy):
    path = copy / "latents-00002-of-00003.array_record"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(InputError, match=f"{path.name} has {size - 1} bytes instead of {size}"):
        data.open_source(f"latents:{copy}")
    path.unlink()
    with pytest.raises(InputError, match=rf"cannot read .*{path.name}: No such file"):
        data.open_source(f"latents:{copy}")


def test_a_cache_without_images_is_refused(tmp_path):
    tiny_latents.write(tmp_path, unreadable=tuple(range(10)))
    with pytest.raises(InputError, match="no image could be read"):
        data.open_source(f"latents:{tmp_path}")


@pytest.mark.slow
def test_a_cache_of_imagenets_size_takes_little_memory(tmp_path):
    """1.28 million images in 313 shards, which are links to one; random access to all of them."""
    run = partial(subprocess.run, capture_output=True, text=True, cwd=ROOT)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "tests/read_latents.py", tmp_path]
    for steps in (0, 80):  # the first makes the cache
        done = run([*script, str(steps)], env=environment)
        assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["images"] >= 1_281_167
    assert measured["peak_bytes"] < 2e9  # 0.26e9 in fact, however many steps
