"""The folder of cached latents: its manifest, how it is written, resumed and verified."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_latents
from array_record.python import array_record_module

from flowturbo_jax import model_directory
from flowturbo_jax.data import latent_cache, latent_writer
from flowturbo_jax.data.latent_manifest import Manifest, Shard, pack, unpack
from flowturbo_jax.data.latent_writer import writing
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import VAEConfig

TESTS = Path(__file__).parent
SHA256 = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished cache, which nobody changes."""
    directory = tmp_path_factory.mktemp("caches") / "finished"
    tiny_latents.write(directory, unreadable=(6,))
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    """A finished cache of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def begin(plan: Manifest) -> list[int]:
    """Begins a cache, or goes on, and leaves it; returns which shards were missing."""
    with writing(plan, tiny_latents.params()) as writer:
        return writer.missing


def test_a_manifest_survives_its_file(finished):
    manifest = latent_cache.read_manifest(finished)
    assert dataclasses.replace(manifest, shards=()) == tiny_latents.plan(finished)
    assert manifest.directory == finished
    assert [shard.count for shard in manifest.shards] == [4, 3, 2]
    assert (manifest.count, manifest.unreadable) == (9, ("image 6",))
    stored = json.loads((finished / "manifest.json").read_text())
    assert (stored["count"], stored["latent_shape"]) == (9, [4, 4, 3])
    assert stored["shards"][2]["file"] == "latents-00002-of-00003.array_record"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_record_is_label_and_moments_in_little_endian(tmp_path, dtype):
    plan = tiny_latents.plan(tmp_path, moments_dtype=dtype)
    moments = tiny_latents.moments(plan, 5).astype(dtype)
    record = pack(plan, 1, moments)
    assert len(record) == plan.record_bytes
    assert record[:4] == b"\1\0\0\0"
    assert record[4:] == moments.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    label, back, states = unpack(plan, record)
    assert states is None
    assert (label.shape, label.dtype, int(label)) == ((), np.int32, 1)
    np.testing.assert_array_equal(back, moments)
    with pytest.raises(ValueError, match="bytes, not"):
        unpack(plan, record[:-1])
    with pytest.raises(ValueError, match="label is 2, of 2 classes"):
        unpack(plan, pack(plan, 2, moments))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": ""}, "source is ''"),
        ({"class_names": "even"}, "class_names must be a list"),
        ({"class_names": ("even", 1)}, "class_names must be a list"),
        ({"images": 0}, "images is 0; it must be a whole number from 1 on"),
        ({"images": -3}, "images is -3"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0"),
        ({"shard_size": True}, "shard_size is True"),
        ({"vae_fingerprint": "abc"}, "vae_fingerprint is 'abc'"),
        ({"vae_dtype": "float16"}, "vae_dtype is 'float16', not float32 or bfloat16"),
        ({"moments_dtype": ["float16"]}, "moments_dtype is"),
        ({"image_size": 9}, "image_size 9 is not divisible by 2"),
        ({"images": 10**6, "shard_size": 1}, "over 10000; take a larger shard_size"),
        ({"shards": (1,)}, "shards must be a list"),
        ({"shards": (Shard("../up", 4, 1, SHA256),)}, "'../up' is no shard"),
        (
            {"shards": (Shard("latents-00000-of-00003.array_record", 3, 1, SHA256),)},
            "has 3 images, and the rest is missing",
        ),
        (
            {"shards": 2 * (Shard("latents-00000-of-00003.array_record", 4, 1, SHA256),)},
            "not in its place",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        tiny_latents.plan(tmp_path, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "not of format 1"),
        ({"format": True}, "not of format 1"),
        ({"more": 1}, r"unknown \['more'\]"),
        ({"count": None}, r"missing \['count'\]"),
        ({"vae": []}, "vae must be an object"),
        ({"vae": {"in_channels": 3}}, "vae: it has the wrong keys"),
        ({"vae": {**dataclasses.asdict(VAEConfig()), "block_out_channels": None}}, "vae: "),
        ({"shards": {}}, "shards must be a list"),
        ({"shards": [7]}, "a shard must be an object"),
        ({"shards": [{"file": 1, "count": -1, "bytes": 1, "sha256": 1}]}, "a shard: "),
        ({"count": 8}, "its sha256 does not fit"),
        ({"class_names": ["even", "other"]}, "its sha256 does not fit"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_manifest_file_is_read_strictly(copy, change, message):
    path = copy / "manifest.json"
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    with pytest.raises(InputError, match=rf"cannot use .*manifest\.json: .*{message}"):
        latent_cache.read_manifest(copy)


@pytest.mark.usefixtures("as_users_run_it")
def test_no_byte_of_the_manifest_changes_unnoticed(copy):
    path = copy / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"manifest\.json"):
            latent_cache.verify(copy)


def test_the_fingerprint_follows_shards_and_vae(finished):
    manifest = latent_cache.read_manifest(finished)
    first, second, third = manifest.shards
    others = [
        dataclasses.replace(manifest, shards=(first, second)),
        dataclasses.replace(manifest, vae_fingerprint=SHA256),
        dataclasses.replace(
            manifest, shards=(first, second, dataclasses.replace(third, sha256=SHA256))
        ),
    ]
    assert len({m.fingerprint for m in (manifest, *others)}) == 4
    moved = dataclasses.replace(manifest, source="elsewhere", directory=Path("elsewhere"))
    assert moved.fingerprint == manifest.fingerprint


def test_a_whole_cache_verifies_and_counts_its_bytes(finished):
    read = []
    assert latent_cache.verify(finished, read.append) == []
    files = [path for path in finished.rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    uncounted = ("manifest.json", "vae.sha256")
    assert sum(read) == sum(size for path, size in sizes.items() if path.name not in uncounted)


def test_verify_finds_a_flipped_byte_in_every_file(copy):
    files = [path for path in copy.rglob("[!.]*") if path.is_file()]
    assert len(files) > 3 + 2 + 4  # shards, manifest.json and vae.sha256, and Orbax's
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            name = path.relative_to(copy).as_posix()
            if name == "manifest.json":
                with pytest.raises(InputError, match=name):
                    latent_cache.verify(copy)
                continue
            found = latent_cache.verify(copy)
            if name == "vae.sha256":  # in which a name may have changed
                assert found, place
            else:
                (line,) = found
                assert line.startswith(f"{name} is damaged"), line
        path.write_bytes(whole)
    assert latent_cache.verify(copy) == []


def test_verify_names_what_is_missing_extra_or_of_another_length(copy):
    names = [f"latents-0000{number}-of-00003.array_record" for number in range(3)]
    size = (copy / names[1]).stat().st_size
    (copy / names[0]).unlink()
    os.truncate(copy / names[1], size - 7)
    with (copy / names[2]).open("ab") as file:
        file.write(b"more")
    (copy / "notes.txt").write_text("mine")
    (copy / ".DS_Store").write_text("the system's")
    (copy / "vae" / "more").write_text("x")
    (copy / "vae" / "_METADATA").unlink()
    assert latent_cache.verify(copy) == [
        f"{names[0]} is missing; it holds images 0 to 3 of numbered",
        f"{names[1]} has {size - 7} bytes instead of {size}; it holds images 4 to 7 of numbered",
        f"{names[2]} has {size + 4} bytes instead of {size}; it holds images 8 to 9 of numbered",
        "vae/_METADATA is missing; it is part of the VAE",
        "vae/more is no part of the cache",
        "notes.txt is no part of the cache",
    ]


def test_another_vae_is_noticed_even_if_its_checksums_fit(copy):
    shutil.rmtree(copy / "vae")
    latent_writer._write_vae(copy, tiny_latents.params(1))
    (line,) = latent_cache.verify(copy)
    assert "not the one that made the latents" in line
    with pytest.raises(InputError, match="not the one that made the latents"):
        latent_cache.load_vae(copy, latent_cache.read_manifest(copy))


def test_the_vae_comes_back(finished):
    manifest = latent_cache.read_manifest(finished)
    params = latent_cache.load_vae(finished, manifest)
    assert model_directory.fingerprint(params) == manifest.vae_fingerprint
    np.testing.assert_array_equal(
        params["decoder"]["conv_in"]["kernel"],
        tiny_latents.params()["decoder"]["conv_in"]["kernel"],
    )


def test_a_cache_that_is_not_finished_or_none_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no cached latents at .*: it has no manifest.json; make"):
        latent_cache.read_manifest(tmp_path)
    begin(tiny_latents.plan(tmp_path))
    with pytest.raises(InputError, match="is not finished; run the same encode command again"):
        latent_cache.read_manifest(tmp_path)


def test_the_same_latents_make_the_same_bytes(finished, tmp_path):
    tiny_latents.write(tmp_path, unreadable=(6,))
    assert tiny_latents.contents(tmp_path) == tiny_latents.contents(finished)


def test_a_writer_killed_at_any_step_goes_on_to_the_same_bytes(tmp_path):
    """Whatever bears a final name stays untouched; 100 steps, half of them killed twice."""
    script = TESTS / "kill_latent_writer.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


def test_a_shard_whose_writing_fails_is_dropped_and_the_others_stay(tmp_path):
    plan = tiny_latents.plan(tmp_path)

    def stop_in_the_second_shard():
        with writing(plan, tiny_latents.params()) as writer:
            with writer.shard(0) as shard:
                for index in range(4):
                    shard.add(0, tiny_latents.moments(plan, index))
            with writer.shard(1) as shard:
                shard.add(0, tiny_latents.moments(plan, 4))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_in_the_second_shard()
    names = {path.name for path in tmp_path.iterdir()} - {"vae", "vae.sha256", ".lock"}
    assert names == {"unfinished.json", "latents-00000-of-00003.array_record"}


def test_lost_shards_and_a_lost_vae_are_made_again(copy, finished):
    shard = copy / "latents-00001-of-00003.array_record"
    shard.unlink()
    (copy / "vae" / "_METADATA").unlink()
    kept = (copy / "latents-00000-of-00003.array_record").stat().st_mtime_ns
    said = []
    with writing(tiny_latents.plan(copy), tiny_latents.params(), said.append) as writer:
        assert writer.missing == [1]
        assert not (copy / "manifest.json").exists()  # nobody opens it meanwhile
        tiny_latents.fill(writer, unreadable=(6,))
        writer.finish()
    assert said == [f"{copy}: 2 of 3 shards are finished, 1 that were are missing or cut"]
    assert latent_cache.verify(copy) == []
    assert tiny_latents.contents(copy) == tiny_latents.contents(finished)
    assert (copy / "latents-00000-of-00003.array_record").stat().st_mtime_ns == kept


def test_a_finished_cache_is_left_alone(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    with writing(tiny_latents.plan(copy), tiny_latents.params()) as writer:
        assert writer.missing == []
        assert writer.finish().count == 9
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source_fingerprint": "def"}, "the fingerprint of --data was abc, now it is def"),
        ({"image_size": 16}, "--image-size was 8, now it is 16"),
        ({"vae_fingerprint": SHA256}, "the fingerprint of --vae was .*, now it is 0123456789ab"),
        ({"vae_dtype": "bfloat16"}, "--dtype was float32, now it is bfloat16"),
        ({"moments_dtype": "float32"}, "--moments was float16, now it is float32"),
        ({"shard_size": 5}, "--shard-size was 4, now it is 5"),
        ({"batch_size": 4}, "--batch-size was 2, now it is 4"),
        (
            {"vae": dataclasses.replace(tiny_latents.CONFIG, scaling_factor=0.25)},
            r"the VAE's scaling_factor was 0\.5, now it is 0\.25",
        ),
    ],
)
def test_a_changed_request_is_refused_with_the_difference(copy, tmp_path, state, fields, message):
    if state == "unfinished":
        (copy / "manifest.json").rename(copy / "unfinished.json")
    before = tiny_latents.contents(copy)
    with pytest.raises(InputError, match=f"was begun by another command: .*{message}"):
        begin(tiny_latents.plan(copy, **fields))
    assert tiny_latents.contents(copy) == before


def test_what_has_no_finished_shard_may_be_begun_by_another_plan(tmp_path):
    assert begin(tiny_latents.plan(tmp_path)) == [0, 1, 2]
    assert begin(tiny_latents.plan(tmp_path, batch_size=4, vae_fingerprint=SHA256)) == [0, 1, 2]
    begun = latent_cache.read_manifest(tmp_path, "unfinished.json")
    assert (begun.batch_size, begun.vae_fingerprint) == (4, SHA256)


def test_another_plan_writes_its_own_vae(tmp_path):
    begin(tiny_latents.plan(tmp_path))
    sums = (tmp_path / "vae.sha256").read_text()
    other = jax.tree.map(lambda a: a + 1, tiny_latents.params())
    with writing(tiny_latents.plan(tmp_path, vae_fingerprint=SHA256), other):
        assert (tmp_path / "vae.sha256").read_text() != sums
    assert not latent_cache.vae_damage(tmp_path)


def test_images_that_lie_elsewhere_by_now_are_the_same_request(copy):
    plan = tiny_latents.plan(copy, source="folder:elsewhere")
    with writing(plan, tiny_latents.params()) as writer:
        assert writer.finish().source == "numbered"


def test_a_place_that_is_taken_is_refused_and_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("folder", "it holds mine.txt"), ("file", "is a file")):
        with pytest.raises(InputError, match=message):
            begin(tiny_latents.plan(tmp_path / name))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "mine.txt"]


def test_two_at_once_are_refused(tmp_path):
    plan = tiny_latents.plan(tmp_path)
    message = "another process is encoding to .*; let it finish"
    with writing(plan, tiny_latents.params()), pytest.raises(InputError, match=message):
        begin(plan)
    assert begin(plan) == [0, 1, 2]


def test_a_disk_too_small_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"the latents need 0\.00 GB at .*, and 0\.00 GB are free; make room"
    with pytest.raises(InputError, match=message):
        begin(tiny_latents.plan(tmp_path / "deep" / "cache"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "image_size"), [(1, 8), (300, 8), (300, 128)])
def test_the_estimate_of_the_disk_holds_what_is_written(tmp_path, count, image_size):
    plan = tiny_latents.plan(tmp_path, images=count, shard_size=count, image_size=image_size)
    with writing(plan, tiny_latents.params()) as writer:
        tiny_latents.fill(writer)
        (shard,) = writer.finish().shards
    estimate = latent_writer._shard_bytes(plan, 0)
    # At most the padding of three blocks, and 1.5 % where records are as large as ImageNet's.
    assert shard.bytes <= estimate <= 1.015 * shard.bytes + 3 * 2**16


def test_a_disk_that_fills_up_is_one_line_and_keeps_what_is_finished(tmp_path):
    """A limit on the size of files fails a write as a full disk does; the VAE is below it."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(TESTS)!r})
