"""Safetensors files, through the safetensors library: a JSON header, then the numbers."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import Stamp, open_regular, stamp_of
from flowturbo_jax.weights.tensor import BFLOAT16, Tensor, quoted, too_large

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
MAX_HEADER = 16 << 20  # bytes; the library reads 100 MB, which become gigabytes of names
MAX_TENSORS = 100_000  # some 100 bytes of the header each


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads the header of a safetensors file; the tensors stay in the file.

    Raises:
      InputError: the file is damaged, too much for weights, or holds a dtype that is not read.
    """
    stamp = _checked(path)
    try:
        # Plain reads: with the default, a memory map, all that was read counts as ours.
        file = safe_open(path, framework="numpy", backend="pread")
        names = file.keys()
        if len(names) > MAX_TENSORS:
            raise InputError(f"{path} lists {len(names)} tensors; at most {MAX_TENSORS} are read")
        found = {name: file.get_slice(name) for name in names}
        stored = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in found.items()}
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise InputError(_damaged(path, error)) from error
    open_regular(path, stamp).close()  # what the library opened is what was checked

    def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        if dtype not in DTYPES:
            raise InputError(
                f"cannot read {path}: its tensor {quoted(name)} is of dtype {dtype}; read are "
                f"{', '.join(DTYPES)}"
            )

        def read() -> np.ndarray:
            open_regular(path, stamp).close()
            try:
                return np.asarray(file.get_tensor(name), order="C")
            except MemoryError as error:
                raise InputError(too_large(path, shape, DTYPES[dtype])) from error
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(_damaged(path, error)) from error

        return Tensor(shape, DTYPES[dtype], read)

    return {name: tensor(name, *described) for name, described in stored.items()}


def _checked(path: Path) -> Stamp:
    """The stamp of a file whose header is no larger than the library may be given."""
    with open_regular(path) as file:
        try:
            length = int.from_bytes(file.read(8), "little")
        except OSError as error:
            raise InputError(_damaged(path, error)) from error
        if length > MAX_HEADER:
            raise InputError(
                f"cannot read {path}: its safetensors header has {length} bytes; at most "
                f"{MAX_HEADER} are read"
            )
        return stamp_of(file)


def _damaged(path: Path, error: Exception) -> str:
    """One line, whatever the library says."""
    return (
        f"cannot read {path}: its safetensors header or data are damaged, or the download was cut "
        f"short ({quoted(str(error))}); get the file again"
    )
