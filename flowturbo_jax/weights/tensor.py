"""Tensors that stay in their file until they are read, and how messages show names from a file."""

import dataclasses
from collections.abc import Callable, Mapping
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
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor in a file cannot become an array without being read")
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


Tensors = Mapping[str, Tensor]


def quoted(name: str) -> str:
    """A name out of a file as messages show it: in quotes, on one line, cut where it is long."""
    text = repr(name[:QUOTED_LENGTH])
    return text if len(text) <= QUOTED_LENGTH else f"{text[: QUOTED_LENGTH - 4]}...{text[-1]}"
