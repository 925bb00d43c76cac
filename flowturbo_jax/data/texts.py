"""Texts out of files that others wrote: lines in UTF-8, and JSON.

Messages say what is wrong; but for those of `json_lines`, callers add the name of what they read.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowturbo_jax.data.folder import printable
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import open_regular
from flowturbo_jax.weights.tensor import quoted

MAX_TEXT = 1 << 20  # bytes of a file of captions, and of a line of JSON; more is something else
LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines would also cut at U+2028 and others


def lines_of(content: bytes) -> tuple[str, ...]:
    """The lines of a text, stripped, without empty ones; InputError if it is not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("it is no text in UTF-8; save it as such") from error
    lines = (line.strip() for line in LINE_END.split(text))
    return tuple(line for line in lines if line)


def texts_of(value: Any) -> tuple[str, ...]:
    """The texts that a JSON value stands for, stripped; InputError unless one text or several.

    Args:
      value: a text, or a list of texts.
    """
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            kind = "nothing" if text is None else f"a value of type {type(text).__name__}"
            raise InputError(f"{kind} stands where a text must be")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\ud800" alone
            raise InputError("its text has half of a character; write it anew") from error
    stripped = tuple(text.strip() for text in texts)
    if not all(stripped):
        raise InputError("its text is empty")
    if not stripped:
        raise InputError("its list of texts is empty")
    return stripped


def json_object(content: bytes) -> dict[str, Any]:
    """The JSON object that is the whole content; InputError if it is none."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError("it is no text in UTF-8; save it as such") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is no JSON: {quoted(str(error))}") from error
    if not isinstance(value, dict):
        raise InputError(f"wanted is a JSON object, not a value of type {type(value).__name__}")
    return value


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON object of every line of a file that is not blank, and where it is, for messages.

    Raises:
      InputError: the file cannot be read, or a line of it is no JSON object or over MAX_TEXT.
    """
    with open_regular(path) as file:
        number = 0
        while line := _next_line(file, path):
            number += 1
            if not line.strip():
                continue
            where = f"{printable(str(path))}, line {number}"
            try:
                if len(line) > MAX_TEXT:
                    raise InputError(f"it has more than {MAX_TEXT} bytes")
                record = json_object(line)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            yield where, record


def _next_line(file: Any, path: str | Path) -> bytes:
    try:
        return file.readline(MAX_TEXT + 1)
    except OSError as error:
        raise InputError(f"cannot read {printable(str(path))}: {error.strerror}") from error
