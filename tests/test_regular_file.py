"""Opening files by name: pipes, devices and folders are refused at once, changes are noticed."""

import os
from pathlib import Path

import pytest

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.json_file import read_json
from flowturbo_jax.weights.regular_file import open_regular, stamp_of
from flowturbo_jax.weights.safetensors_file import open_safetensors
from flowturbo_jax.weights.torch_file import open_torch_file


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


@pytest.mark.parametrize("opener", [open_regular, read_json, open_safetensors, open_torch_file])
def test_what_would_block_or_never_end_is_refused(tmp_path, opener):
    os.mkfifo(tmp_path / "pipe")
    wanted = {
        tmp_path / "pipe": "it is no regular file",
        tmp_path: "it is a folder",
        Path("/dev/zero"): "it is no regular file",
        tmp_path / "nothing": "No such file",
        tmp_path / ("long" * 1000): "File name too long",
        Path("a\0b"): "no file can have such a name",
    }
    for path, message in wanted.items():
        with pytest.raises(InputError, match=f"cannot read .*{message}") as caught:
            opener(path)
        assert str(caught.value).count("cannot read") == 1
        assert str(caught.value).isprintable() or "\0" in str(path)


def test_refusing_leaves_nothing_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(10):
        with pytest.raises(InputError, match="folder"):
            open_regular(tmp_path)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def test_a_file_that_is_no_longer_the_same_is_refused(file):
    with open_regular(file) as opened:
        stamp = stamp_of(opened)
    with open_regular(str(file), stamp) as opened:
        assert opened.read() == b"content"
    times = os.stat(file)
    for change in (
        lambda: file.write_bytes(b"longer content"),
        lambda: os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1)),
        lambda: replace(file, times),
    ):
        file.write_bytes(b"content")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        open_regular(file, stamp).close()
        change()
        with pytest.raises(InputError, match="it changed after it was opened"):
            open_regular(file, stamp)


def replace(file: Path, times: os.stat_result) -> None:
    """Puts another file of the same size and time in the place of one."""
    other = file.with_name("other")
    other.write_bytes(b"CONTENT")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)
