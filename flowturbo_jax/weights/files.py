"""Opens weights wherever they come from: single files, training checkpoints, shards, folders."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.kinds import kind_of
from flowturbo_jax.weights.pickled_values import Namespace
from flowturbo_jax.weights.safetensors_file import open_safetensors
from flowturbo_jax.weights.tensor import Tensor, quoted
from flowturbo_jax.weights.torch_file import open_torch_file

# Which of a training checkpoint's parts are taken: the first that is there.
PARTS = {"ema": ("ema", "model", "state_dict"), "model": ("model", "state_dict")}
# What DistributedDataParallel and torch.compile put before names; the latter also inside.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)(?:_orig_mod\.)+")
FOLDER_FILES = (  # full precision before half, then the safer and faster format first
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
)
SHARD_NAME = re.compile(r"[\w. -]*\w[\w. -]*")  # no way out of the folder
MAX_JSON = 16 << 20  # bytes
MAX_ARGUMENTS = 10_000
MAX_LISTED = 1_000  # elements of a list among the arguments
SHOWN = 5  # names in a message


class Weights(NamedTuple):
    """One set of named tensors, and what its file says about it.

    Attributes:
      tensors: by name, without the prefixes that wrappers add; read from the file when asked.
      origin: which part of a training checkpoint was taken, such as "ema"; "" for a plain file.
      arguments: the plain fields of a training checkpoint's `args`; {} otherwise.
      path: the file.
      shards: the files that an index names; () otherwise.
    """

    tensors: dict[str, Tensor]
    origin: str
    arguments: dict[str, Any]
    path: Path
    shards: tuple[Path, ...] = ()


def open_weights(path: str | Path, which: str = "ema") -> Weights:
    """Opens a file of weights; only names, shapes and dtypes are read.

    Args:
      path: a .safetensors file, a PyTorch file (told by its content), or the .index.json of a
        sharded model.
      which: of a training checkpoint `{model, ema, opt, args}`, "ema" takes the moving average,
        or where there is none `model`, then `state_dict`; "model" takes `model`, then
        `state_dict`. A plain file has one set, which is taken either way.

    Raises:
      InputError: the file is missing, damaged, of another kind, or holds something else.
    """
    path = Path(path)
    if which not in PARTS:
        raise InputError(f"which is {which!r}; it must be one of {', '.join(PARTS)}")
    if path.name.endswith(".index.json"):
        state, shards = _open_shards(path)
        return Weights(_without_wrappers(path, state), "", {}, path, shards)
    state, origin, arguments = _open_file(path, which)
    return Weights(_without_wrappers(path, state), origin, arguments, path)


def open_folder(
    path: str | Path, which: str = "ema", part: str = "vae"
) -> tuple[dict[str, Any], Weights]:
    """Opens a model's folder as diffusers and transformers write it.

    Of several weights files the first of `FOLDER_FILES` is taken: full precision before half,
    safetensors before PyTorch's pickles, one file before shards.

    Args:
      path: a folder with config.json and weights, or a whole pipeline's with model_index.json.
      which: as in `open_weights`.
      part: the subfolder to take of a pipeline.

    Returns:
      What config.json says, and the weights.

    Raises:
      InputError: something is missing or damaged.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder at {folder}; give that of a model")
    if os.path.isfile(folder / "model_index.json") and os.path.isdir(folder / part):
        folder = folder / part
    if not os.path.isfile(folder / "config.json"):
        raise InputError(f"{folder} has no config.json; give the folder of a model")
    config = _read_json(folder / "config.json")
    for name in FOLDER_FILES:
        if os.path.isfile(folder / name):
            return config, open_weights(folder / name, which)
    raise InputError(f"{folder} has no weights; looked for {', '.join(FOLDER_FILES)}")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal; the file is streamed.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _open_file(path: Path, which: str) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """One file's state dict, origin and arguments."""
    if kind_of(path) == "safetensors":
        return open_safetensors(path), "", {}
    tree = open_torch_file(path)
    if type(tree) is not dict:
        raise InputError(f"{path} holds a value of type {type(tree).__name__}; save a state dict")
    parts = {name: part for name, part in tree.items() if type(part) is dict}
    if not any(name in parts for name in PARTS["ema"]):
        if not any(isinstance(value, Tensor) for value in tree.values()):
            raise InputError(
                f"{path} is no state dict and no training checkpoint: it has {_listed(tree)} at "
                "the top; save the state dict alone"
            )
        return _state_dict(path, tree), "", {}
    taken = next((name for name in PARTS[which] if name in parts), None)
    if taken is None:
        raise InputError(f"{path} has no {which!r}; it has {_listed(tree)}")
    return _state_dict(path, parts[taken]), taken, _arguments(tree.get("args"))


def _state_dict(path: Path, state: dict[Any, Any]) -> dict[str, Tensor]:
    """Checks that a dict maps names to tensors."""
    if not state:
        raise InputError(f"{path} holds no tensors where weights should be")
    for name, value in state.items():
        if type(name) is not str:
            kind = type(name).__name__
            raise InputError(f"{path} names a weight by a value of type {kind}, not by a string")
        if not isinstance(value, Tensor):
            raise InputError(
                f"{path} holds a value of type {type(value).__name__} under {quoted(name)}, where "
                "a tensor should be; save the state dict alone"
            )
    return state


def _arguments(args: Any) -> dict[str, Any]:
    """The plain fields of a checkpoint's `args`; others are left out."""
    fields = args.fields if isinstance(args, Namespace) else args
    if type(fields) is not dict or len(fields) > MAX_ARGUMENTS:
        return {}
    return {name: value for name, value in fields.items() if type(name) is str and _plain(value)}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= MAX_LISTED and all(_is_scalar(item) for item in value)
    return _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _without_wrappers(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names they have without wrappers."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = WRAPPERS.sub("", name)
        if bare in tensors:
            raise InputError(
                f"{path} holds {quoted(bare)} twice, with and without a prefix such as "
                "'module.': save one of them"
            )
        tensors[bare] = tensor
    return tensors


def _open_shards(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The tensors of all the files that an index names, and these files."""
    weight_map = _read_json(path).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise InputError(f"{path} has no weight_map; it must say which file holds which tensor")
    for file in weight_map.values():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            shown = (
                quoted(file) if isinstance(file, str) else f"a value of type {type(file).__name__}"
            )
            raise InputError(f"{path} names {shown} as a shard; wanted is a file name beside it")
    state: dict[str, Tensor] = {}
    files = sorted(set(weight_map.values()))
    for file in files:
        shard, origin, _ = _open_file(path.with_name(file), "model")
        wanted = {name for name, where in weight_map.items() if where == file}
        if origin:
            raise InputError(f"{path.with_name(file)} is a training checkpoint, not a shard")
        if shard.keys() != wanted:
            raise InputError(
                f"{path.with_name(file)} does not hold the tensors that {path.name} says; they "
                f"differ in {_listed(shard.keys() ^ wanted)}: get both files again"
            )
        state.update(shard)
    return state, tuple(path.with_name(file) for file in files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_JSON:
        raise InputError(f"{path} is too large for a JSON file; at most {MAX_JSON} bytes are read")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} as JSON: {quoted(str(error))}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{path} must hold a JSON object, not a value of type {kind}")
    return value


def _listed(names: Iterable[Any]) -> str:
    shown = sorted(quoted(str(name)) for name in names)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return (", ".join(shown[:SHOWN]) or "nothing") + more
