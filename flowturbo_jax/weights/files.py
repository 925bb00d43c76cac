"""Opens weights wherever they come from: single files, training checkpoints, shards, folders."""

import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.json_file import read_index, read_json
from flowturbo_jax.weights.kinds import kind_of
from flowturbo_jax.weights.pickled_values import Inert, Namespace
from flowturbo_jax.weights.regular_file import open_regular, stamp_of
from flowturbo_jax.weights.safetensors_file import open_safetensors
from flowturbo_jax.weights.tensor import Tensor, quoted
from flowturbo_jax.weights.torch_file import open_torch_file

# Which of a training checkpoint's parts are taken: the first that is there.
PARTS = {"ema": ("ema", "model", "state_dict"), "model": ("model", "state_dict")}
# What DistributedDataParallel and torch.compile put before names; the latter also inside.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)(?:_orig_mod\.)+")
# Full precision before half, then the safer and faster format first: diffusers' names, and
# transformers'.
DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
)
TRANSFORMERS_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
)
FOLDER_FILES = (*DIFFUSERS_WEIGHTS, *TRANSFORMERS_WEIGHTS)
# Several tensors may share a storage, and one tensor may have several names. Weights in half
# precision, half of which are tied, take 4 times their file as float32; a tiny file may share more.
MAX_SHARING = 4  # bytes of all tensors as float32 or wider, per byte of the file
MAX_READING = 16  # bytes to read for all tensors, per byte of the file: they may be scattered
ALLOWANCE = 64 << 20  # bytes
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
    config = read_json(folder / "config.json")
    for name in FOLDER_FILES:
        if os.path.isfile(folder / name):
            return config, open_weights(folder / name, which)
    raise InputError(f"{folder} has no weights; looked for {', '.join(FOLDER_FILES)}")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal; the file is streamed.

    Raises:
      InputError: the file cannot be read.
    """
    with open_regular(path) as file:
        try:
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
            raise InputError(_without_weights(path, tree))
        return _state_dict(path, tree), "", {}
    taken = next((name for name in PARTS[which] if name in parts), None)
    if taken is None:
        raise InputError(f"{path} has no {which!r}; it has {_listed(tree)}")
    try:
        state = _state_dict(path, parts[taken])
    except InputError as error:
        other = "model" if taken == "ema" else "ema"
        advice = any(name in parts for name in PARTS[other] if name != taken)
        hint = f"; its {other} may do: --weights {other}" if advice else ""
        raise InputError(f"cannot take {taken!r}: {error}{hint}") from error
    return state, taken, _arguments(tree.get("args"))


def _without_weights(path: Path, tree: dict[Any, Any]) -> str:
    """What to do about a file without a state dict where one is looked for."""
    parts = (name for name, part in tree.items() if type(name) is str and _has_tensors(part))
    part = quoted(next(parts, "ema"))
    return (
        f"{path} is no state dict and no training checkpoint: it has {_listed(tree)} at the top; "
        f"save its weights alone: torch.save(torch.load(f, weights_only=True)[{part}], g)"
    )


def _has_tensors(part: Any) -> bool:
    return type(part) is dict and any(isinstance(value, Tensor) for value in part.values())


def _state_dict(path: Path, state: dict[Any, Any]) -> dict[str, Tensor]:
    """Checks that a dict maps names to tensors, which the memory can hold."""
    if not state:
        raise InputError(f"{path} holds no tensors where weights should be")
    memory = reading = 0
    for name, value in state.items():
        if type(name) is not str:
            kind = type(name).__name__
            raise InputError(f"{path} names a weight by a value of type {kind}, not by a string")
        if not isinstance(value, Tensor):
            kind = quoted(value.name) if isinstance(value, Inert) else type(value).__name__
            raise InputError(
                f"{path} holds a value of type {kind} under {quoted(name)}, where "
                "a tensor should be; save the state dict alone"
            )
        memory += math.prod(value.shape) * max(value.dtype.itemsize, 4)
        reading += value.extent
    with open_regular(path) as file:
        size = stamp_of(file).size
    if memory > MAX_SHARING * size + ALLOWANCE:
        raise InputError(
            f"{path} has {size} bytes, but its tensors take {memory}: they share storages far more "
            "than tied weights do"
        )
    if reading > MAX_READING * size + ALLOWANCE:
        raise InputError(
            f"{path} has {size} bytes, but {reading} must be read for its tensors, which are "
            "scattered; save each with .contiguous()"
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
    state: dict[str, Tensor] = {}
    shards = {path.with_name(file): wanted for file, wanted in read_index(path).items()}
    for file, wanted in shards.items():
        shard, origin, _ = _open_file(file, "model")
        if origin:
            raise InputError(f"{file} is a training checkpoint, not a shard")
        if shard.keys() != wanted:
            raise InputError(
                f"{file} does not hold the tensors that {path.name} says; they differ in "
                f"{_listed(shard.keys() ^ wanted)}: get both files again"
            )
        state.update(shard)
    return state, tuple(shards)


def _listed(names: Iterable[Any]) -> str:
    shown = sorted(quoted(str(name)) for name in names)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return (", ".join(shown[:SHOWN]) or "nothing") + more
