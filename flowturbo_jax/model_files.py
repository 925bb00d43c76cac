"""The files of a model directory: their checksums, and how a folder is replaced as a whole."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flowturbo_jax.interfaces import InputError


def digest_of(directory: Path, config: Any) -> str:
    """sha256 over hyper-parameters and over names and contents of a folder's files.

    Hyper-parameters at their default do not count, so that a new one changes no old checksum.

    Args:
      directory: the folder.
      config: dataclass of the hyper-parameters; None for a folder that has none.
    """
    fields = () if config is None else dataclasses.fields(config)
    set_fields = {
        field.name: getattr(config, field.name)
        for field in fields
        if getattr(config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(set_fields, sort_keys=True).encode())
    # Files that begin with a dot are the operating system's, such as .DS_Store.
    files = [path for path in directory.rglob("[!.]*") if path.is_file()]
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def check_place(directory: Path) -> None:
    """Refuses a place where `save` could not write.

    Raises:
      InputError: something else than a model directory stands there, or it cannot be made.
    """
    directory = Path(directory).absolute()
    try:
        if directory.exists():
            if not (directory / "model.json").is_file():
                raise InputError(
                    f"{directory} exists and is no model directory; choose another place"
                )
        else:
            os.lstat(directory)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {directory}: {reason}; choose another place") from error
    parent = next(parent for parent in directory.parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise InputError(
            f"cannot write {directory}: {error.strerror} in {parent}; choose another place"
        ) from error


def replace(draft: Path, directory: Path) -> None:
    """Puts a draft in a directory's place; what stood there comes back if that fails."""
    if not directory.exists():
        os.replace(draft, directory)
        return
    retired = draft.with_name(f"{draft.name}-old")
    os.replace(directory, retired)
    try:
        os.replace(draft, directory)
    except BaseException:
        os.replace(retired, directory)
        raise
    shutil.rmtree(retired)
