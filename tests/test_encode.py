"""python -m flowturbo_jax encode: what it caches, how it goes on, and what it refuses."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_latents
from PIL import Image

from flowturbo_jax import data, model_directory, parallel
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.commands import entry
from flowturbo_jax.data import latent_cache, latent_writer
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import VAE
from flowturbo_jax.pipelines import encoding

ROOT = Path(__file__).parents[1]
VAE_FOLDER = golden.FOLDER / "vae" / "tiny"  # of a factor 2
AUTOENCODER = encoding.Autoencoder(tiny_latents.CONFIG, tiny_latents.params())
OPTIONS = encoding.Options(batch_size=4, shard_size=6, moments="float32")
# Sums of some hundred float32 terms in another order, of moments about 10.
ROUNDING = 1e-4


class Images:
    """Images of random pixels by index, some of which cannot be read."""

    def __init__(self, count: int, shape=(8, 8, 3), unreadable: tuple[int, ...] = ()):
        self.count, self.shape, self.unreadable, self.read = count, shape, unreadable, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.unreadable:
            raise data.UnreadableError("it is torn")
        pixels = np.random.default_rng(index).uniform(-1, 1, self.shape).astype(np.float32)
        return {"data": pixels, "label": np.asarray(index % 2, np.int32)}

    def name(self, index):
        return f"image {index}"


def source(count=15, **options) -> data.DataSource:
    images = Images(count, **options)
    return data.DataSource("random", images, images.shape, tiny_latents.CLASSES, "abc")


def encode(out, images=None, options=OPTIONS, **callbacks):
    return encoding.encode(images or source(), AUTOENCODER, out, options, **callbacks)


def read(directory) -> list[data.Example]:
    examples = data.open_source(f"latents:{directory}").examples
    return [examples[index] for index in range(len(examples))]


def run(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        entry.run(package_main, ["command", *map(str, arguments)])
    return stop.value.code


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """15 images in shards of 6, encoded 4 at once."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    encode(directory)
    return directory


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 20 JPEG files of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(20):
        place = folder / ("cat" if index % 2 else "dog")
        place.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24 + index, 20)).save(place / f"{index:02d}.jpg")
    return folder


@pytest.fixture
def given(photos):
    return [f"--data=folder:{photos}", "--image-size=8", f"--vae={VAE_FOLDER}", "--batch-size=4"]


def test_cached_moments_are_those_of_the_image_and_of_its_mirror_image(cache):
    vae = VAE(AUTOENCODER.config)
    examples, images = read(cache), source().examples
    assert len(examples) == 15
    pixels = np.stack([images[index]["data"] for index in range(15)])
    for mirrored, x in enumerate((pixels, pixels[:, :, ::-1])):
        wanted = vae.apply({"params": AUTOENCODER.params}, jnp.asarray(x), method="encode")
        found = np.stack([example["moments"][mirrored] for example in examples])
        np.testing.assert_allclose(found, np.concatenate(wanted, axis=-1), atol=ROUNDING)
    assert [int(example["label"]) for example in examples] == [index % 2 for index in range(15)]
    # So the mirrored moments of the image would not have done.
    moments = examples[0]["moments"]
    assert np.abs(moments[0][:, ::-1] - moments[1]).max() > 0.1


def test_the_manifest_says_how_it_was_made(cache):
    manifest = latent_cache.read_manifest(cache)
    assert latent_cache.verify(cache) == []
    assert (manifest.source, manifest.source_fingerprint, manifest.images) == ("random", "abc", 15)
    assert (manifest.image_size, manifest.crop, manifest.latent_shape) == (8, "none", (4, 4, 3))
    assert (manifest.vae, manifest.class_names) == (tiny_latents.CONFIG, tiny_latents.CLASSES)
    assert (manifest.vae_dtype, manifest.moments_dtype) == ("float32", "float32")
    assert (manifest.shard_size, manifest.batch_size) == (6, 4)
    assert [shard.count for shard in manifest.shards] == [6, 6, 3]