sys.path.insert(0, {str(TESTS.parent)!r})
from pathlib import Path
import tiny_latents
from flowturbo_jax.data.latent_writer import writing
from flowturbo_jax.interfaces import InputError
plan = tiny_latents.plan(Path({str(tmp_path)!r}), images=40, shard_size=20, image_size=64)
with writing(plan, tiny_latents.params()) as writer:
    with writer.shard(0) as shard:
        for index in range(20):
            shard.add(0, tiny_latents.moments(plan, index))
    size = writer.manifest.shards[0].bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    try:
        tiny_latents.fill(writer)
    except InputError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert re.search("cannot write .*File too large.*run the same command again", line)
    visible = {path.name for path in tmp_path.iterdir()} - {"vae", "vae.sha256"}
    assert visible == {".lock", "unfinished.json", "latents-00000-of-00002.array_record"}
    assert begin(tiny_latents.plan(tmp_path, images=40, shard_size=20, image_size=64)) == [1]


def test_records_that_a_library_lost_are_noticed(tmp_path, monkeypatch):
    class Forgetful:
        def __init__(self, path, options):
            self._writer, self.close = writer(path, options), lambda: self._writer.close()
            self._records = 0

        def write(self, record):
            self._records += 1
            if self._records != 3:
                self._writer.write(record)

    writer = array_record_module.ArrayRecordWriter
    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Forgetful)
    with pytest.raises(InputError, match="of 4 records 3 were stored"):
        tiny_latents.write(tmp_path)
    assert not list(tmp_path.glob("latents-*"))


def test_a_manifest_knows_its_sizes(tmp_path):
    imagenet = tiny_latents.plan(
        tmp_path,
        images=1_281_167,
        image_size=256,
        vae=VAEConfig(),
        shard_size=4096,
    )
    assert imagenet.latent_shape == (32, 32, 4)
    assert imagenet.record_bytes == 4 + 2 * 2 * 32 * 32 * 8
    assert imagenet.shard_count == 313
    assert imagenet.shard_file(7) == "latents-00007-of-00313.array_record"
    assert imagenet.shard_images(312) == range(312 * 4096, 1_281_167)
