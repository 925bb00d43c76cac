"""Orbax directories of parameters, checked by name and shape when they are read."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from flowturbo_jax import parallel
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
    options = parallel.alone()
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
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
        with ocp.StandardCheckpointer(multiprocessing_options=parallel.alone()) as checkpointer:
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


def remove_draft(directory: Path) -> None:
    """Removes a folder that Orbax's threads, after a fault, go on to write to and make anew.

    Args:
      directory: what a failed or interrupted `save_params` wrote to, or a folder above it.
    """
    gone = 0
    for _ in range(200):
        shutil.rmtree(directory, ignore_errors=True)
        gone = 0 if directory.exists() else gone + 1
        if gone == 20:  # for a second
            return
        time.sleep(0.05)


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