def test_one_device_matches_four(cache, tmp_path, monkeypatch):
    assert len(jax.devices()) == 4
    alone = jax.devices()[:1]
    for name in ("map_batch", "replicate"):
        monkeypatch.setattr(parallel, name, partial(getattr(parallel, name), devices=alone))
    encode(tmp_path)
    for one, four in zip(read(tmp_path), read(cache), strict=True):
        np.testing.assert_allclose(one["moments"], four["moments"], atol=ROUNDING)
        assert one["label"] == four["label"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_batch_is_mapped_over_any_number_of_devices(count):
    devices = jax.devices()[:count]
    run = parallel.map_batch(lambda params, x: {"y": params["w"] * x, "n": x[:, 0]}, devices)
    params = parallel.replicate({"w": jnp.asarray([1.0, 2.0, 3.0])[None]}, devices)
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    result = run(params, x)
    np.testing.assert_array_equal(result["y"], x * [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(result["n"], x[:, 0])
    if count > 1:
        with pytest.raises(InputError, match="does not split over"):
            run(params, x[:7])


def test_half_precision_is_off_by_its_rounding(cache, tmp_path):
    options = dataclasses.replace(OPTIONS, dtype="bfloat16", moments="float16")
    manifest = encode(tmp_path, options=options)
    assert (manifest.vae_dtype, manifest.moments_dtype) == ("bfloat16", "float16")
    found, wanted = (np.stack([e["moments"] for e in read(place)]) for place in (tmp_path, cache))
    assert found.dtype == np.float16
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    # bfloat16 rounds to 2^-9 of a value; a dozen layers in a row add up to a few times that.
    assert 2**-11 < error < 10 * 2**-8


def test_images_that_cannot_be_read_are_left_out_named_and_counted(tmp_path, cache):
    said, shown = [], []
    options = dataclasses.replace(OPTIONS, unreadable_limit=0.3)
    manifest = encode(
        tmp_path,
        source(unreadable=(2, 13, 14, 12)),
        options,
        report=said.append,
        on_images=lambda done, total: shown.append((done, total)),
    )
    assert said == [f"cannot read image {index}: it is torn" for index in (2, 12, 13, 14)]
    assert manifest.unreadable == tuple(f"image {index}" for index in (2, 12, 13, 14))
    assert [shard.count for shard in manifest.shards] == [5, 6, 0]
    assert (shown[0], shown[-1]) == ((0, 15), (15, 15))
    assert shown == sorted(shown)
    kept = [example for index, example in enumerate(read(cache)) if index not in (2, 12, 13, 14)]
    for found, wanted in zip(read(tmp_path), kept, strict=True):
        np.testing.assert_allclose(found["moments"], wanted["moments"], atol=ROUNDING)
        assert found["label"] == wanted["label"]


def test_too_many_unreadable_images_end_it_and_keep_what_is_finished(tmp_path):
    options = dataclasses.replace(OPTIONS, unreadable_limit=0.1)
    images = source(unreadable=(3, 8))
    message = (
        r"2 of 15 images of random cannot be read, more than .* 0\.1 allows; the last: image 8.*; "
        r"raise --unreadable-limit to keep the finished files, or mend .* into another --out"
    )
    with pytest.raises(InputError, match=message):
        encode(tmp_path, images, options)
    first = tmp_path / "latents-00000-of-00003.array_record"
    written = first.stat().st_mtime_ns
    # Those of the finished shard still count.
    with pytest.raises(InputError, match=message):
        encode(tmp_path, images, options)
    images.examples.read.clear()
    shown = []
    manifest = encode(
        tmp_path,
        images,
        dataclasses.replace(OPTIONS, unreadable_limit=0.2),
        on_images=lambda *counts: shown.append(counts),
    )
    assert manifest.unreadable == ("image 3", "image 8")
    assert shown[0] == (6, 15)
    assert sorted(images.examples.read) == list(range(6, 15))
    assert first.stat().st_mtime_ns == written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_between_batches_and_the_same_command_goes_on(tmp_path, cache, number):
    def on_images(done, total):
        if done == 7:
            signal.raise_signal(number)

    said = []
    options = dataclasses.replace(OPTIONS, batch_size=4, shard_size=6)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, options=options, report=said.append, on_images=on_images)
    assert signal.getsignal(number) == before
    assert said == ["stopped: 2 of 3 shards are finished; the same command goes on"]
    assert not list(tmp_path.glob(".draft-*"))
    encode(tmp_path, options=options)
    assert tiny_latents.contents(tmp_path) == tiny_latents.contents(cache)


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_a_batch_that_does_not_fit_is_one_line(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(parallel, "map_batch", lambda _: fail)
    with pytest.raises(InputError, match=r"a batch of 4 images does not fit .* --batch-size"):
        encode(tmp_path)
    monkeypatch.undo()
    # Nothing was finished, so the folder may be used with another batch.
    encode(tmp_path, options=dataclasses.replace(OPTIONS, batch_size=8))


def test_a_finished_cache_reads_and_compiles_nothing(cache, monkeypatch):
    monkeypatch.setattr(parallel, "map_batch", None)
    images = source()
    said = []
    assert encode(cache, images, report=said.append).count == 15
    assert said == [f"{cache}: 3 of 3 shards are finished"]
    assert images.examples.read == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (8, 8, 1)}, r"images of 1 channel\(s\), and this VAE takes 3"),
        ({"shape": (8, 6, 3)}, "images of 8 x 6; they must be square"),
        ({"shape": (9, 9, 3)}, "9 pixels are not divisible by 2, the pixels per latent"),
        ({"count": 0}, "is empty"),
    ],
)
def test_images_that_this_vae_cannot_take_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        encode(tmp_path / "cache", source(**changes))
    assert list(tmp_path.iterdir()) == []


