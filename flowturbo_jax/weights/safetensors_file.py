"""Safetensors files, through the safetensors library: a JSON header, then the numbers."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.tensor import BFLOAT16, Tensor, quoted

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads the header of a safetensors file; the tensors stay in the file.

    Raises:
      InputError: the file is damaged, or holds a dtype that is not read.
    """
    try:
        # Plain reads: with the default, a memory map, all that was read counts as ours.
        file = safe_open(path, framework="numpy", backend="pread")
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no iterator)
        stored = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(_damaged(path, error)) from error

    def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        if dtype not in DTYPES:
            raise InputError(
                f"cannot read {path}: its tensor {quoted(name)} is of dtype {dtype}; read are "
                f"{', '.join(DTYPES)}"
            )

        def read() -> np.ndarray:
            try:
                return np.asarray(file.get_tensor(name), order="C")
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(_damaged(path, error)) from error

        return Tensor(shape, DTYPES[dtype], read)

    return {name: tensor(name, *described) for name, described in stored.items()}


def _damaged(path: Path, error: Exception) -> str:
    """One line, whatever the library says."""
    return (
        f"cannot read {path}: its safetensors header or data are damaged, or the download was cut "
        f"short ({quoted(str(error))}); get the file again"
    )
