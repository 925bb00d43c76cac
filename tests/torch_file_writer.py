"""Writes PyTorch zip files without PyTorch: what torch.save would, and what it never would.

    save(path, {"model": {"w": array}, "args": Namespace({"seed": 0})})
    stream(path, [("w", (2, 3), make_array), ...])  # one tensor in memory at a time

The pickles are put together from opcodes, so that tests can also write wrong ones with `Raw`.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
CHUNK = 1 << 24


class Stored(NamedTuple):
    """A tensor over a storage named by its key, whether or not that storage is in the file."""

    key: str
    dtype: str
    count: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    location: str = "cpu"


class View(NamedTuple):
    """A tensor over a flat array; views of the same array share its storage."""

    storage: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    location: str = "cpu"


class Parameter(NamedTuple):
    tensor: Any
    state: dict | None = None


class Namespace(NamedTuple):
    fields: dict


class Ordered(NamedTuple):
    """An OrderedDict, with the attribute _metadata that state dicts have."""

    items: dict
    metadata: dict | None = None


class Call(NamedTuple):
    """The result of a function of a module."""

    name: str
    arguments: tuple


class Raw(NamedTuple):
    """Opcodes that leave one value on the stack."""

    opcodes: bytes


class Pickler:
    """Turns a value into opcodes, and collects the arrays of its tensors by storage key."""

    def __init__(self, protocol: int = 2):
        self.protocol = protocol
        self.arrays: dict[str, np.ndarray] = {}

    def dump(self, value: Any) -> bytes:
        return b"\x80" + bytes([self.protocol]) + self.value(value) + b"."

    def value(self, value: Any) -> bytes:
        match value:
            case Raw(opcodes):
                return opcodes
            case Stored():
                return self._tensor(value)
            case View():
                return self._tensor(Stored(self._key(value.storage), *_described(value)))
            case np.ndarray():
                flat = np.ascontiguousarray(value).reshape(-1)
                return self.value(View(flat, value.shape, contiguous(value.shape)))
            case Parameter(tensor, None):
                return self._call("torch._utils", "_rebuild_parameter", (tensor, True, Ordered({})))
            case Parameter(tensor, state):
                arguments = (tensor, True, Ordered({}), state)
                return self._call("torch._utils", "_rebuild_parameter_with_state", arguments)
            case Namespace(fields):
                return self.name("argparse", "Namespace") + b")\x81" + self.value(fields) + b"b"
            case Ordered(items, metadata):
                built = self._call("collections", "OrderedDict", ()) + self._items(items)
                return built + (self.value({"_metadata": metadata}) + b"b" if metadata else b"")
            case Call(name, arguments):
                return self._call(*name.rsplit(".", 1), arguments)
        return self._plain(value)

    def name(self, module: str, name: str) -> bytes:
        if self.protocol < 4:
            return f"c{module}\n{name}\n".encode()
        return self._plain(module) + self._plain(name) + b"\x93"

    def _plain(self, value: Any) -> bytes:
        match value:
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int() if 0 <= value < 256:
                return b"K" + bytes([value])
            case int():
                content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                return b"\x8a" + bytes([len(content)]) + content
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                content = value.encode()
                if self.protocol >= 4 and len(content) < 256:
                    return b"\x8c" + bytes([len(content)]) + content
                return b"X" + struct.pack("<I", len(content)) + content
            case dict():
                return b"}" + self._items(value)
            case list():
                return b"](" + b"".join(map(self.value, value)) + b"e"
            case tuple():
                return b"(" + b"".join(map(self.value, value)) + b"t"
        raise TypeError(f"no opcodes for {type(value).__name__}")

    def _items(self, items: Mapping) -> bytes:
        pairs = (self.value(key) + self.value(value) for key, value in items.items())
        return b"(" + b"".join(pairs) + b"u"

    def _call(self, module: str, name: str, arguments: tuple) -> bytes:
        return self.name(module, name) + self.value(arguments) + b"R"

    def _key(self, storage: np.ndarray) -> str:
        for key, array in self.arrays.items():
            if array is storage:
                return key
        self.arrays[key := str(len(self.arrays))] = storage
        return key

    def _tensor(self, tensor: Stored) -> bytes:
        kind = Raw(self.name("torch", STORAGES[tensor.dtype]))
        storage = Raw(
            self.value(("storage", kind, tensor.key, tensor.location, tensor.count)) + b"Q"
        )
        arguments = (storage, tensor.offset, tensor.shape, tensor.strides, False, Ordered({}))
        return self._call("torch._utils", "_rebuild_tensor_v2", arguments)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _described(view: View) -> tuple:
    storage, *rest = view
    return (storage.dtype.name, storage.size, *rest)


def save(path: Path, value: Any, protocol: int = 2, **records: bytes) -> None:
    """Writes a value whose tensors are arrays or views; `records` replace or add files."""
    pickler = Pickler(protocol)
    pickle = pickler.dump(value)
    data = {f"data/{key}": array.tobytes() for key, array in pickler.arrays.items()}
    write_zip(
        path, {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"} | data | records
    )


def write_zip(path: Path, records: Mapping[str, bytes], prefix: str = "archive") -> None:
    """Writes records into the one folder of a zip file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(f"{prefix}/{name}"), content)


def stream(
    path: Path,
    entries: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    part: str | None = None,
) -> None:
    """Writes a state dict of any size, holding one tensor in memory at a time.

    Args:
      path: the file.
      entries: names, shapes, and what makes an array of that shape.
      part: of a training checkpoint, such as "ema", or None for a plain state dict.
    """
    state: dict[str, Stored] = {}
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape, make in entries:
            array = np.asarray(make(), order="C")
            if array.shape != shape:
                raise ValueError(f"{name} is of shape {array.shape}, not {shape}")
            key = str(len(state))
            state[name] = Stored(key, array.dtype.name, array.size, shape, contiguous(shape))
            content = memoryview(array.reshape(-1).view(np.uint8))
            record = zipfile.ZipInfo(f"archive/data/{key}")
            with archive.open(record, "w", force_zip64=True) as file:
                for start in range(0, len(content), CHUNK):
                    file.write(content[start : start + CHUNK])
            del array, content
        tree = Ordered(state) if part is None else {part: Ordered(state)}
        archive.writestr("archive/data.pkl", Pickler().dump(tree))
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
