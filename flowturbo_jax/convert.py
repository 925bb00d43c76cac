"""Foreign weights to our parameters and back: one name table per family, strict both ways.

A state dict maps official names to numpy arrays in PyTorch's layout: linear `(out, in)`,
convolution `(out, in, h, w)`, embedding `(rows, dim)`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from flowturbo_jax.checkpoint import mismatches
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_directory import abstract_params
from flowturbo_jax.models import family

StateDict = Mapping[str, np.ndarray]


class Entry(NamedTuple):
    """One row of a name table.

    Attributes:
      official: name in the state dict; `{}` stands for the number of a block.
      ours: path in the parameters, joined by "/"; blocks are stacked on a first axis.
      layout: "same", "linear" (transposed) or "patch" (a convolution whose kernel is its stride).
    """

    official: str
    ours: str
    layout: str = "same"


def _linear(official: str, ours: str, layout: str = "linear") -> list[Entry]:
    return [
        Entry(f"{official}.weight", f"{ours}/kernel", layout),
        Entry(f"{official}.bias", f"{ours}/bias"),
    ]


SIT = [
    *_linear("x_embedder.proj", "patch_embedding", "patch"),
    *_linear("t_embedder.mlp.0", "time_embedding/up"),
    *_linear("t_embedder.mlp.2", "time_embedding/down"),
    Entry("y_embedder.embedding_table.weight", "label_embedding/embedding"),
    Entry("pos_embed", "position_table"),
    *_linear("blocks.{}.attn.qkv", "blocks/attention/qkv"),
    *_linear("blocks.{}.attn.proj", "blocks/attention/out"),
    *_linear("blocks.{}.mlp.fc1", "blocks/mlp/up"),
    *_linear("blocks.{}.mlp.fc2", "blocks/mlp/down"),
    *_linear("blocks.{}.adaLN_modulation.1", "blocks/modulation"),
    *_linear("final_layer.adaLN_modulation.1", "final/modulation"),
    *_linear("final_layer.linear", "final/linear"),
]
NAME_TABLES = {"sit": SIT}


def params_from_state(family_name: str, config: Any, state: StateDict) -> Params:
    """Our parameters from an official state dict; every tensor is used, and none is missing.

    Args:
      family_name: a key of `models.FAMILIES`.
      config: that family's hyper-parameters, of a predictor or a refiner.
      state: official names and arrays; their dtype is kept.

    Returns:
      The parameters, a nested dict of numpy arrays.

    Raises:
      InputError: tensors are missing, extra or misshapen; the message names all of them.
    """
    wanted = {
        name: (entry, block, shape) for entry, block, name, shape in _official(family_name, config)
    }
    wrong = mismatches(state, {name: shape for name, (_, _, shape) in wanted.items()})
    if wrong:
        raise InputError(f"the weights do not fit this {family_name} model: {'; '.join(wrong)}")
    flat: dict[str, Any] = {}
    for name, (entry, block, _) in wanted.items():
        array = _to_ours(np.asarray(state[name]), entry.layout)
        if block is None:
            flat[entry.ours] = array
        else:
            flat.setdefault(entry.ours, []).append(array)
    stacked = {k: np.stack(v) if isinstance(v, list) else v for k, v in flat.items()}
    return unflatten_dict(stacked, sep="/")


def state_from_params(family_name: str, config: Any, params: Params) -> dict[str, np.ndarray]:
    """The official state dict of our parameters, the inverse of `params_from_state`.

    Raises:
      InputError: parameters are missing, extra or misshapen; the message names all of them.
    """
    flat = flatten_dict(params, sep="/")
    wanted = flatten_dict(abstract_params(family(family_name).network(config)), sep="/")
    wrong = mismatches(flat, {name: leaf.shape for name, leaf in wanted.items()})
    if wrong:
        raise InputError(f"the parameters do not fit this {family_name} model: {'; '.join(wrong)}")
    state = {}
    for entry, block, name, shape in _official(family_name, config):
        array = np.asarray(flat[entry.ours])
        array = array if block is None else array[block]
        state[name] = np.ascontiguousarray(_to_official(array, entry.layout, shape))
    return state


def _official(family_name: str, config: Any):
    """Yields (entry, block number or None, official name, official shape) of a model's tensors."""
    flat = flatten_dict(abstract_params(family(family_name).network(config)), sep="/")
    for entry in NAME_TABLES[family_name]:
        if entry.ours not in flat:  # an unconditional model has no label table
            continue
        shape = flat[entry.ours].shape
        if "{}" not in entry.official:
            yield entry, None, entry.official, _official_shape(shape, entry.layout, config)
            continue
        for block in range(shape[0]):
            name = entry.official.format(block)
            yield entry, block, name, _official_shape(shape[1:], entry.layout, config)


def _official_shape(shape: tuple[int, ...], layout: str, config: Any) -> tuple[int, ...]:
    if layout == "same":
        return shape
    fan_in, fan_out = shape
    if layout == "linear":
        return (fan_out, fan_in)
    side = config.patch_size
    return (fan_out, fan_in // side**2, side, side)


def _to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "linear":
        return rearrange(array, "o i -> i o")
    if layout == "patch":
        return rearrange(array, "o i h w -> (h w i) o")
    return array


def _to_official(array: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    if layout == "linear":
        return rearrange(array, "i o -> o i")
    if layout == "patch":
        return rearrange(array, "(h w i) o -> o i h w", h=shape[2], w=shape[3])
    return array
