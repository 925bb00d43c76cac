"""The file that a long command writes: it can be written, and by one process at a time."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flowturbo_jax.interfaces import InputError


def named(text: str) -> Path:
    """The file that --out names, links followed, so that a file has one name.

    Raises:
      InputError: it is something else than a file.
    """
    out = Path(os.path.realpath(os.path.expanduser(text)))
    if not text or os.path.isdir(out):
        raise InputError(f"--out is {text!r}, a folder; it must name a file")
    if os.path.exists(out) and not os.path.isfile(out):
        raise InputError(f"--out is {text!r}, which is no regular file")
    return out


def check_folder(text: str) -> None:
    """Refuses a folder that nothing can be written into, before what is to go there is made.

    Nothing is left behind, and the folder itself is not made.

    Raises:
      InputError: it is a file or lies in one, or there is no right to write.
    """
    folder = Path(text).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError(f"cannot write to {folder}: {there} is no folder; change config.out")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; change config.out"
        ) from error


def work_folder(out: Path) -> Path:
    """Where what an interruption must not lose is kept, beside the file."""
    return out.with_name(f".{out.name}.work")


@contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Makes the file's folder and keeps other commands from writing the file.

    Args:
      out: of `named`.

    Raises:
      InputError: nothing can be written there, or another process is at it.
    """
    lock = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(lock)
    except BlockingIOError as error:
        raise InputError(
            f"{out} is in use by {_owner(lock)}; wait for it, stop it, or choose another --out"
        ) from error
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    with file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()  # while it is locked, so that nobody else's goes


def _locked(lock: Path) -> BinaryIO:
    """The open lock file, empty. The system unlocks it when the process ends, however it does."""
    while True:
        file = lock.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                file.truncate(0)
                return file
        except OSError:
            file.close()
            raise
        file.close()  # of a process that was just done, and has removed it


def _owner(lock: Path) -> str:
    try:
        return lock.read_text(errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def replace(out: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
      InputError: it cannot be written.
    """
    draft = out.with_name(f".{out.name}.draft")
    try:
        draft.write_text(text)
        os.replace(draft, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    finally:
        with suppress(OSError):
            draft.unlink()
