"""A run's folder: one run at a time, and a place that can be written to."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowturbo_jax.interfaces import InputError

LOCK = ".lock"


@contextmanager
def reserved(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """Makes a run's folder and keeps other runs out of it, until it is left or the process ends.

    Args:
      workdir: the folder.
      flag: how a user names it.

    Raises:
      InputError: it cannot be written to, or another run has it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Never truncated before it is locked: it names who has it. The system unlocks it when the
        # process ends, however it does.
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise InputError(f"cannot write to {workdir}: {error.strerror}; change {flag}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise InputError(
                f"{workdir} is in use by {owner}; wait for it, stop it, or change {flag}"
            ) from error
        except OSError as error:
            raise InputError(
                f"cannot lock {workdir / LOCK}: {error.strerror}; take a {flag} on a disk whose "
                "files can be locked"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_training(workdir: Path) -> None:
    """Sees to it that a training run can write its results to its folder at the end.

    Raises:
      InputError: something else stands where they are to be.
    """
    model = workdir / "model"
    if model.exists() and not (model / "model.json").is_file():
        raise InputError(f"{model} exists and is no model directory; change --workdir")
    for name in ("checkpoints", "samples"):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise InputError(f"{workdir / name} is no folder; change --workdir")
    for draft in workdir.glob(".model-*"):  # of a run that was killed while it wrote its model
        shutil.rmtree(draft, ignore_errors=True)
