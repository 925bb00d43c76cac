"""Foreign weights to our parameters and back, strict both ways.

A state dict maps official names to arrays in PyTorch's layout: linear `(out, in)`, convolution
`(out, in, h, w)`, embedding `(rows, dim)`. Its values may be numpy arrays, or tensors still on disk
(`weights.Tensor`), which are read one at a time.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from flowturbo_jax.checkpoint import mismatches
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_directory import abstract_params
from flowturbo_jax.models import NETWORKS
from flowturbo_jax.name_tables import NAME_TABLES, Entry
from flowturbo_jax.weights.tensor import Tensor, quoted

StateDict = Mapping[str, np.ndarray | Tensor]

_BATCH_NORM = r"bn\.(weight|bias|running_mean|running_var|num_batches_tracked)"
# Tensors that serve training only, or nothing that is done here, and are left out by name.
TRAINING_ONLY = {
    # REPA models/sit.py
    "sit": re.compile(r"projectors\.\d{1,4}\.\d{1,4}\.(weight|bias)"),
    # torchvision inception.py: how many batches made the statistics, and a second classifier
    "inception": re.compile(
        r"(\w+\.){1,2}bn\.num_batches_tracked"
        rf"|AuxLogits\.(conv[01]\.(conv\.weight|{_BATCH_NORM})|fc\.(weight|bias))"
    ),
    # transformers modeling_clip.py: the numbers 0, 1, 2, ..., and what makes CLIP's score of a text
    "clip": re.compile(r"(text_model\.)?embeddings\.position_ids|text_projection\.weight"),
}
OLD_ATTENTION = {  # diffusers modeling_utils.py, _convert_deprecated_attention_blocks
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


def kind_of(network: str, family: str) -> str:
    """Whose names and layouts a network's tensors have.

    Args:
      network: "predictor", "refiner", "vae" or "text_encoder".
      family: the model's, which is its predictor's and refiner's.
    """
    return {"vae": "vae", "text_encoder": "clip"}.get(network, family)


def with_known_names(
    kind: str, state: StateDict
) -> tuple[dict[str, np.ndarray | Tensor], list[str]]:
    """A state dict under the names of our tables, whichever known variant it came in.

    Args:
      kind: a key of `models.NETWORKS`.
      state: as read from a file.

    Returns:
      The state dict to convert, and the names of what it leaves out, by TRAINING_ONLY.

    Source: REPA utils.py, load_legacy_checkpoints; diffusers modeling_utils.py; torchvision
      inception.py; transformers modeling_clip.py.
    """
    unused = TRAINING_ONLY.get(kind)
    dropped = {name: None for name in state if unused and unused.fullmatch(name)}
    kept = {name: array for name, array in state.items() if name not in dropped}
    if kind == "vae":
        old = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
        return _renamed(kept, old, lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.{m[3]}"), list(dropped)
    if kind == "sit":
        first = block_count(kept)  # REPA once kept the blocks after its projectors apart
        later = re.compile(r"decoder_blocks\.(\d{1,4})\.(.+)")
        return _renamed(kept, later, lambda m: f"blocks.{first + int(m[1])}.{m[2]}"), list(dropped)
    if kind == "clip":  # transformers 5 writes a CLIPTextModel without the prefix
        bare = re.compile(r"(?:embeddings|encoder|final_layer_norm)\..+")
        return _renamed(kept, bare, lambda m: f"text_model.{m[0]}"), list(dropped)
    return kept, list(dropped)


def block_count(state: StateDict) -> int:
    """How many transformer blocks a SiT state dict has, by the names `blocks.N`.

    Raises:
      InputError: the numbers have a gap.
    """
    matches = [re.match(r"blocks\.(\d{1,4})\.", name) for name in state]
    numbers = {int(match[1]) for match in matches if match}
    if gap := set(range(max(numbers, default=-1))) - numbers:
        raise InputError(f"the weights have blocks.{max(numbers)}, but no blocks.{min(gap)}")
    return len(numbers)


def _renamed(state: StateDict, pattern: re.Pattern, name: Any) -> dict[str, np.ndarray | Tensor]:
    result = {}
    for key, array in state.items():
        match = pattern.fullmatch(key)
        new = name(match) if match else key
        if new in result:
            raise InputError(f"the weights hold {quoted(new)} twice, by its old and its new name")
        result[new] = array
    return result


def params_from_state(kind: str, config: Any, state: StateDict, dtype: Any = None) -> Params:
    """Our parameters from an official state dict; every tensor is used, and none is missing.

    Memory is that of the result and one tensor.

    Args:
      kind: a key of `models.NETWORKS`.
      config: the hyper-parameters of that network.
      state: official names and arrays.
      dtype: of the parameters; that of the weights if None.

    Returns:
      The parameters, a nested dict of numpy arrays.

    Raises:
      InputError: tensors are missing, extra, misshapen, not of numbers with a point or not finite;
        the message names all of them.
    """
    wanted = list(_official(kind, config))
    wrong = mismatches(state, {name: shape for _, _, name, shape in wanted})
    if wrong:
        raise InputError(f"the weights do not fit this {kind} model: {'; '.join(wrong)}")
    flat: dict[str, np.ndarray] = {}
    for entry, block, name, _ in wanted:
        given = np.asarray(state[name])
        # bfloat16's kind is "V", as that of any type foreign to numpy.
        if given.dtype.kind != "f" and given.dtype.name != "bfloat16":
            wrong.append(f"{name} is {given.dtype}, not floating")
            continue
        array = _to_ours(given, entry.layout).astype(dtype or given.dtype, copy=False)
        if not np.isfinite(array).all():
            wrong.append(f"{name} holds values that are not finite")
        if block is None:
            flat[entry.ours] = np.ascontiguousarray(array)
            continue
        if entry.ours not in flat:
            depth = sum(other.ours == entry.ours for other, *_ in wanted)
            flat[entry.ours] = np.empty((depth, *array.shape), array.dtype)
        flat[entry.ours][block] = array
    if wrong:
        raise InputError(f"the weights are damaged: {'; '.join(wrong)}")
    return unflatten_dict(flat, sep="/")


def state_from_params(kind: str, config: Any, params: Params) -> dict[str, np.ndarray]:
    """The official state dict of our parameters, the inverse of `params_from_state`.

    Raises:
      InputError: parameters are missing, extra or misshapen; the message names all of them.
    """
    flat = flatten_dict(params, sep="/")
    wanted = flatten_dict(abstract_params(_network(kind)(config)), sep="/")
    wrong = mismatches(flat, {name: leaf.shape for name, leaf in wanted.items()})
    if wrong:
        raise InputError(f"the parameters do not fit this {kind} model: {'; '.join(wrong)}")
    state = {}
    for entry, block, name, shape in _official(kind, config):
        array = np.asarray(flat[entry.ours])
        array = array if block is None else array[block]
        state[name] = np.ascontiguousarray(_to_official(array, entry.layout, shape))
    return state


def official_shapes(kind: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Official name and shape of every tensor of a network."""
    return {name: shape for _, _, name, shape in _official(kind, config)}


