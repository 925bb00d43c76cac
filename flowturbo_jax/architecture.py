"""Hyper-parameters of published weights: read off the tensors' shapes, and from their config.json.

Shapes tell everything but the number of attention heads, which is that of the published size of the
same width unless a config says otherwise.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from flowturbo_jax.convert import StateDict, block_count
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import SiTConfig, VAEConfig
from flowturbo_jax.models.sit import SIZES
from flowturbo_jax.weights.tensor import quoted

# Keys of a SiT config.json: the arguments of the official class, and our reversed_time.
SIT_KEYS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "num_classes",
    "learn_sigma",
    "mlp_ratio",
    "class_dropout_prob",
    "frequency_embedding_size",
    "in_channels_scale",
    "reversed_time",
)
HEADS = {hidden_size: heads for _, hidden_size, heads in SIZES.values()}
IMAGENET_CLASSES = 1000
LATENT_CHANNELS = 4  # of Stable Diffusion's VAE, which all published SiT weights use
MAX_TOKENS_PER_SIDE = 128  # 2048 x 2048 pixels at patch 2; attention's memory grows as its square^2

# Keys of diffusers' AutoencoderKL config that change nothing in the network's function.
VAE_SILENT = ("sample_size", "force_upcast")
VAE_FIXED = {  # and those we have one form of
    "act_fn": ("silu",),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "latents_mean": (None,),
    "latents_std": (None,),
}
# diffusers autoencoder_kl.py, where they differ from Stable Diffusion's.
DIFFUSERS_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1}


def sit_config(
    state: StateDict,
    given: Mapping[str, Any],
    *,
    refiner: bool,
    reversed_time: bool = False,
    like: SiTConfig | None = None,
) -> SiTConfig:
    """The hyper-parameters of a SiT's state dict.

    Args:
      state: official names, and anything with a shape.
      given: what a config file says, by the keys in `SIT_KEYS`; may be empty.
      refiner: whether the weights are to be a refiner's, over [x, v].
      reversed_time: whether they were trained with the reversed clock.
      like: a network that has as many heads, if it is as wide.

    Raises:
      InputError: the tensors are not a SiT's, the config does not fit them, or the number of heads
        is not known.
    """
    if unknown := sorted(given.keys() - set(SIT_KEYS)):
        raise InputError(
            f"the SiT config has the unknown key {quoted(unknown[0])}; known are "
            f"{', '.join(SIT_KEYS)}"
        )
    found = _sit_shapes(state)
    inputs, outputs = found.pop("inputs"), found.pop("outputs")
    if refiner and inputs % 2:
        raise InputError(f"a refiner takes x and v side by side, but these weights take {inputs}")
    scale = 2 if refiner else 1
    channels = inputs // scale
    if outputs not in (channels, 2 * channels):
        role = "refiner" if refiner else "predictor"
        raise InputError(
            f"these are no weights of a {role}: they take {inputs} channels and give {outputs}"
        )
    if not refiner and inputs == outputs == 2 * LATENT_CHANNELS and "in_channels" not in given:
        raise InputError(
            f"these weights look like a refiner's (from {inputs} channels to {outputs}); give them "
            f'as --refiner, or say by a config with {{"in_channels": {inputs}}} that they are not'
        )
    rows = found.pop("rows")
    null_class = rows not in (0, IMAGENET_CLASSES)
    dropout = given.get("class_dropout_prob")
    if dropout is not None:
        if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
            raise InputError("the SiT config's class_dropout_prob is no number from 0 to 1")
        null_class = dropout > 0 and rows > 0  # official: no dropping, no row for it
    if type(given.get("num_classes")) is int:
        null_class = rows == given["num_classes"] + 1
    heads = HEADS if like is None else {**HEADS, like.hidden_size: like.num_heads}
    found |= {
        "in_channels": channels,
        "in_channels_scale": scale,
        "learn_sigma": outputs == 2 * channels,
        "num_classes": rows - null_class,
        "num_heads": given.get("num_heads", heads.get(found["hidden_size"])),
        "reversed_time": given.get("reversed_time", reversed_time),
    }
    compared = {key: value for key, value in given.items() if key != "class_dropout_prob"}
    wrong = [
        f"{key} is {value!r}, the weights have {found[key]!r}"
        for key, value in compared.items()
        if value != found[key]
    ]
    if wrong:
        raise InputError(f"the config does not fit the weights: {'; '.join(wrong)}")
    if found["num_heads"] is None:
        raise InputError(
            f"no published size is {found['hidden_size']} wide, so the number of attention heads "
            f"is not known; give --{'refiner' if refiner else 'predictor'}-config with a file "
            'such as {"num_heads": 16}'
        )
    return SiTConfig(**found, null_class=null_class)


def _sit_shapes(state: StateDict) -> dict[str, Any]:
    """What the shapes of a SiT's tensors say, with its raw inputs, outputs and label rows."""
    wanted = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "t_embedder.mlp.0.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    for name, rank in wanted.items():
        if name not in state:
            some = ", ".join(quoted(name) for name in list(state)[:3])
            raise InputError(f"the weights are no SiT's: {name} is missing (they have {some}, ...)")
        if len(state[name].shape) != rank or 0 in state[name].shape:
            raise InputError(f"the weights are no SiT's: {name} is {list(state[name].shape)}")
    hidden_size, inputs, patch_size, _ = state["x_embedder.proj.weight"].shape
    tokens = state["pos_embed"].shape[1]
    if tuple(state["pos_embed"].shape) != (1, tokens, hidden_size):
        raise InputError(
            f"pos_embed is {list(state['pos_embed'].shape)}, not [1, tokens, {hidden_size}]"
        )
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise InputError(f"pos_embed is of {tokens} tokens, which is no square")
    if side > MAX_TOKENS_PER_SIDE:
        raise InputError(
            f"pos_embed is of {side} x {side} tokens; at most {MAX_TOKENS_PER_SIDE} a side are read"
        )
    outputs, remainder = divmod(state["final_layer.linear.weight"].shape[0], patch_size**2)
    if remainder:
        raise InputError("final_layer.linear.weight does not fill patches: its rows do not divide")
    ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size
    labels = state.get("y_embedder.embedding_table.weight")
    return {
        "input_size": side * patch_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": block_count(state),
        "mlp_ratio": ratio,
        "frequency_embedding_size": state["t_embedder.mlp.0.weight"].shape[1],
        "inputs": inputs,
        "outputs": outputs,
        "rows": 0 if labels is None else labels.shape[0],
    }


