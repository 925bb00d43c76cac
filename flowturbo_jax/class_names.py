"""Names of classes: ImageNet's, names from a file, and the label that a name stands for."""

import difflib
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from flowturbo_jax.interfaces import InputError

IMAGENET = Path(__file__).parent / "imagenet_classes.txt"
SUGGESTIONS = 3
LISTED = 5  # classes named in full where a name means several


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 ImageNet classes by label; an entry holds all WordNet names, joined by ", "."""
    return tuple(_imagenet().values())


def readable_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as they are, or ImageNet's where they are its 1000 WordNet ids.

    Args:
      names: the name of label 0, 1, ..., such as the names of a data set's folders.
    """
    known = _imagenet()
    if len(names) == len(known) and set(names) == set(known):
        return tuple(known[name] for name in names)
    return tuple(names)


def label_of(name_or_number: str | int, class_names: Sequence[str]) -> int:
    """The label of a class that is given by number or by name.

    Case does not matter in a name, nor does a space, "_" or "-" in place of another. A whole entry
    of `class_names` comes first, then any one of its names, which commas separate.

    Args:
      name_or_number: 207, "207", "golden retriever", ...; a number is not checked against the
        classes.
      class_names: the entry of label 0, 1, ...

    Raises:
      InputError: no class has that name, or several have.
    """
    if not isinstance(name_or_number, str):
        return int(name_or_number)
    given = name_or_number.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", given):
        return int(given)
    wanted = _names(given)
    entries = [_names(entry) for entry in class_names]
    labels = [label for label, names in enumerate(entries) if names == wanted]
    if not labels and len(wanted) == 1:
        labels = [label for label, names in enumerate(entries) if wanted[0] in names]
    if len(labels) == 1:
        return labels[0]
    if labels:
        listed = _listed(labels[:LISTED], class_names) + (", ..." if len(labels) > LISTED else "")
        raise InputError(f"{given!r} is the name of several classes: {listed}; give the number")
    if not class_names:
        raise InputError(f"got the class {given!r}, but these classes have no names; give a number")
    near = _listed(_nearest(" ".join(wanted), entries), class_names)
    raise InputError(
        f"no class is called {given!r}; {f'near it are {near}; ' if near else ''}"
        f"give a name, or a number from 0 to {len(class_names) - 1}"
    )


def read_class_names(path: str | Path, count: int) -> tuple[str, ...]:
    """Reads a file of class names: a JSON list, or text with one name per line, label 0 first.

    Raises:
      InputError: the file cannot be read, or does not hold `count` names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read class names from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"class names in {path} are not UTF-8 text; save them as such") from error
    if text.lstrip().startswith("["):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise InputError(f"class names in {path} are not a JSON list ({error})") from error
    else:
        names = text.rstrip().splitlines()
    for label, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"class {label} in {path} is {name!r}; it must be a name")
    if len(names) != count:
        raise InputError(
            f"{path} has {len(names)} class names, but there are {count} classes; "
            "give one name per line, in the order of the labels"
        )
    return tuple(name.strip() for name in names)


@functools.cache
def _imagenet() -> dict[str, str]:
    """ImageNet's names by WordNet id, in the order of the labels."""
    lines = IMAGENET.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


@functools.lru_cache(maxsize=4096)
def _names(entry: str) -> tuple[str, ...]:
    """The names of an entry, as they are compared."""
    names = entry.casefold().split(",")
    return tuple(" ".join(re.split(r"[\s_-]+", name.strip())) for name in names)


def _nearest(wanted: str, entries: Sequence[Sequence[str]]) -> list[int]:
    """Labels of the classes whose names resemble the wanted one; those with its words first."""
    names = sorted({name for entry in entries for name in entry})
    words = set(wanted.split())
    with_words = [name for name in names if words and words <= set(name.split())]
    near = difflib.get_close_matches(wanted, with_words, SUGGESTIONS, cutoff=0)
    near += difflib.get_close_matches(wanted, names, SUGGESTIONS)
    labels = [label for name in near for label, entry in enumerate(entries) if name in entry]
    return list(dict.fromkeys(labels))[:SUGGESTIONS]


def _listed(labels: Sequence[int], class_names: Sequence[str]) -> str:
    return ", ".join(f"{label} ({class_names[label]})" for label in labels)
