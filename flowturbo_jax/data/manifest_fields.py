"""What the fields of a manifest must be, and how those of JSON become them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flowturbo_jax.interfaces import InputError

SHA256 = re.compile(r"[0-9a-f]{64}")


def plain(value: Any) -> Any:
    """A value of JSON as our dataclasses hold it."""
    return tuple(value) if isinstance(value, list) else value


def nested(kind: Any, value: Any, name: str) -> Any:
    """The dataclass that an object of JSON stands for.

    Args:
      kind: the dataclass.
      value: what should be an object of its fields.
      name: what messages call it.

    Raises:
      InputError: it is none, or a key is missing, unknown or wrong.
    """
    if not isinstance(value, dict):
        raise InputError(f"{name} must be an object")
    try:
        check_keys(value, {field.name for field in dataclasses.fields(kind)})
        return kind(**{key: plain(item) for key, item in value.items()})
    except (InputError, TypeError) as error:
        raise InputError(f"{name}: {error}") from error


def check_keys(fields: Mapping[str, Any], known: set[str]) -> None:
    """Refuses an object of JSON that has other keys than those known."""
    missing, unknown = sorted(known - fields.keys()), sorted(fields.keys() - known)
    if missing or unknown:
        raise InputError(f"it has the wrong keys: missing {missing}, unknown {unknown!r:.200}")


def check_texts(owner: Any, names: tuple[str, ...]) -> None:
    """Refuses attributes that are no texts, or empty ones."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, str) or not value:
            raise InputError(f"{name} is {value!r:.99}; it must be a text")


def check_digest(owner: Any, name: str) -> None:
    """Refuses an attribute that is no sha256 in hexadecimal."""
    value = getattr(owner, name)
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise InputError(f"{name} is {value!r:.99}; it must have 64 hexadecimal digits")


def check_names(owner: Any, name: str) -> None:
    """Refuses an attribute that is no tuple of texts."""
    value = getattr(owner, name)
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{name} must be a list of names")


def check_counts(owner: Any, names: tuple[str, ...], least: int) -> None:
    """Refuses attributes that are no whole numbers from `least` on."""
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < least:
            raise InputError(f"{name} is {value!r:.99}; it must be a whole number from {least} on")
