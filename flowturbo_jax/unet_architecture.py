"""Hyper-parameters of a published text-to-image U-Net, from its config.json."""

from collections.abc import Mapping
from typing import Any

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import UNetConfig
from flowturbo_jax.weights.tensor import quoted

CLASS = "UNet2DConditionModel"
# Our hyper-parameters that are one number each, by diffusers' key, with diffusers' default.
NUMBERS = {
    "layers_per_block": ("layers_per_block", 2),
    "cross_attention_dim": ("cross_attention_dim", 1280),
    "transformer_layers_per_block": ("transformer_layers", 1),
    "norm_num_groups": ("norm_num_groups", 32),
}
LISTS: dict[str, Any] = {  # keys that hold one entry per resolution
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # and whether they see the text
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
FIXED: dict[str, tuple[Any, ...]] = {  # of which we have one form: the keys' values that mean it
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# What changes nothing: our logits are in float32 anyhow, and the heads are those of a layer that
# addition_embed_type would add.
SILENT = ("dropout", "upcast_attention", "addition_embed_type_num_heads")
READ = (
    "sample_size",
    "in_channels",
    "out_channels",
    "use_linear_projection",
    "attention_head_dim",
    "num_attention_heads",
)


def unet_config(given: Mapping[str, Any], *, refiner: bool) -> UNetConfig:
    """The hyper-parameters of diffusers' UNet2DConditionModel config.json.

    Args:
      given: what the file says.
      refiner: whether the weights are to be a refiner's, over [x, v].

    Raises:
      InputError: the config is of another class, asks for something this library has not, or is of
        no network in that role.
    """
    name = given.get("_class_name", CLASS)
    if name != CLASS:
        raise InputError(f"the U-Net's config is of a {quoted(str(name))}; supported is {CLASS}")
    given = {key: value for key, value in given.items() if not key.startswith("_")}
    if unknown := sorted(given.keys() - {*NUMBERS, *LISTS, *FIXED, *SILENT, *READ}):
        raise InputError(f"the U-Net's config has the unknown key {quoted(unknown[0])}")
    _check_fixed(given)
    widths = _list(given, "block_out_channels")
    linear = given.get("use_linear_projection", False)
    if not isinstance(linear, bool):
        raise _unsupported("use_linear_projection", linear, "true or false")
    numbers = {
        ours: _number(key, given.get(key, default)) for key, (ours, default) in NUMBERS.items()
    }
    return UNetConfig(
        sample_size=_sample_size(given.get("sample_size")),
        **_channels(given, refiner),
        block_out_channels=tuple(_number("block_out_channels", width) for width in widths),
        attention_heads=_heads(given, len(widths)),
        cross_attention=_cross_attention(given, len(widths)),
        linear_projection=linear,
        **numbers,
    )


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """What diffusers' config.json says of these hyper-parameters; `unet_config` reads it back."""
    height, width = config.sample_size
    seen = config.cross_attention
    down, up = ({sees: name for name, sees in known.items()} for known in (DOWN_BLOCKS, UP_BLOCKS))
    return {
        "_class_name": CLASS,
        "sample_size": height if height == width else [height, width],
        "in_channels": config.in_channels * config.in_channels_scale,
        "out_channels": config.in_channels,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": [down[sees] for sees in seen],
        "up_block_types": [up[sees] for sees in reversed(seen)],
        "attention_head_dim": list(config.attention_heads),  # their number; see `_heads`
        "use_linear_projection": config.linear_projection,
        **{key: getattr(config, ours) for key, (ours, _) in NUMBERS.items()},
    }


def _check_fixed(given: Mapping[str, Any]) -> None:
    for key, known in FIXED.items():
        value = given.get(key, known[0])
        per_block = key == "only_cross_attention" and isinstance(value, list)
        if any(part not in known for part in (value if per_block else [value])):
            raise _unsupported(key, value, " or ".join(repr(one) for one in known))


def _sample_size(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or any(type(side) is not int for side in sides):
        raise _unsupported("sample_size", value, "the latents' side, or [height, width]")
    return (sides[0], sides[1])


def _channels(given: Mapping[str, Any], refiner: bool) -> dict[str, int]:
    """Channels of the latents, and how many arrays of them enter side by side."""
    inputs, outputs = (_number(key, given.get(key, 4)) for key in ("in_channels", "out_channels"))
    scale = 2 if refiner else 1
    if inputs != scale * outputs:
        role, wanted = ("refiner", "twice as many") if refiner else ("predictor", "as many")
        raise InputError(
            f"the U-Net's in_channels is {inputs} and its out_channels {outputs}; a {role} takes "
            f"{wanted} as it gives"
        )
    return {"in_channels": outputs, "in_channels_scale": scale}


def _heads(given: Mapping[str, Any], levels: int) -> tuple[int, ...]:
    """Attention heads at each resolution.

    Source: diffusers unet_2d_condition.py: attention_head_dim is their number, a wrong name that
    was kept. It refuses the right name; here that is taken where the two do not differ.
    """
    named_right = given.get("num_attention_heads")
    if named_right is None:
        return _heads_of("attention_head_dim", given.get("attention_head_dim", 8), levels)
    heads = _heads_of("num_attention_heads", named_right, levels)
    kept = given.get("attention_head_dim")
    if kept is not None and _heads_of("attention_head_dim", kept, levels) != heads:
        raise InputError(
            f"the U-Net's num_attention_heads is {named_right!r:.99} and its attention_head_dim "
            f"{kept!r:.99}; both are the number of heads, so give one of them, or the same twice"
        )
    return heads


def _heads_of(key: str, value: Any, levels: int) -> tuple[int, ...]:
    heads = value if isinstance(value, list) else [value] * levels
    if len(heads) != levels:
        raise _unsupported(key, value, f"a number, or one for each of {levels} resolutions")
    return tuple(_number(key, number) for number in heads)


def _cross_attention(given: Mapping[str, Any], levels: int) -> tuple[bool, ...]:
    """Which resolutions see the text, the finest first."""
    seen = []
    for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        blocks = _list(given, key)
        if len(blocks) != levels:
            raise _unsupported(key, blocks, f"one for each of {levels} resolutions")
        for block in blocks:
            if not isinstance(block, str) or block not in known:
                raise _unsupported(key, block, " and ".join(known))
        seen.append(tuple(known[block] for block in blocks))
    down, up = seen
    if up != down[::-1]:
        raise _unsupported(
            "up_block_types", _list(given, "up_block_types"), "down_block_types in reverse"
        )
    return down


def _list(given: Mapping[str, Any], key: str) -> list[Any]:
    value = given.get(key, LISTS[key])
    if not isinstance(value, list):
        raise _unsupported(key, value, "a list of one entry per resolution")
    return value


def _number(key: str, value: Any) -> int:
    if type(value) is not int:
        raise _unsupported(key, value, "an integer")
    return value


def _unsupported(key: str, value: Any, supported: str) -> InputError:
    return InputError(f"the U-Net's {key} is {value!r:.99}; supported is {supported}")
