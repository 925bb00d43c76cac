"""What all recipes share: typed keys, and the way to and from ml_collections' flags."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from flowturbo_jax.interfaces import InputError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A flat set of typed keys; a subclass adds its own and validates them at construction.

    Attributes:
      name: of the recipe, and of what it writes; letters, digits, ".", "-" and "_".
    """

    name: str

    def __post_init__(self):
        for key, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, key)
            if not _is(value, hint):
                wanted = getattr(hint, "__name__", str(hint))
                if isinstance(value, float) and not math.isfinite(value):
                    wanted = f"{wanted}, and finite"
                raise InputError(f"config key {key} is {value!r}; it must be of type {wanted}")
            if type(value) is int and float in (hint, *typing.get_args(hint)):
                # Kept as int, it would make a flag that takes whole numbers only.
                object.__setattr__(self, key, float(value))
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.name, re.ASCII):
            raise InputError(
                f"config key name is {self.name!r}; it names files: take letters, digits, . - and _"
            )

    def check_range(self, keys: tuple[str, ...], low: float, high: float = math.inf) -> None:
        """Refuses values outside [low, high).

        Raises:
          InputError: one of the keys has such a value; the message names it.
        """
        for key in keys:
            if not low <= getattr(self, key) < high:
                limit = "" if high == math.inf else f" and below {high:.10g}"
                value = getattr(self, key)
                raise InputError(
                    f"config key {key} is {value!r}; it must be at least {low:g}{limit}"
                )

    def check_choice(self, key: str, known: tuple[str, ...]) -> None:
        """Refuses a value that is not one of the known.

        Raises:
          InputError: it is not; the message lists them.
        """
        if getattr(self, key) not in known:
            names = ", ".join(repr(name) for name in known)
            raise InputError(
                f"config key {key} is {getattr(self, key)!r}; it must be one of {names}"
            )

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """What each key means, from the docstrings of the class and its bases."""
        found: dict[str, str] = {}
        for kind in reversed(cls.__mro__[:-1]):
            attributes = (kind.__doc__ or "").partition("Attributes:\n")[2]
            for key, text in re.findall(r"^ {6}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
                found[key] = " ".join(text.split())
        return found

    @classmethod
    def create(cls, config: Mapping[str, Any] | ConfigDict) -> "Recipe":
        """The recipe of a plain mapping, such as a ConfigDict.

        Raises:
          InputError: a key is unknown or missing, or a value is wrong.
        """
        values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - fields.keys()):
            raise InputError(f"unknown config key {unknown[0]!r}; known are {', '.join(fields)}")
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise InputError(f"config key {missing[0]!r} is missing; it has no default")
        return cls(**values)

    def to_config_dict(self) -> ConfigDict:
        """The recipe as ml_collections' flags want it; unknown keys and types are refused there."""
        hints = typing.get_type_hints(type(self))
        values = dataclasses.asdict(self)
        for key, value in values.items():
            if value is None:
                (kind,) = (kind for kind in typing.get_args(hints[key]) if kind is not type(None))
                values[key] = config_dict.placeholder(kind)
        return ConfigDict(values)


def _is(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is(value, kind) for kind in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is float:
        return type(value) in (float, int) and math.isfinite(value)
    return type(value) is kind if kind in (int, bool) else isinstance(value, kind)