def test_latents_are_not_encoded_again(cache, tmp_path):
    latents = data.open_source(f"latents:{cache}")
    with pytest.raises(InputError, match="does not hold images"):
        encode(tmp_path / "again", latents)


def test_moments_that_are_not_finite_are_refused(tmp_path):
    params = jax.tree.map(lambda a: a * 1e4, AUTOENCODER.params)
    autoencoder = encoding.Autoencoder(AUTOENCODER.config, params)
    options = dataclasses.replace(OPTIONS, moments="float16")
    with pytest.raises(InputError, match=r"moments of image \d are not finite in float16; try"):
        encoding.encode(source(), autoencoder, tmp_path, options)


def test_a_label_without_a_class_is_refused(tmp_path):
    images = dataclasses.replace(source(), class_names=("even",))
    with pytest.raises(InputError, match="image 1 has label 1, but there are 1 classes"):
        encode(tmp_path, images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 10**11}, "batch_size is 100000000000; take a smaller --batch-size"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"shard_size": -1}, "shard_size is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"moments": "bfloat16"}, "moments are to be 'bfloat16'; they are stored in float16 or"),
        ({"unreadable_limit": float("nan")}, "unreadable_limit is nan"),
        ({"unreadable_limit": 1.5}, r"unreadable_limit is 1\.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        encoding.Options(**fields)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory with an autoencoder."""
    directory = tmp_path_factory.mktemp("models") / "model"
    described = tiny.description(False, in_channels=3, input_size=4, patch_size=2)
    described = dataclasses.replace(described, vae=tiny_latents.CONFIG)
    shapes = model_directory.abstract_params(model_directory.modules(described)["predictor"])
    predictor = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    model_directory.save(directory, described, predictor, None, tiny_latents.params())
    return directory


def test_the_vae_of_a_model_directory_is_read_without_its_predictor(model, tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    for name in ("model.json", "vae"):
        (place / name).symlink_to(model / name)
    config, params = encoding.read_autoencoder(str(place))
    assert config == tiny_latents.CONFIG
    fingerprint = model_directory.fingerprint(tiny_latents.params())
    assert model_directory.fingerprint(params) == fingerprint


def test_a_model_without_a_vae_and_a_folder_without_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="digits has no VAE"):
        encoding.read_autoencoder("digits")
    with pytest.raises(InputError, match="vae: "):
        encoding.read_autoencoder(str(tmp_path))


def test_the_command_encodes_a_folder_of_images(given, tmp_path, capsys):
    out = tmp_path / "cache"
    assert run("encode", *given, f"--out={out}", "--shard-size=8") == 0
    printed = capsys.readouterr()
    line = printed.out.strip()
    assert re.fullmatch(
        rf"wrote {out}: 20 images and their mirror images, in 3 files, 0\.\d MB in all; train on "
        rf"them with --config\.data=latents:{out}",
        line,
    )
    assert "20/20" in printed.err
    opened = data.open_source(line.rpartition("--config.data=")[2], 8)
    assert (len(opened.examples), opened.class_names) == (20, ("cat", "dog"))
    assert opened.latents.crop == "adm"
    assert data.batches(opened, 4, seed=0, flip=True)[0]["data"].shape == (4, *opened.shape)
    assert run("encode", f"--verify={out}") == 0
    assert capsys.readouterr().out == f"{out} is whole: 20 images in 3 files and the VAE\n"
    shard = out / "latents-00001-of-00003.array_record"
    os.truncate(shard, 100)
    shard.with_name("more").write_text("")
    assert run("encode", f"--verify={out}") == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{shard.name} has 100 bytes instead of 131072; it holds images 8 to 15 of "
        f"{opened.latents.source}",
        "more is no part of the cache",
    ]
    assert "error: 2 file(s) of" in printed.err.splitlines()[-1]


