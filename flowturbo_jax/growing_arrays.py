"""Arrays on disk that grow by rows: long work holds little, and loses nothing when it is killed."""

import contextlib
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
    """Arrays of equally many rows in a folder, appended to together by one process at a time.

    What was appended before is continued if it has the same identity and columns; otherwise it is
    removed. A row counts when every array has it: what a kill left of the next is cut off.

    Args:
      directory: where they live; made if there is none. It holds nothing else.
      identity: what the rows depend on, anything JSON holds.
      columns: dtype and shape of one row of each array, by name; at least one row has a size.

    Attributes:
      rows: how many there are.

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
        sized = [name for name in self._columns if self._row_bytes(name)]
        if not sized:
            raise ValueError(f"no row of {list(self._columns)} has a size")
        try:
            if self._read_identity() != text:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory.mkdir(parents=True)
                draft = self._directory / f".{IDENTITY}"
                draft.write_text(text)
                os.replace(draft, self._directory / IDENTITY)
            for name in self._columns:
                self._path(name).touch()
            # Arrays without a size have as many rows as the others.
            self.rows = min(self._whole_rows(name) for name in sized)
            self._cut()
        except OSError as error:
            raise _cannot_write(self._directory, error) from error

    def append(self, **rows: np.ndarray) -> None:
        """Appends rows to every array.

        Args:
          **rows: `[n, ...]` of every column, by name, in its dtype.

        Raises:
          InputError: the disk is full or cannot be written to; rows appended before are kept.
          ValueError: these are no rows of the columns; nothing is appended.
        """
        counts = {len(array) for array in rows.values()}
        if rows.keys() != self._columns.keys() or len(counts) != 1:
            raise ValueError(f"rows of {sorted(rows)}, {counts}; all of {list(self._columns)}")
        for name, array in rows.items():
            dtype, shape = self._columns[name]
            if array.shape[1:] != shape or array.dtype != dtype:
                given = f"{array.dtype}{list(array.shape[1:])}"
                raise ValueError(f"{name} has rows {dtype}{list(shape)}, not {given}")
        try:
            for name, array in rows.items():
                with self._path(name).open("ab") as file:
                    file.write(np.ascontiguousarray(array).tobytes())
        except OSError as error:
            with contextlib.suppress(OSError):  # then the next to open the folder cuts
                self._cut()
            raise _cannot_write(self._directory, error) from error
        self.rows += counts.pop()

    def keep(self, rows: int) -> None:
        """Cuts off all but the first rows.

        Args:
          rows: how many to keep, at most those there are.

        Raises:
          InputError: the folder cannot be written to.
        """
        if not 0 <= rows <= self.rows:
            raise ValueError(f"{rows} rows of {self.rows} cannot be kept")
        self.rows = rows
        try:
            self._cut()
        except OSError as error:
            raise _cannot_write(self._directory, error) from error

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
        return self._path(name).stat().st_size // self._row_bytes(name)

    def _cut(self) -> None:
        """Leaves no array more than the rows that count."""
        for name in self._columns:
            os.truncate(self._path(name), self.rows * self._row_bytes(name))

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