def vae_config(given: Mapping[str, Any]) -> VAEConfig:
    """The hyper-parameters of diffusers' AutoencoderKL config.json.

    Raises:
      InputError: the config is of another class, or asks for something this library has not.
    """
    given = {key: value for key, value in given.items() if key not in VAE_SILENT}
    name = given.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise InputError(
            f"the VAE's config is of a {quoted(str(name))}; supported is AutoencoderKL"
        )
    given = {key: value for key, value in given.items() if not key.startswith("_")}
    for key, known in VAE_FIXED.items():
        values = given.pop(key, known[0])
        for value in values if isinstance(values, list) else [values]:
            if value not in known:
                raise InputError(f"the VAE's {key} is {value!r}; supported is {known[0]!r}")
    if given.get("shift_factor", 0.0) is None:
        given["shift_factor"] = 0.0
    given = {**DIFFUSERS_DEFAULTS, **given}
    if not isinstance(given["block_out_channels"], list):
        raise InputError("the VAE's block_out_channels is no list of numbers")
    given["block_out_channels"] = tuple(given["block_out_channels"])
    known_keys = {field.name for field in dataclasses.fields(VAEConfig)}
    if unknown := sorted(given.keys() - known_keys):
        raise InputError(f"the VAE's config has the unknown key {quoted(unknown[0])}")
    return VAEConfig(**given)
