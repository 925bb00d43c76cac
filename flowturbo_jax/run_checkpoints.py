"""The checkpoints of a training run: whole or not there, checked byte by byte before they are used.

    DIR/STEP/state/           the state, as Orbax writes it
    DIR/STEP/config.json      what a run must agree with to continue
    DIR/STEP/checksums.json   size and sha256 of every other file, and of this table

A checkpoint is written under a name that begins with a dot and renamed when it is whole, so that a
run that is killed while it saves leaves the one before untouched.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flowturbo_jax.checkpoint import load_params, remove_draft, save_params
from flowturbo_jax.interfaces import InputError

CHECKSUMS, CONFIG, STATE = "checksums.json", "config.json", "state"
DAMAGED = "damaged-"


class Checkpoints:
    """The checkpoints of one training run, of which the newest few stay.

    Only one process may use a directory at a time. What an interrupted run left half-written is
    removed, and so is the rest of an old checkpoint that was being deleted.

    Args:
      directory: where they live; made when the first is saved.
      keep: how many of the newest stay.
      report: takes a line about each damaged checkpoint that is passed over.
    """

    def __init__(self, directory: Path, keep: int = 2, report: Callable[[str], Any] = print):
        self._directory, self._keep = Path(directory).absolute(), keep
        for leftover in self._directory.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._latest = self._newest_whole(report)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None where there is none."""
        return self._latest

    def save(self, step: int, state: Any, config: dict[str, Any]) -> None:
        """Saves a pytree of arrays, and the run's configuration beside it.

        Args:
          step: of the state; one that is saved already is not saved again.
          state: the pytree.
          config: anything JSON holds.

        Raises:
          InputError: the disk is full or cannot be written to; what was saved before is kept.
        """
        if step == self._latest:
            return
        draft = self._directory / f".{step}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._check_space(state)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            save_params(draft / STATE, dict(_named_leaves(state)))
            (draft / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True))
            checksums = {str(path.relative_to(draft)): _checksum(path) for path in _files(draft)}
            table = {"files": checksums, "sha256": _digest(checksums)}
            (draft / CHECKSUMS).write_text(json.dumps(table, indent=1))
            _synchronise(draft)
            os.replace(draft, self._directory / str(step))
            _synchronise(self._directory)
        except (OSError, ValueError) as error:  # Orbax reports a full disk as a ValueError
            remove_draft(draft)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"cannot save the checkpoint of step {step} to {self._directory}: {reason:.300}; "
                f"{self.kept()}; once this is mended, the same command continues from there"
            ) from error
        self._latest = step
        self._prune()

    def kept(self) -> str:
        """What is there to go on from, in words."""
        if self._latest is None:
            return "no checkpoint was saved"
        return f"the checkpoint of step {self._latest} is kept"

    def config(self) -> dict[str, Any]:
        """The configuration saved with the newest whole checkpoint."""
        return json.loads((self._directory / str(self._latest) / CONFIG).read_text())

    def state(self, like: Any) -> Any:
        """The newest whole checkpoint's pytree, as numpy arrays.

        Args:
          like: a pytree of arrays with the same structure, shapes and dtypes.

        Raises:
          InputError: the checkpoint is of another shape than `like`.
        """
        names = [name for name, _ in _named_leaves(like)]
        wanted = dict(_named_leaves(jax.tree.map(_shape_of, like)))
        leaves = load_params(self._directory / str(self._latest) / STATE, wanted)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names])

    def _newest_whole(self, report: Callable[[str], Any]) -> int | None:
        """Step of the newest checkpoint without a fault; newer ones with a fault are set aside."""
        faults = {}
        for step in self._steps():
            faults[step] = find_fault(self._directory / str(step))
            if faults[step] is None:
                break
        else:
            if faults:
                step, fault = next(iter(faults.items()))
                raise InputError(
                    f"no checkpoint in {self._directory} is whole (of {step}, {fault}); restore a "
                    "copy of one, remove them to begin anew, or choose another --workdir"
                )
            return None
        for damaged in faults.keys() - {step}:
            aside = self._directory / f"{DAMAGED}{damaged}"
            try:
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self._directory / str(damaged), aside)
            except OSError as error:
                raise InputError(
                    f"the checkpoint of step {damaged} is damaged ({faults[damaged]}), and cannot "
                    f"be set aside: {error.strerror}; move it away"
                ) from error
            report(
                f"the checkpoint of step {damaged} is damaged ({faults[damaged]}); it is now "
                f"{aside}, and that of step {step} is used"
            )
        return step

    def _steps(self) -> list[int]:
        """The steps there are checkpoints of, newest first."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        return sorted(
            (int(name) for name in names if name.isdecimal() and str(int(name)) == name),
            reverse=True,
        )

    def _prune(self) -> None:
        for step in self._steps()[self._keep :]:
            retired = self._directory / f".old-{step}"  # removed at the next start, if not now
            os.replace(self._directory / str(step), retired)
            shutil.rmtree(retired, ignore_errors=True)

    def _check_space(self, state: Any) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if (free := shutil.disk_usage(self._directory).free) < needed:
            raise OSError(f"it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def find_fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is as it was written.

    Raises:
      InputError: the disk cannot be read, which says nothing about the checkpoint.
    """
    try:
        table = json.loads((directory / CHECKSUMS).read_text())
        items = table["files"]
        if list(table) != ["files", "sha256"] or table["sha256"] != _digest(items):
            return f"{CHECKSUMS} has changed"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing: it was not written to its end"
    except OSError as error:
        raise InputError(_unread(directory / CHECKSUMS, error)) from error
    except (ValueError, TypeError, KeyError) as error:
        return f"{CHECKSUMS} cannot be read: {type(error).__name__}"
    found = {str(path.relative_to(directory)) for path in _files(directory)} - {CHECKSUMS}
    for name in sorted(found | items.keys()):
        if name not in items:
            return f"{name} does not belong to it"
        if name not in found:
            return f"{name} is missing"
        try:
            if _checksum(directory / name) != items[name]:
                return f"{name} has changed"
        except OSError as error:
            raise InputError(_unread(directory / name, error)) from error
    return None if CONFIG in items else f"{CONFIG} is missing"


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The arrays of a pytree, each under the path that leads to it."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _unread(path: Path, error: OSError) -> str:
    return f"cannot read {path}: {error.strerror}; nothing was changed, try again"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _checksum(path: Path) -> list[Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _digest(checksums: dict[str, Any]) -> str:
    """sha256 of a table of checksums."""
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def _synchronise(directory: Path) -> None:
    """Sees to it that what is below a folder outlives a power cut."""
    for path in [directory, *directory.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
