"""Files of prompts: what a text model is asked to draw."""

from pathlib import Path

from flowturbo_jax.data.folder import printable
from flowturbo_jax.data.texts import json_lines, lines_of, texts_of
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import read_start

MAX_FILE = 64 << 20  # bytes; half a million long prompts


def read_prompts(path: str | Path) -> list[str]:
    """Reads a file of prompts.

    Args:
      path: text in UTF-8 with a prompt in each line, where blank lines and those that begin with #
        are passed over; or, named *.jsonl, a JSON object in each line with "text" or "caption".

    Returns:
      The prompts, stripped, in the order of the file; one that comes twice is there twice.

    Raises:
      InputError: the file cannot be read, is not UTF-8, has no prompts or over 64 MB, or a line of
        the JSON is damaged or without a text.
    """
    path = Path(path)
    if path.suffix.lower() == ".jsonl":
        prompts = _from_json(path)
    else:
        prompts = [line for line in _lines(path) if not line.startswith("#")]
    if not prompts:
        raise InputError(f"{printable(str(path))} has no prompts; write one in each line")
    return prompts


def _lines(path: Path) -> tuple[str, ...]:
    shown = printable(str(path))
    content = read_start(path, MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise InputError(f"{shown} has more than {MAX_FILE} bytes; split it")
    try:
        return lines_of(content)
    except InputError as error:
        raise InputError(f"cannot read prompts from {shown}: {error}") from error


def _from_json(path: Path) -> list[str]:
    prompts = []
    for where, record in json_lines(path):
        try:
            texts = texts_of(record.get("text", record.get("caption")))
            if len(texts) > 1:
                raise InputError("it has several texts; give each its own line")
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        prompts += texts
    return prompts
