"""Official names of every network's tensors, beside ours: one table per kind of network."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flowturbo_jax.models import CLIPTextConfig, InceptionConfig, SiTConfig, UNetConfig, VAEConfig
from flowturbo_jax.models.inception_blocks import convolutions


class Entry(NamedTuple):
    """One row of a name table.

    Attributes:
      official: name in the state dict; `{}` stands for the number of a block.
      ours: path in the parameters, joined by "/"; blocks are stacked on a first axis.
      layout: "same", "linear" (transposed), "conv" (channels last) or "patch" (a convolution whose
        kernel is its stride, as a linear map of a patch).
    """

    official: str
    ours: str
    layout: str = "same"


def _layer(official: str, ours: str, layout: str) -> list[Entry]:
    return [
        Entry(f"{official}.weight", f"{ours}/kernel", layout),
        Entry(f"{official}.bias", f"{ours}/bias"),
    ]


def _norm(official: str, ours: str) -> list[Entry]:
    return [
        Entry(f"{official}.weight", f"{ours}/scale"),
        Entry(f"{official}.bias", f"{ours}/bias"),
    ]


def sit(config: SiTConfig) -> list[Entry]:
    """SiT and its refiner. Source: SiT models.py, FlowTurbo models_assemble.py."""
    labels = [Entry("y_embedder.embedding_table.weight", "label_embedding/embedding")]
    return [
        *_layer("x_embedder.proj", "patch_embedding", "patch"),
        *_layer("t_embedder.mlp.0", "time_embedding/up", "linear"),
        *_layer("t_embedder.mlp.2", "time_embedding/down", "linear"),
        *(labels if config.num_classes else []),
        Entry("pos_embed", "position_table"),
        *_layer("blocks.{}.attn.qkv", "blocks/attention/qkv", "linear"),
        *_layer("blocks.{}.attn.proj", "blocks/attention/out", "linear"),
        *_layer("blocks.{}.mlp.fc1", "blocks/mlp/up", "linear"),
        *_layer("blocks.{}.mlp.fc2", "blocks/mlp/down", "linear"),
        *_layer("blocks.{}.adaLN_modulation.1", "blocks/modulation", "linear"),
        *_layer("final_layer.adaLN_modulation.1", "final/modulation", "linear"),
        *_layer("final_layer.linear", "final/linear", "linear"),
    ]


def vae(config: VAEConfig) -> list[Entry]:
    """The autoencoder. Source: diffusers autoencoder_kl.py, vae.py, unet_2d_blocks.py."""
    widths = config.block_out_channels
    last = len(widths) - 1
    entries = _layer("encoder.conv_in", "encoder/conv_in", "conv")
    entries += _layer("decoder.conv_in", "decoder/conv_in", "conv")
    for level, width in enumerate(widths):
        official, ours = f"encoder.down_blocks.{level}", f"encoder/down_{level}"
        for layer in range(config.layers_per_block):
            grows = layer == 0 and width != widths[max(level - 1, 0)]
            entries += _residual(f"{official}.resnets.{layer}", f"{ours}_resnet_{layer}", grows)
        if level < last:
            entries += _layer(f"{official}.downsamplers.0.conv", f"{ours}_downsample", "conv")
    for level, width in enumerate(widths[::-1]):
        official, ours = f"decoder.up_blocks.{level}", f"decoder/up_{level}"
        for layer in range(config.layers_per_block + 1):
            shrinks = layer == 0 and width != widths[::-1][max(level - 1, 0)]
            entries += _residual(f"{official}.resnets.{layer}", f"{ours}_resnet_{layer}", shrinks)
        if level < last:
            entries += _layer(f"{official}.upsamplers.0.conv", f"{ours}_upsample", "conv")
    for half in ("encoder", "decoder"):
        entries += _residual(f"{half}.mid_block.resnets.0", f"{half}/mid/resnet_0", False)
        entries += _residual(f"{half}.mid_block.resnets.1", f"{half}/mid/resnet_1", False)
        if config.mid_block_add_attention:
            official, ours = f"{half}.mid_block.attentions.0", f"{half}/mid/attention"
            entries += _norm(f"{official}.group_norm", f"{ours}/norm")
            for theirs, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "out")):
                entries += _layer(f"{official}.to_{theirs}", f"{ours}/{name}", "linear")
        entries += _norm(f"{half}.conv_norm_out", f"{half}/norm_out")
        entries += _layer(f"{half}.conv_out", f"{half}/conv_out", "conv")
    if config.use_quant_conv:
        entries += _layer("quant_conv", "encoder/quant", "conv")
    if config.use_post_quant_conv:
        entries += _layer("post_quant_conv", "decoder/post_quant", "conv")
    return entries


def _residual(official: str, ours: str, shortcut: bool) -> list[Entry]:
    entries = []
    for part in ("1", "2"):
        entries += _norm(f"{official}.norm{part}", f"{ours}/norm{part}")
        entries += _layer(f"{official}.conv{part}", f"{ours}/conv{part}", "conv")
    if shortcut:
        entries += _layer(f"{official}.conv_shortcut", f"{ours}/shortcut", "conv")
    return entries


def inception(config: InceptionConfig) -> list[Entry]:
    """FID's Inception v3. Source: pytorch-fid inception.py, torchvision inception.py."""
    entries = _layer("fc", "fc", "linear")
    for ours in convolutions():
        official = ours.replace("/", ".")
        entries.append(Entry(f"{official}.conv.weight", f"{ours}/kernel", "conv"))
        entries += _norm(f"{official}.bn", ours)
        entries.append(Entry(f"{official}.bn.running_mean", f"{ours}/mean"))
        entries.append(Entry(f"{official}.bn.running_var", f"{ours}/var"))
    return entries


