"""Safetensors files made to mislead: their header is bounded before the library reads it."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import open_weights, safetensors_file


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "weights.safetensors"


def test_a_large_header_is_refused_unread(file):
    header = b"{" + b" " * safetensors_file.MAX_HEADER
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="header has 16777217 bytes; at most 16777216 are read"):
        open_weights(file)


def test_many_tensors_are_refused_before_they_are_described(file, monkeypatch):
    save_file({f"w{i}": np.zeros(1, np.float32) for i in range(5)}, file)
    assert len(open_weights(file).tensors) == 5
    monkeypatch.setattr(safetensors_file, "MAX_TENSORS", 4)
    with pytest.raises(InputError, match="lists 5 tensors; at most 4 are read"):
        open_weights(file)


class Memoryless:
    """Stands for the library where the memory is full."""

    def __init__(self, *args, **options):
        self.file = safe_open(*args, **options)
        self.keys, self.get_slice = self.file.keys, self.file.get_slice

    def get_tensor(self, name):
        raise MemoryError("Cannot allocate memory (os error 12)")


def no_memory(*_, **__):
    raise MemoryError("Cannot allocate memory (os error 12)")


def test_a_tensor_larger_than_the_memory_is_refused(file, monkeypatch):
    save_file({"w": np.zeros((2, 3), np.float32)}, file)
    monkeypatch.setattr(safetensors_file, "safe_open", Memoryless)
    with pytest.raises(InputError, match=r"shape '\(2, 3\)' and dtype float32 does not fit in mem"):
        open_weights(file).tensors["w"].read()
    monkeypatch.setattr(safetensors_file, "safe_open", no_memory)
    with pytest.raises(InputError, match="Cannot allocate memory"):
        open_weights(file)


def test_a_file_that_changes_after_opening_is_refused(file):
    save_file({"w": np.zeros(4, np.float32)}, file)
    tensor = open_weights(file).tensors["w"]
    assert not tensor.read().any()
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\xff" * 4)
    os.utime(file, (0, 0))  # some file systems measure time coarsely
    with pytest.raises(InputError, match="changed after it was opened"):
        tensor.read()
