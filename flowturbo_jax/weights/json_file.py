"""JSON files beside weights: configurations, and the indices of sharded models."""

import json
import re
from pathlib import Path
from typing import Any

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import read_start
from flowturbo_jax.weights.tensor import quoted

# An index has some 100 bytes a tensor. Hostile JSON takes up to 30 times its size in memory.
MAX_JSON = 4 << 20
MAX_SHARDS = 1_000
MAX_FILE_NAME = 200  # characters; most file systems allow 255 bytes
FILE_NAME = re.compile(r"(?=.*\w)[\w. -]+")  # no way out of the folder


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      InputError: the file cannot be read, is too large, no JSON in UTF-8, or no object.
    """
    content = read_start(path, MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise InputError(f"{path} is too large for a JSON file; at most {MAX_JSON} bytes are read")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path} as JSON: it is no text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} as JSON: {quoted(str(error))}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{path} must hold a JSON object, not a value of type {kind}")
    return value


def read_index(path: str | Path) -> dict[str, set[str]]:
    """The shards that an index of sharded weights names, and which tensors each holds.

    Returns:
      Names of tensors by file name, which is that of a file beside the index; in order of files.

    Raises:
      InputError: as `read_json`, or the file is no index, or names a file elsewhere.
    """
    weight_map = read_json(path).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise InputError(f"{path} has no weight_map; it must say which file holds which tensor")
    shards: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not _is_file_name(file):
            kind = f"a value of type {type(file).__name__}"
            shown = quoted(file) if isinstance(file, str) else kind
            raise InputError(f"{path} names {shown} as a shard; wanted is a file name beside it")
        shards.setdefault(file, set()).add(tensor)
        if len(shards) > MAX_SHARDS:
            raise InputError(f"{path} names over {MAX_SHARDS} shards, more than are read")
    return dict(sorted(shards.items()))


def _is_file_name(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > MAX_FILE_NAME:
        return False
    return FILE_NAME.fullmatch(value) is not None
