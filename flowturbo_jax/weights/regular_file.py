"""Opens files that a user or an index names: regular ones only, and the same one each time."""

import io
import os
import stat
from pathlib import Path
from typing import NamedTuple

from flowturbo_jax.interfaces import InputError

# Without O_NONBLOCK, opening a pipe waits for its writer. O_BINARY is Windows' alone.
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Stamp(NamedTuple):
    """What tells a file from another of its name, and from itself after a change."""

    device: int
    inode: int
    size: int
    modified: int  # nanoseconds


def open_regular(path: str | Path, expected: Stamp | None = None) -> io.BufferedReader:
    """Opens a file for reading; pipes, devices and folders are refused and never waited for.

    Args:
      path: the file.
      expected: what `stamp_of` said of the file when it was opened before, if it was.

    Raises:
      InputError: there is no such file, it is no regular one or cannot be read, or it changed.
    """
    try:
        return open_unnamed(path, expected)
    except InputError as error:
        raise InputError(f"cannot read {_shown(path)}: {error}") from error


def read_start(path: str | Path, size: int) -> bytes:
    """The first bytes of a file: all of it where it is shorter than `size`.

    Raises:
      InputError: as `open_regular`, or reading fails.
    """
    with open_regular(path) as file:
        try:
            return file.read(size)
        except OSError as error:
            raise InputError(f"cannot read {_shown(path)}: {error.strerror}") from error


def open_unnamed(path: str | Path, expected: Stamp | None = None) -> io.BufferedReader:
    """As `open_regular`, for callers that add the file's name to every message themselves."""
    try:
        descriptor = os.open(path, FLAGS)
    except OSError as error:
        raise InputError(f"{error.strerror}; check the name, and who may read it") from error
    except ValueError as error:  # a zero byte
        raise InputError("no file can have such a name") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file"
        raise InputError(f"{kind}; give a file that lies on a disk")
    file = os.fdopen(descriptor, "rb")
    if expected is not None and stamp_of(file) != expected:
        file.close()
        raise InputError("it changed after it was opened; start again")
    return file


def _shown(path: str | Path) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))


def stamp_of(file: io.BufferedReader) -> Stamp:
    """The stamp of an open file."""
    found = os.fstat(file.fileno())
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
