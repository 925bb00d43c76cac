"""Safetensors files made to mislead: their header is bounded before the library reads it."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import open_weights, safetensors_file


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "weights.safetensors"


def write(file: Path, header: bytes, data: int = 0) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, 8 + len(header) + data)


def test_a_large_header_is_refused_unread(file):
    write(file, b"{" + b" " * safetensors_file.MAX_HEADER)
    with pytest.raises(InputError, match="header has 16777217 bytes; at most 16777216 are read"):
        open_weights(file)


def test_many_tensors_are_refused_before_they_are_described(file, monkeypatch):
    save_file({f"w{i}": np.zeros(1, np.float32) for i in range(5)}, file)
    assert len(open_weights(file).tensors) == 5
    monkeypatch.setattr(safetensors_file, "MAX_TENSORS", 4)
    with pytest.raises(InputError, match="lists 5 tensors; at most 4 are read"):
        open_weights(file)


def test_a_tensor_larger_than_the_memory_is_refused(file):
    size = 1 << 46  # bytes; more than any machine has, and here no disk blocks lie below it
    header = '{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (size // 4, size)
    try:
        write(file, header.encode(), size)
    except OSError:
        size = 1 << 43  # the largest file of ext4 is 16 TiB
        header = '{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (size // 4, size)
        write(file, header.encode(), size)
    with pytest.raises(InputError, match=r"cannot read .*([Aa]llocate|does not fit in memory)"):
        open_weights(file).tensors["a"].read()


def test_a_file_that_changes_after_opening_is_refused(file):
    save_file({"w": np.zeros(4, np.float32)}, file)
    tensor = open_weights(file).tensors["w"]
    assert not tensor.read().any()
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\xff" * 4)
    os.utime(file, (0, 0))  # some file systems measure time coarsely
    with pytest.raises(InputError, match="changed after it was opened"):
        tensor.read()
