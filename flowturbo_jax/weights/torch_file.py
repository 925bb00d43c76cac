"""PyTorch's zip files (.pt, .pth, .bin) without PyTorch: a pickle, and a record per storage."""

import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import restricted_pickle
from flowturbo_jax.weights.archive import Archive
from flowturbo_jax.weights.tensor import BFLOAT16, Tensor, quoted, too_large

# Names, and orders of arguments below, as torch.save of PyTorch 1.6 to 2.13 writes them.
STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"),
)
MAX_DIMENSIONS = 16
MAX_TENSOR_BYTES = 1 << 44
MAX_EXPANDED = 1 << 24  # elements of a tensor that is larger than what is stored of it (`expand`)


class Storage(NamedTuple):
    """One record under data/, as elements of one dtype."""

    record: str
    dtype: np.dtype
    count: int


def open_torch_file(path: Path) -> Any:
    """Reads the description of a PyTorch zip file; the tensors stay in the file.

    Args:
      path: the file.

    Returns:
      What was saved, see `restricted_pickle.load`, with a `Tensor` in the place of each tensor
      and parameter.

    Raises:
      InputError: the file is damaged, or holds more than tensors and plain values.
    """
    try:
        archive = Archive(path)
        prefix = _prefix(archive)
        swap = _byte_order(archive, prefix) != sys.byteorder
        pickle = archive.read(f"{prefix}/data.pkl", restricted_pickle.MAX_BYTES)
        rebuilder = _Rebuilder(archive, prefix, swap)
        return restricted_pickle.load(pickle, rebuilder.allowed(), rebuilder.storage)
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _prefix(archive: Archive) -> str:
    """The folder inside the archive that everything lies in."""
    found = [
        name.removesuffix("/data.pkl")
        for name in archive.records
        if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(found) > 1:
        raise InputError("it holds several data.pkl: the file is damaged or made to mislead")
    if not found:
        numpy_file = any(name.endswith(".npy") for name in archive.records)
        kind = "a numpy .npz file" if numpy_file else "a zip file that PyTorch did not write"
        raise InputError(f"it is {kind}: it has no data.pkl; give a .pt or .safetensors file")
    (prefix,) = found
    script = (f"{prefix}/constants.pkl", f"{prefix}/code/")
    if any(name.startswith(script) for name in archive.records):
        raise InputError(
            "it is a TorchScript program, not weights; in PyTorch, save the state dict of it: "
            "torch.save(torch.jit.load(file).state_dict(), other_file)"
        )
    return prefix


def _byte_order(archive: Archive, prefix: str) -> str:
    record = f"{prefix}/byteorder"
    order = archive.read(record, 16) if record in archive.records else b"little"
    if order not in (b"little", b"big"):
        raise InputError(f"its byteorder is {order!r}; it must be little or big")
    return order.decode()


class _Rebuilder:
    """Our versions of the functions that rebuild tensors, over the records of one archive."""

    def __init__(self, archive: Archive, prefix: str, swap: bool):
        self.archive = archive
        self.prefix = prefix
        self.swap = swap
        self.storages: dict[str, Storage] = {}

    def allowed(self) -> Mapping[str, Any]:
        return {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch.nn.parameter.Parameter": _parameter,
            "torch.Size": _size,
            "torch.device": _device,
            **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
            **{f"torch.{name}": f"torch.{name}" for name in DTYPE_NAMES},
        }

    def storage(self, persistent_id: Any) -> Storage:
        match persistent_id:
            case ("storage", np.dtype() as dtype, str(key), str(_), int(count)):
                known = self.storages.get(key)
            case _:
                raise InputError("its pickle is damaged: a tensor lies in no known kind of storage")
        if known is not None:  # returned itself: many copies, each with its name, take memory
            if (known.dtype, known.count) != (dtype, count):
                raise InputError(f"its storage {quoted(key)} is described in two different ways")
            return known
        storage = Storage(f"{self.prefix}/data/{key}", dtype, count)
        size = self.archive.find(storage.record).size
        if count * dtype.itemsize != size:
            raise InputError(
                f"its storage {quoted(key)} has {size} bytes, not {count} {dtype.name} numbers: "
                "the file is damaged"
            )
        self.storages[key] = storage
        return storage

    def tensor(self, arguments: tuple) -> Tensor:
        """From (storage, offset, shape, strides[, requires_grad, hooks[, metadata]])."""
        match arguments:
            case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *rest):
                metadata = rest[2:]
            case _:
                raise InputError("its pickle is damaged: a tensor is not rebuilt of a storage")
        if any(metadata):
            raise InputError("it holds a tensor whose values are conjugated or negated on the fly")
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise InputError(f"it holds a tensor of {len(shape)} axes and {len(strides)} strides")
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            raise InputError("it holds a tensor whose shape is not made of whole numbers")
        count = math.prod(shape)
        # Empty axes do not make others harmless: numpy multiplies those that are not empty.
        size = math.prod(n for n in shape if n) * storage.dtype.itemsize
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if size > MAX_TENSOR_BYTES or (count and offset + extent > storage.count):
            raise InputError(
                f"it holds a tensor of shape {quoted(str(shape))} that reaches beyond the "
                f"{storage.count} numbers stored: the file is damaged"
            )
        if count > max(storage.count, MAX_EXPANDED):
            raise InputError(
                f"it holds a tensor of shape {quoted(str(shape))} expanded from "
                f"{storage.count} numbers; at most {MAX_EXPANDED} are read"
            )
        view = _View(offset, shape, strides, extent if count else 0)
        read = functools.partial(self.read, storage, view)
        return Tensor(shape, storage.dtype, read, view.extent * storage.dtype.itemsize)

    def read(self, storage: Storage, view: "_View") -> np.ndarray:
        try:
            return self._read(storage, view)
        except MemoryError as error:
            raise InputError(too_large(self.archive.path, view.shape, storage.dtype)) from error

    def _read(self, storage: Storage, view: "_View") -> np.ndarray:
        if view.extent == 0:
            return np.empty(view.shape, storage.dtype)
        plain = view.is_contiguous()
        array = np.empty(view.shape if plain else view.extent, storage.dtype)
        numbers = array.reshape(-1).view(np.uint8)  # bfloat16 has no buffer of its own
        start = view.offset * storage.dtype.itemsize
        try:
            self.archive.read_into(memoryview(numbers), storage.record, start)
        except InputError as error:
            raise InputError(f"cannot read {self.archive.path}: {error}") from error
        if self.swap:
            array.reshape(-1).view(f"u{storage.dtype.itemsize}").byteswap(inplace=True)
        if plain:
            return array
        # An axis of length 1 may have any stride, even one that numpy could not hold.
        strides = [
            stride * storage.dtype.itemsize if n > 1 else 0
            for n, stride in zip(view.shape, view.strides, strict=True)
        ]
        strided = np.lib.stride_tricks.as_strided(array, view.shape, strides, writeable=False)
        return strided.copy(order="C")


class _View(NamedTuple):
    """Which elements of a storage a tensor has; offset, strides and extent count elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    extent: int

    def is_contiguous(self) -> bool:
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n > 1 and stride != expected:
                return False
            expected *= n
        return True


def _parameter(arguments: tuple) -> Tensor:
    """From (tensor[, requires_grad[, hooks[, state]]]); only the tensor counts."""
    match arguments:
        case (Tensor() as tensor, *_):
            return tensor
    raise InputError("its pickle is damaged: a parameter is not made of a tensor")


def _size(arguments: tuple) -> tuple:
    match arguments:
        case (tuple(shape),):
            return shape
    raise InputError("its pickle is damaged: a torch.Size is not made of a tuple")


def _device(arguments: tuple) -> str:
    match arguments:
        case (str(kind),):
            return kind
        case (str(kind), int(index)):
            return f"{kind}:{index}"
    raise InputError("its pickle is damaged: a torch.device is not made of a name and a number")
