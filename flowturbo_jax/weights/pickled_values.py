"""The values a pickle may hold: plain containers, checked keys, and what stands for a class."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flowturbo_jax.interfaces import InputError

MAX_DEPTH = 100
# Hashing a nested tuple recurses, and tuples, unlike strings, can be made to share one hash.
KEYS = frozenset({str, int, float, bool, type(None)})
# Numbers, unlike strings, hash to what the file wants: n of them can be made to take n * n steps to
# insert. An optimizer has one for each tensor of the model.
MAX_COUNTED_KEYS = 10_000


@dataclasses.dataclass(eq=False)
class Namespace:
    """What an `argparse.Namespace` of the file becomes: its fields, without its class.

    Attributes:
      fields: as the file has them; the keys are not checked.
    """

    fields: dict[Any, Any] | None = None


@dataclasses.dataclass(eq=False, frozen=True)
class Inert:
    """What stands for an object beside the weights that is of no use; its content is dropped.

    Attributes:
      name: what the file asks for; nothing of that name was imported or called.
    """

    name: str


class Keys:
    """Checks what becomes a key of a dict or a member of a set, over one pickle."""

    def __init__(self):
        self.counted = 0  # numbers, and all members of sets

    def key(self, value: Any) -> Any:
        """The value, if it may be a key.

        Raises:
          InputError: it may not, or there were too many numbers already.
        """
        if type(value) not in KEYS:
            raise InputError(
                f"its pickle has a {type(value).__name__} as a key; wanted are strings and numbers"
            )
        if type(value) in (int, float):
            self._count()
        return value

    def member(self, value: Any) -> Any:
        """The value, if it may be a member of a set; raises as `key`."""
        self._count()
        return self.key(value)

    def set_of(self, arguments: tuple) -> set:
        """A set of a list of plain values.

        Raises:
          InputError: a member is no plain value, or there are too many.
        """
        match arguments:
            case ():
                return set()
            case ([*items],):
                return {self.member(item) for item in items}
        raise InputError("its pickle is damaged: a set is made of something else than a list")

    def _count(self) -> None:
        self.counted += 1
        if self.counted > MAX_COUNTED_KEYS:
            raise InputError(
                f"its pickle has over {MAX_COUNTED_KEYS} numbers as keys or members of sets"
            )


def check_depth(root: Any) -> None:
    """Visits each container below a value once, without recursion.

    Raises:
      InputError: containers nest more than `MAX_DEPTH` deep, or one contains itself.
    """
    heights: dict[int, int] = {}  # of finished containers, by identity
    path, on_path = [(root, iter(_children(root)))], {id(root)}
    while path:
        _limit(len(path))
        value, children = path[-1]
        for child in children:
            if id(child) in on_path:
                raise InputError("its pickle holds a container that contains itself")
            if type(child) in CONTAINERS and id(child) not in heights:
                path.append((child, iter(_children(child))))
                on_path.add(id(child))
                break
        else:
            path.pop()
            on_path.remove(id(value))
            below = (heights.get(id(child), 0) for child in _children(value))
            heights[id(value)] = 1 + max(below, default=0)
    _limit(heights[id(root)])


def _limit(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InputError(f"its pickle nests containers more than {MAX_DEPTH} deep")


CONTAINERS = frozenset({dict, list, tuple, Namespace})  # a set holds plain values only


def _children(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return value.values()
    if type(value) is Namespace:
        return [value.fields]
    return value if type(value) in CONTAINERS else ()


def _latin1(arguments: tuple) -> bytes:
    match arguments:
        case (str(text), "latin1" | "latin-1") if text.isascii() or max(text) <= "\xff":
            return text.encode("latin-1")
    raise InputError("its pickle is damaged: bytes are not written as latin-1 text")


def _empty(kind: type) -> Callable[[tuple], Any]:
    def make(arguments: tuple) -> Any:
        if arguments:
            raise InputError(f"its pickle is damaged: a {kind.__name__} is made of something")
        return kind()

    return make


PLAIN: Mapping[str, Callable[[tuple], Any]] = {
    "collections.OrderedDict": _empty(dict),
    "argparse.Namespace": _empty(Namespace),
    "builtins.bytes": _empty(bytes),  # bytes are built by name in protocol 2 only
    "_codecs.encode": _latin1,
}
# What training programs keep beside the weights; never looked into.
INERT_CALLS = (
    *("collections.Counter", "collections.defaultdict", "builtins.complex", "builtins.bytearray"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
    *("pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.PurePosixPath"),
    *("pathlib._local.WindowsPath", "pathlib._local.PureWindowsPath"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("torch.serialization._get_layout", "torch.torch_version.TorchVersion"),
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
# Their arguments: what an array is made as, and what a defaultdict is filled with.
INERT_VALUES = ("numpy.ndarray", *(f"builtins.{n}" for n in ("list", "dict", "int", "float")))


def _inert(name: str) -> Callable[[tuple], Inert]:
    made = Inert(name)
    return lambda arguments: made


BESIDE: Mapping[str, Any] = {
    **{name: _inert(name) for name in INERT_CALLS},
    **{name: Inert(name) for name in INERT_VALUES},
}
