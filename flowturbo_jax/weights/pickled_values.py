"""The values a pickle may hold: plain containers, checked keys, and what stands for a class."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flowturbo_jax.interfaces import InputError

MAX_DEPTH = 100
# Hashing a nested tuple recurses, and tuples, unlike strings, can be made to share one hash.
KEYS = frozenset({str, int, float, bool, type(None)})


@dataclasses.dataclass(eq=False)
class Namespace:
    """What an `argparse.Namespace` of the file becomes: its fields, without its class.

    Attributes:
      fields: as the file has them; the keys are not checked.
    """

    fields: dict[Any, Any] | None = None


def key(value: Any) -> Any:
    """A value that may be a key or a member of a set.

    Raises:
      InputError: it may not.
    """
    if type(value) not in KEYS:
        raise InputError(
            f"its pickle has a {type(value).__name__} as a key; wanted are strings and numbers"
        )
    return value


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


def plain_set(arguments: tuple) -> set:
    """A set of a list of plain values.

    Raises:
      InputError: a member is no plain value.
    """
    match arguments:
        case ():
            return set()
        case ([*items],):
            return {key(item) for item in items}
    raise InputError("its pickle is damaged: a set is made of something else than a list")


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
    "builtins.set": plain_set,  # sets and bytes are built by name in protocol 2 only
    "builtins.frozenset": plain_set,
    "builtins.bytes": _empty(bytes),
    "_codecs.encode": _latin1,
}