def test_the_command_names_what_it_cannot_read(given, photos, tmp_path, capsys):
    torn = photos / "cat" / "torn.jpg"
    torn.write_bytes(b"no image")
    try:
        out = tmp_path / "cache"
        assert run("encode", *given, f"--out={out}") == 2
        assert "1 of 21 images" in capsys.readouterr().err.splitlines()[-1]
        assert run("encode", *given, f"--out={out}", "--unreadable-limit=0.1") == 0
        printed = capsys.readouterr()
        assert "20 images and their mirror images, 1 left out" in printed.out
        assert f"cannot read {torn}: " in printed.err
        assert latent_cache.read_manifest(out).unreadable == (str(torn),)
    finally:
        torn.unlink()


def test_a_cache_inside_the_images_folder_is_refused(given, photos, capsys):
    for out in (photos, photos / "cat" / "cache"):
        assert run("encode", *given, f"--out={out}") == 2
        assert "the images' own folder; give another --out" in capsys.readouterr().err
    assert sorted(path.name for path in photos.iterdir()) == ["cat", "dog"]


def test_a_second_command_in_the_same_folder_is_refused(given, tmp_path, capsys):
    with latent_writer._lock(tmp_path):
        assert run("encode", *given, f"--out={tmp_path}") == 2
    assert "another process is encoding to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing; give --data, --vae and --out"),
        (["--data=digits"], "--vae is missing"),
        (["--data=digits", "--vae={vae}"], "--out is missing"),
        (["--data=", "--vae={vae}", "--out=x"], "--data is empty"),
        (["--data=digits", "--vae={vae}", "--out=x"], "digits has images of 1 channel"),
        (["--data=digits", "--vae=nowhere", "--out=x"], "vae: .*nowhere"),
        (["--data=nonsense", "--vae={vae}", "--out=x"], "unknown data set 'nonsense'"),
        (["--data={photos}", "--vae={vae}", "--out=x"], "give image_size"),
        (["--data={photos}", "--image-size=9", "--vae={vae}", "--out=x"], "9 pixels are not div"),
        (["--data={photos}", "--image-size=big", "--vae={vae}", "--out=x"], "image-size.*big"),
        (
            ["--data={photos}", "--image-size=8", "--vae={vae}", "--out=x", "--batch-size=6"],
            "batch_size 6 does not split over 4 devices",
        ),
        (["--data=digits", "--vae={vae}", "--out=x", "--dtype=float64"], "dtype is 'float64'"),
        (["--data=digits", "--vae={vae}", "--out=x", "--shard-size=0"], "shard_size is 0"),
        (["--verify=nowhere"], "no cached latents at nowhere"),
        (["--verify="], "--verify is empty"),
        (["--verify=x", "--out=y"], "--out means nothing to --verify"),
        (["--verify=x", "--batch-size=8"], "--batch-size means nothing to --verify"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["extra"], "unrecognized arguments: extra"),
    ],
)
def test_bad_input_is_one_clear_line(photos, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    names = {"photos": f"folder:{photos}", "vae": str(VAE_FOLDER)}
    assert run("encode", *(argument.format(**names) for argument in arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    # What was found of the VAE may be said before.
    assert [line for line in lines if not line.startswith("vae: 2 x smaller")] == lines[-1:]
    assert re.search(message, lines[-1]), lines[-1]
    assert list(tmp_path.iterdir()) == []


def finished_shards(directory: Path) -> dict[str, tuple[int, int]]:
    files = {path.name: path.stat() for path in directory.glob("latents-*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


@pytest.mark.slow
def test_a_command_killed_at_random_moments_goes_on_to_the_same_bytes(given, tmp_path):
    """Nothing is made twice. Steps of the writer are gone through in test_latent_cache.py."""
    arguments = [*given, "--shard-size=1", "--threads=1"]  # 20 shards, so that it takes a while
    assert run("encode", *arguments, f"--out={tmp_path / 'whole'}") == 0
    wanted = tiny_latents.contents(tmp_path / "whole")
    out, generator = tmp_path / "killed", random.Random(0)
    command = [sys.executable, "-m", "flowturbo_jax", "encode", *arguments, f"--out={out}"]
    start = partial(subprocess.Popen, cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
    kills = 0
    for enough in (0, 1, 5, 9):  # shards that must be there before it is killed
        before = finished_shards(out)
        with start(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and len(finished_shards(out)) < enough:
                time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.05) if enough else 2.0)
            process.kill()
        kills += process.returncode < 0
        after = finished_shards(out)
        assert {name: after[name] for name in before} == before
        assert all((out / name).read_bytes() == wanted[name] for name in after)
    assert kills >= 3
    before = finished_shards(out)
    assert run("encode", *arguments, f"--out={out}") == 0
    after = finished_shards(out)
    assert {name: after[name] for name in before} == before
    assert tiny_latents.contents(out) == wanted
    assert latent_cache.verify(out) == []
    assert not list(out.glob(".draft-*"))
