"""Tensors that stay in their file until they are read, and how messages show names from a file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
QUOTED_LENGTH = 80


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a weights file; `numpy.asarray(tensor)` reads it.

    Attributes:
      shape: as stored, in the layout of the program that wrote the file.
      dtype: as stored; bfloat16 is `ml_dtypes.bfloat16`.
      read: reads the file and returns a new contiguous array of that shape and dtype; raises
        InputError where the file is damaged.
      extent: bytes of the file that `read` goes through; more than the tensor's where that is
        scattered over a larger one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    extent: int = 0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor in a file cannot become an array without being read")
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


def quoted(name: str) -> str:
    """A name out of a file as messages show it: in quotes, on one line, cut where it is long."""
    text = repr(name[:QUOTED_LENGTH])
    return text if len(text) <= QUOTED_LENGTH else f"{text[: QUOTED_LENGTH - 4]}...{text[-1]}"


def too_large(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> str:
    """The message for a tensor that the memory cannot hold, as that of a sparse file may be."""
    return (
        f"cannot read {path}: its tensor of shape {quoted(str(shape))} and dtype {dtype.name} does "
        "not fit in memory"
    )