def clip(config: CLIPTextConfig) -> list[Entry]:
    """CLIP's text encoder. Source: transformers modeling_clip.py."""
    layer = "text_model.encoder.layers.{}"
    attention = (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
    embeddings = "text_model.embeddings"
    entries = [
        Entry(f"{embeddings}.token_embedding.weight", "token_embedding/embedding"),
        Entry(f"{embeddings}.position_embedding.weight", "position_embedding"),
        *_norm("text_model.final_layer_norm", "final_norm"),
    ]
    for theirs, ours in attention:
        entries += _layer(f"{layer}.self_attn.{theirs}_proj", f"layers/{ours}", "linear")
    for theirs, ours in (("fc1", "up"), ("fc2", "down")):
        entries += _layer(f"{layer}.mlp.{theirs}", f"layers/{ours}", "linear")
    for number in ("1", "2"):
        entries += _norm(f"{layer}.layer_norm{number}", f"layers/norm{number}")
    return entries


def unet(config: UNetConfig) -> list[Entry]:
    """The text-to-image U-Net. Source: diffusers unet_2d_condition.py, unet_2d_blocks.py."""
    widths = config.block_out_channels
    last, layers = len(widths) - 1, config.layers_per_block
    entries = _layer("conv_in", "conv_in", "conv")
    entries += _layer("time_embedding.linear_1", "time_embedding/up", "linear")
    entries += _layer("time_embedding.linear_2", "time_embedding/down", "linear")
    for level, width in enumerate(widths):
        official, ours = f"down_blocks.{level}", f"down_{level}"
        grows = width != widths[max(level - 1, 0)]
        shortcuts = [grows] + [False] * (layers - 1)
        attends = layers * config.cross_attention[level]
        entries += _stage(config, official, ours, shortcuts, attends)
        if level < last:
            entries += _layer(f"{official}.downsamplers.0.conv", f"{ours}/downsample", "conv")
    entries += _stage(config, "mid_block", "middle", [False, False], 1)
    for number, level in enumerate(reversed(range(len(widths)))):
        official, ours = f"up_blocks.{number}", f"up_{number}"
        attends = (layers + 1) * config.cross_attention[level]
        entries += _stage(config, official, ours, [True] * (layers + 1), attends)
        if level:
            entries += _layer(f"{official}.upsamplers.0.conv", f"{ours}/upsample", "conv")
    entries += _norm("conv_norm_out", "norm_out")
    return entries + _layer("conv_out", "conv_out", "conv")


def _stage(
    config: UNetConfig, official: str, ours: str, shortcuts: list[bool], transformers: int
) -> list[Entry]:
    """A U-Net's residual layers, by whether each changes the width, and its transformers."""
    entries = []
    for layer, shortcut in enumerate(shortcuts):
        theirs, name = f"{official}.resnets.{layer}", f"{ours}/residual_layers_{layer}"
        entries += _residual(theirs, name, shortcut)
        entries += _layer(f"{theirs}.time_emb_proj", f"{name}/time", "linear")
    for layer in range(transformers):
        theirs, name = f"{official}.attentions.{layer}", f"{ours}/transformers_{layer}"
        projection = "linear" if config.linear_projection else "conv"
        entries += _norm(f"{theirs}.norm", f"{name}/norm")
        entries += _layer(f"{theirs}.proj_in", f"{name}/project_in", projection)
        entries += _layer(f"{theirs}.proj_out", f"{name}/project_out", projection)
        for block in range(config.transformer_layers):
            entries += _text_block(f"{theirs}.transformer_blocks.{block}", f"{name}/blocks_{block}")
    return entries


def _text_block(official: str, ours: str) -> list[Entry]:
    entries = []
    for number in ("1", "2", "3"):
        entries += _norm(f"{official}.norm{number}", f"{ours}/norm{number}")
    for attn, name in (("attn1", "self_attention"), ("attn2", "cross_attention")):
        for theirs, part in (("q", "query"), ("k", "key"), ("v", "value")):  # without bias
            weight = f"{official}.{attn}.to_{theirs}.weight"
            entries.append(Entry(weight, f"{ours}/{name}/{part}/kernel", "linear"))
        entries += _layer(f"{official}.{attn}.to_out.0", f"{ours}/{name}/out", "linear")
    entries += _layer(f"{official}.ff.net.0.proj", f"{ours}/feed_forward/up", "linear")
    return entries + _layer(f"{official}.ff.net.2", f"{ours}/feed_forward/down", "linear")


NAME_TABLES: dict[str, Callable[[Any], list[Entry]]] = {
    "sit": sit,
    "vae": vae,
    "inception": inception,
    "clip": clip,
    "unet": unet,
}
