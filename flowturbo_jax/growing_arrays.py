"""Arrays on disk that grow by rows: long work holds little, and loses nothing when it is killed."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax.interfaces import InputError

IDENTITY = "identity.json"


class GrowingArrays:
    """Arrays of equally many rows in a folder, appended to together.

    What was appended before is continued if it has the same identity and columns; otherwise it is
    removed. A row counts when every array has it: what a kill left of the next is cut off.

    Args:
      directory: where they live; made if there is none.
      identity: what the rows depend on, anything JSON holds.
      columns: dtype and shape of one row of each array, by name.

    Raises:
      InputError: the folder cannot be written to.
    """

    def __init__(
        self,
        directory: Path,
        identity: Any,
        columns: Mapping[str, tuple[Any, tuple[int, ...]]],
    ):
        self._directory = Path(directory)
        self._columns = {name: (np.dtype(dtype), shape) for name, (dtype, shape) in columns.items()}
        described = {name: [dtype.str, *shape] for name, (dtype, shape) in self._columns.items()}
        text = json.dumps({"identity": identity, "columns": described}, indent=1, sort_keys=True)
        try:
            if self._read_identity() != text:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory.mkdir(parents=True)
                draft = self._directory / f".{IDENTITY}"
                draft.write_text(text)
                os.replace(draft, self._directory / IDENTITY)
            self.rows = min(self._whole_rows(name) for name in self._columns)
            for name in self._columns:
                os.truncate(self._path(name), self.rows * self._row_bytes(name))
        except OSError as error:
            raise _cannot_write(self._directory, error) from error

    def append(self, **rows: np.ndarray) -> None:
        """Appends rows to every array.

        Args:
          **rows: `[n, ...]` of every column, by name.

        Raises:
          InputError: the disk is full or cannot be written to; rows appended before are kept.
        """
        counts = {len(array) for array in rows.values()}
        if rows.keys() != self._columns.keys() or len(counts) != 1:
            raise ValueError(f"rows of {sorted(rows)}, {counts}; all of {list(self._columns)}")
        try:
            for name, array in rows.items():
                dtype, shape = self._columns[name]
                if array.shape[1:] != shape:
                    raise ValueError(f"{name} has rows of {array.shape[1:]}, not {shape}")
                with self._path(name).open("ab") as file:
                    file.write(np.ascontiguousarray(array, dtype).tobytes())
        except OSError as error:
            for name in self._columns:
                os.truncate(self._path(name), self.rows * self._row_bytes(name))
            raise _cannot_write(self._directory, error) from error
        self.rows += counts.pop()

    def read(self, name: str) -> np.ndarray:
        """An array's rows `[rows, ...]`, read from disk when they are used."""
        dtype, shape = self._columns[name]
        if not self.rows or 0 in shape:  # nothing can be mapped
            return np.zeros((self.rows, *shape), dtype)
        return np.memmap(self._path(name), dtype, "r", shape=(self.rows, *shape))

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _read_identity(self) -> str | None:
        try:
            return (self._directory / IDENTITY).read_text()
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def _whole_rows(self, name: str) -> int:
        self._path(name).touch()
        size = self._row_bytes(name)
        return self._path(name).stat().st_size // size if size else 0

    def _row_bytes(self, name: str) -> int:
        dtype, shape = self._columns[name]
        return dtype.itemsize * int(np.prod(shape))

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.rows"


def _cannot_write(directory: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(
        f"cannot write to {directory}: {reason}; what is there is kept, and the same command goes "
        "on once this is mended"
    )
