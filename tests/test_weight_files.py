"""Opening weights: the right part of any file, and one clear line for what is no weights file."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_file_writer as writer
from safetensors.numpy import save_file

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import open_weights, sha256_of
from flowturbo_jax.weights.kinds import LEGACY_TORCH

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
STATE = {"a": A, "b": B}
OTHER = {"a": -A, "b": -B}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "weights.pt"


def read(weights) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in weights.tensors.items()}


def assert_same(weights, wanted) -> None:
    found = read(weights)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("which", ["ema", "model"])
def test_a_plain_state_dict_is_taken_as_it_is(file, which):
    for state in (STATE, writer.Ordered(STATE, {"": {"version": 1}})):
        writer.save(file, state)
        weights = open_weights(str(file), which)
        assert_same(weights, STATE)
        assert (weights.origin, weights.arguments, weights.path) == ("", {}, file)


@pytest.mark.parametrize(
    ("parts", "which", "origin"),
    [
        ({"ema": STATE, "model": OTHER}, "ema", "ema"),
        ({"ema": OTHER, "model": STATE}, "model", "model"),
        ({"model": STATE, "state_dict": OTHER}, "ema", "model"),
        ({"ema": None, "model": STATE}, "ema", "model"),
        ({"state_dict": STATE}, "ema", "state_dict"),
        ({"state_dict": STATE, "epoch": 3}, "model", "state_dict"),
        ({"ema": STATE}, "ema", "ema"),
    ],
)
def test_the_part_asked_for_is_taken_of_a_training_checkpoint(file, parts, which, origin):
    writer.save(file, {**parts, "opt": {"state": {}}, "args": writer.Namespace({"seed": 1})})
    weights = open_weights(file, which)
    assert weights.origin == origin
    assert weights.arguments == {"seed": 1}
    assert_same(weights, STATE)


def test_a_part_that_is_not_there_is_refused(file):
    writer.save(file, {"ema": STATE, "opt": {}})
    with pytest.raises(InputError, match="has no 'model'; it has 'ema', 'opt'"):
        open_weights(file, "model")
    with pytest.raises(InputError, match="which is 'best'; it must be one of ema, model"):
        open_weights(file, "best")


def test_arguments_are_the_plain_fields(file):
    plain = {"lr": 1e-4, "name": "x", "size": 256, "on": True, "path": None, "betas": (0.9, 0.99)}
    other = {"nested": [[1]], "tensor": A, "dict": {"a": 1}, "long": list(range(2000))}
    for args in (writer.Namespace({**plain, **other}), {**plain, **other, 5: "no name"}):
        writer.save(file, {"model": STATE, "args": args})
        assert open_weights(file).arguments == plain
    writer.save(file, {"model": STATE, "args": "--seed 1"})
    assert open_weights(file).arguments == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([A], "holds a value of type list; save a state dict"),
        (5, "holds a value of type int"),
        ({}, "has nothing at the top"),
        (
            {"net": STATE, "step": 5},
            r"it has 'net', 'step' at the top; .*torch\.save\(torch\.load\(f, .*\)\['net'\], g\)",
        ),
        ({"ema": {}, "model": STATE}, "cannot take 'ema': .* no tensors .*: --weights model"),
        ({"ema": {"shadow": [A], "decay": 0.9}, "model": STATE}, "list under 'shadow'.*--weights"),
        ({"a": A, "c": writer.Call("builtins.complex", (1.0, 2.0))}, "type 'builtins.complex'"),
        ({f"k{i}": 0 for i in range(9)}, "'k4' and 4 more"),
        ({"model": {}}, "holds no tensors"),
        ({"model": {"net": STATE}}, "holds a value of type dict under 'net'"),
        ({"a": A, "step": 5}, "holds a value of type int under 'step'"),
        ({"a": A, 5: A}, "names a weight by a value of type int"),
        ({"a": A, "module.a": A}, "holds 'a' twice"),
    ],
)
def test_what_is_no_set_of_named_weights_is_refused(file, value, message):
    writer.save(file, value)
    with pytest.raises(InputError, match=message):
        open_weights(file)


def test_prefixes_of_wrappers_are_removed(file):
    names = {
        "module.blocks.0.w": "blocks.0.w",
        "_orig_mod.module._orig_mod.b": "b",
        "module.module.c": "c",
        "head._orig_mod.fc._orig_mod.w": "head.fc.w",
        "my_module.w": "my_module.w",
        "block.module.w": "block.module.w",
        "a_orig_mod.w": "a_orig_mod.w",
    }
    writer.save(file, dict.fromkeys(names, A))
    assert list(open_weights(file).tensors) == list(names.values())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights"])
def test_the_content_tells_the_format(tmp_path, name):
    file = tmp_path / name
    state = {
        **STATE,
        "half": np.array([1.5, -2]).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 2)),
        **{kind: np.array(1, kind) for kind in ("int64", "uint8", "bool", "uint32", "float64")},
    }
    save_file(state, file)
    weights = open_weights(file)
    assert_same(weights, state)
    for tensor in weights.tensors.values():
        first = tensor.read()
        assert (first.shape, first.dtype) == (tensor.shape, tensor.dtype)
        first[...] = 0  # an array of one's own
    assert_same(weights, state)
    writer.save(file, STATE)
    assert_same(open_weights(file), STATE)


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def zip_file(**records: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def numpy_file(save, *arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
FLOAT8 = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
OTHER_CONTENTS = {
    "empty": (b"", "is empty: the download failed"),
    "html": (b"\n<!DOCTYPE html><html>", "is a web page"),
    "html_upper": (b"\xef\xbb\xbf<HTML>", "is a web page"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
    "lfs": (LFS, "is a Git LFS pointer.*git lfs pull"),
    "legacy": (LEGACY_TORCH + b"\x80\x02M\xe9\x03.", r"before 1\.6.*torch\.save\(torch\.load\("),
    "pickle": (pickle.dumps({"a": 1}), "is a bare Python pickle"),
    "tar": (tar_file(), "is a tar archive"),
    "gzip": (gzip.compress(b"x"), "is compressed with gzip"),
    "npy": (numpy_file(np.save, A), "is a numpy array"),
    "npz": (numpy_file(np.savez, A), r"is a numpy \.npz file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "zip": (zip_file(readme=b"hello"), "a zip file that PyTorch did not write"),
    "no_records": (zip_file(), "is an empty zip file"),
    "json": (b'  {"a": 1}', "is a JSON file"),
    "text": (b"weights", "neither a PyTorch zip file nor a safetensors file.*b'weights'"),
    "cut_header": (struct.pack("<Q", 900) + HEADER, "its safetensors header or data are damaged"),
    "cut_data": (struct.pack("<Q", len(HEADER)) + HEADER + b"1234", "download was cut short"),
    "bad_header": (struct.pack("<Q", 6) + b'{"a":}', "its safetensors header"),
    "float8": (
        struct.pack("<Q", len(FLOAT8)) + FLOAT8 + b"12",
        "is of dtype F8_E4M3; read are F64",
    ),
}


@pytest.mark.parametrize("kind", OTHER_CONTENTS)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_other_kinds_of_file_are_named(tmp_path, kind, name):
    content, message = OTHER_CONTENTS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_weights(tmp_path / name)
    assert name in str(caught.value)
    assert str(caught.value).isprintable()  # so it is one line


def test_a_file_cut_short_is_refused(file):
    writer.save(file, STATE)
    whole = file.read_bytes()
    for length in range(4, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="was cut short"):
            open_weights(file)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no weights file at"):
        open_weights(tmp_path / "nothing.pt")
    with pytest.raises(InputError, match="there is no weights file at"):
        open_weights(tmp_path / ("long" * 1000))
    with pytest.raises(InputError, match="is a folder"):
        open_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"):
        open_weights(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nothing.pt", tmp_path / "pipe", "a\0b"):
        with pytest.raises(InputError, match="cannot read"):
            sha256_of(path)
    with pytest.raises(InputError, match="there is no weights file at"):
        open_weights("a\0b")


def test_sha256_is_that_of_the_whole_file(file):
    content = os.urandom(3_000_000)
    file.write_bytes(content)
    assert sha256_of(file) == hashlib.sha256(content).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory by what /proc says")
def test_damaged_and_hostile_files_do_no_harm():
    script = Path(__file__).with_name("fuzz_weights.py")
    command = [sys.executable, script, "--count", "4000", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4000 files" in done.stdout
