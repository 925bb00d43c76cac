"""Orbax checkpoints: parameters alone for model directories, whole runs for training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.weights.tensor import quoted

CHUNK_BYTES = 16 * 2**20
FILE_BYTES = 64 * 2**20


def save_params(directory: Path, params: Params) -> None:
    """Writes parameters as an Orbax directory that loads on any number of devices."""
    params = jax.tree.map(np.asarray, params)
    # Whole arrays and files of gigabytes, Orbax's default, take two more copies in memory.
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    arguments = ocp.args.PyTreeSave(
        params, save_args=chunks, ocdbt_target_data_file_size=FILE_BYTES
    )
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(directory).absolute(), arguments)
    # Orbax notes there where it wrote; a model directory is whole by its checksum, wherever it is.
    (Path(directory) / "commit_success.txt").unlink(missing_ok=True)


def load_params(directory: Path, wanted: Params) -> Params:
    """Reads parameters written by `save_params`.

    Args:
      directory: the Orbax directory.
      wanted: pytree of arrays or `jax.ShapeDtypeStruct`: the exact names, shapes and dtypes.

    Returns:
      The parameters, a nested dict of numpy arrays.

    Raises:
      InputError: the directory is missing or damaged, or holds other parameters than wanted; the
        message names every tensor that is missing, extra or misshapen.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise InputError(f"no parameters at {directory}; the folder does not exist")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(directory).item_metadata
            if metadata is None:
                raise InputError(f"there is no Orbax checkpoint at {directory}; restore a copy")
            stored = flatten_dict(metadata.tree, sep="/")
            shapes = {name: a.shape for name, a in flatten_dict(wanted, sep="/").items()}
            if wrong := mismatches(stored, shapes):
                raise InputError(
                    f"the parameters at {directory} are of another model: {'; '.join(wrong)}"
                )
            target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), wanted)
            return checkpointer.restore(directory, target)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(_damaged(directory, error)) from error


def mismatches(found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names every tensor that is missing, not known or misshapen.

    Args:
      found: arrays, or anything with a shape, by name.
      wanted: the exact shape of each name.
    """
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{_shown(name)} is not known" for name in found if name not in wanted]
    return wrong + [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]


def _shown(name: str) -> str:
    """A name out of a file, which may hold anything, as part of a line."""
    return name if name.isprintable() and len(name) <= 100 else quoted(name)


def _damaged(directory: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"the checkpoint at {directory} is damaged or incomplete ({reason}); restore a copy"


class Checkpoints:
    """The checkpoints of one training run, newest last; saving is atomic.

    Args:
      directory: where they live; created if missing.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, config: dict[str, Any]) -> None:
        """Saves a pytree of arrays, and the run's configuration beside it."""
        if step == self.latest_step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config)
            ),
        )

    def config(self) -> dict[str, Any]:
        """The configuration saved with the newest checkpoint.

        Raises:
          InputError: the checkpoint is damaged.
        """
        return self._restore(config=ocp.args.JsonRestore())["config"]

    def state(self, like: Any) -> Any:
        """The newest checkpoint's pytree, placed as `like` is.

        Raises:
          InputError: the checkpoint is damaged, or of another shape than `like`.
        """
        return self._restore(state=ocp.args.StandardRestore(like))["state"]

    def _restore(self, **items: Any) -> Any:
        step = self.latest_step
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(_damaged(self._directory / str(step), error)) from error