def _official(kind: str, config: Any) -> Iterator[tuple[Entry, int | None, str, tuple[int, ...]]]:
    """Yields (entry, block number or None, official name, official shape) of a model's tensors."""
    flat = flatten_dict(abstract_params(_network(kind)(config)), sep="/")
    for entry in NAME_TABLES[kind](config):
        shape = flat[entry.ours].shape
        if "{}" not in entry.official:
            yield entry, None, entry.official, _official_shape(shape, entry.layout, config)
            continue
        for block in range(shape[0]):
            name = entry.official.format(block)
            yield entry, block, name, _official_shape(shape[1:], entry.layout, config)


def _network(kind: str) -> Any:
    if kind not in NETWORKS:
        raise InputError(f"unknown kind of network {kind!r}; known are {', '.join(NETWORKS)}")
    return NETWORKS[kind]


def _official_shape(shape: tuple[int, ...], layout: str, config: Any) -> tuple[int, ...]:
    if layout == "same":
        return shape
    if layout == "conv":
        height, width, fan_in, fan_out = shape
        return (fan_out, fan_in, height, width)
    fan_in, fan_out = shape
    if layout == "linear":
        return (fan_out, fan_in)
    side = config.patch_size
    return (fan_out, fan_in // side**2, side, side)


def _to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "linear":
        return rearrange(array, "o i -> i o")
    if layout == "conv":
        return rearrange(array, "o i h w -> h w i o")
    if layout == "patch":
        return rearrange(array, "o i h w -> (h w i) o")
    return array


def _to_official(array: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    if layout == "linear":
        return rearrange(array, "i o -> o i")
    if layout == "conv":
        return rearrange(array, "h w i o -> o i h w")
    if layout == "patch":
        return rearrange(array, "(h w i) o -> o i h w", h=shape[2], w=shape[3])
    return array
