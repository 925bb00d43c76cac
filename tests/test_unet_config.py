"""Hyper-parameters of the U-Net: published sizes, config files, and what cannot be built."""

import dataclasses
import json

import golden
import jax
import pytest

from flowturbo_jax import convert, unet_architecture
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import MixtureConfig, SiTConfig, UNet, UNetConfig

SD1 = UNetConfig((64, 64))
SD2 = UNetConfig(
    (96, 96),
    attention_heads=(5, 10, 20, 20),
    cross_attention_dim=1024,
    linear_projection=True,
)
# runwayml/stable-diffusion-v1-5, unet/config.json, as it was published.
PUBLISHED = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def parameter_count(config):
    abstract = jax.eval_shape(UNet(config).initialise, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize(
    ("config", "count", "name"),
    [
        (SD1, 859_520_964, "SD 1.x U-Net"),  # "860 M"
        (SD2, 865_910_724, "SD 2.x U-Net"),
        (SD1.refiner(), 43_500_164, None),  # PAPER section 3: "43.5 M of 860 M"
    ],
)
def test_published_sizes_have_their_number_of_parameters(config, count, name):
    assert parameter_count(config) == count
    assert config.size_name == name


def test_every_tensor_of_stable_diffusion_has_a_name():
    shapes = convert.official_shapes("unet", SD1)
    assert len(shapes) == 686  # as many as in the published file
    assert shapes["up_blocks.3.attentions.2.proj_in.weight"] == (320, 320, 1, 1)
    shapes = convert.official_shapes("unet", SD2)
    assert shapes["up_blocks.3.attentions.2.proj_in.weight"] == (320, 320)
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert shapes[f"{attention}.to_k.weight"] == (1280, 1024)


def test_what_a_config_says_of_itself():
    assert SD1.shape == (64, 64, 4)
    assert (SD1.num_classes, SD1.null_label, SD1.text_width, SD1.downsampling) == (0, None, 768, 8)
    assert (SD1.head_sizes, SD2.head_sizes) == ((40, 80, 160), (64,))
    assert (SD1.refiner().head_sizes, SD2.refiner().head_sizes) == ((20, 40), (16, 32))
    assert [kind.takes_text for kind in (UNetConfig, SiTConfig, MixtureConfig)] == [1, 0, 0]
    assert "takes_text" not in {field.name for field in dataclasses.fields(UNetConfig)}
    wide = SD1.resized(64, 96)
    assert (wide.shape, wide.size_name) == ((64, 96, 4), "SD 1.x U-Net")
    assert dataclasses.replace(SD1, layers_per_block=1).size_name is None


def test_the_middle_counts_for_the_head_sizes_and_other_levels_without_text_do_not():
    fields = {"block_out_channels": (64, 64), "attention_heads": (1, 2)}
    for cross, sizes in (
        ((False, False), (32,)),
        ((True, False), (32, 64)),
        ((False, True), (32,)),
    ):
        assert UNetConfig((8, 8), **fields, cross_attention=cross).head_sizes == sizes


def test_the_refiner_is_narrower_and_shallower():
    refiner = SD1.refiner()
    assert refiner.block_out_channels == (160, 160, 320, 320)
    assert (refiner.layers_per_block, refiner.in_channels_scale) == (1, 2)
    assert (refiner.shape, refiner.text_width) == (SD1.shape, 768)
    assert SD2.refiner().block_out_channels == (160, 160, 320, 320)
    assert SD1.refiner(layers_per_block=2, norm_num_groups=16).layers_per_block == 2
    small = dataclasses.replace(SD1, block_out_channels=(96, 96, 96, 192), norm_num_groups=24)
    assert small.refiner().block_out_channels == (48, 24, 24, 48)


@pytest.mark.parametrize("fields", [{}, {"layers_per_block": 2}, {"transformer_layers": 2}])
def test_refiner_of_any_width_and_depth_fits_its_predictor(fields):
    assert SD1.check_refiner(SD1.refiner(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels_scale": 1}, "with 1 inputs side by side"),
        ({"sample_size": (64, 96)}, r"\(64, 96, 4\), 768\)"),
        ({"in_channels": 3}, r"\(64, 64, 3\), 768\)"),
        ({"cross_attention_dim": 1024}, r"\(64, 64, 4\), 1024\)"),
    ],
)
def test_refiner_of_another_predictor_is_refused(fields, message):
    with pytest.raises(InputError, match=f"the refiner is for another model's shape.*{message}"):
        SD1.check_refiner(SD1.refiner(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_size": (64,)}, "sample_size has 1 entries; it needs 2"),
        ({"sample_size": 64}, "sample_size is 64; it must be a tuple"),
        ({"sample_size": (64, 60)}, "sample_size 60 is not divisible by 8"),
        ({"sample_size": (0, 64)}, "sample_size is 0; it must be an integer in 1"),
        ({"in_channels": True}, "in_channels is True"),
        ({"in_channels": 10**400}, "in_channels is 1000"),
        ({"block_out_channels": ()}, "block_out_channels has 0 widths"),
        ({"block_out_channels": (32,) * 17}, "block_out_channels has 17 widths"),
        ({"block_out_channels": [320, 640, 1280, 1280]}, "it must be a tuple"),
        ({"block_out_channels": (320, 640, 1280, 100)}, "100 is not divisible by norm_num_groups"),
        ({"attention_heads": (8, 8, 8, 7)}, "1280 is not divisible by attention_heads 7"),
        ({"attention_heads": (8, 8, 8)}, "attention_heads has 3 entries; it needs 4"),
        ({"cross_attention": (True,)}, "cross_attention has 1 entries; it needs 4"),
        ({"cross_attention": (1, 1, 1, 0)}, "cross_attention is 1; it must be true or false"),
        ({"cross_attention_dim": 0}, "cross_attention_dim is 0"),
        ({"layers_per_block": 17}, r"layers_per_block is 17; it must be an integer in 1\.\.16"),
        ({"transformer_layers": 1.0}, r"transformer_layers is 1\.0"),
        ({"linear_projection": None}, "linear_projection is None; it must be true or false"),
        ({"norm_num_groups": 65537}, r"norm_num_groups is 65537; .* 1\.\.65536"),
        ({"in_channels_scale": -1}, "in_channels_scale is -1"),
        (
            {
                "block_out_channels": (5, 10),
                "attention_heads": (1, 1),
                "cross_attention": (True, False),
                "norm_num_groups": 5,
            },
            "5 is not divisible by 2; the first",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_hyper_parameters_are_refused(fields, message):
    with pytest.raises(InputError, match=f"U-Net .*{message}"):
        UNetConfig(**{"sample_size": (64, 64), **fields})


def test_published_config_files_are_read():
    assert unet_architecture.unet_config(PUBLISHED, refiner=False) == SD1
    heads = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
    changes = {**heads, "sample_size": 96, "use_linear_projection": True, "upcast_attention": True}
    assert unet_architecture.unet_config({**PUBLISHED, **changes}, refiner=False) == SD2
    named_right = {"num_attention_heads": 10}
    for again in (named_right, {"attention_head_dim": [10] * 4, **named_right}):
        others = {k: v for k, v in PUBLISHED.items() if k != "attention_head_dim"}
        read = unet_architecture.unet_config({**others, **again}, refiner=False)
        assert read.attention_heads == (10, 10, 10, 10)
    few = {"sample_size": [64, 32], "cross_attention_dim": 768}
    assert unet_architecture.unet_config(few, refiner=False) == SD1.resized(64, 32)


def test_a_config_file_of_todays_diffusers_is_read():
    folder = golden.FOLDER / "unet" / "unet_8ch"
    given = json.loads((folder / "config.json").read_text())
    config = unet_architecture.unet_config(given, refiner=True)
    assert config == UNetConfig(
        (8, 8),
        block_out_channels=(8, 16, 16, 24),
        layers_per_block=1,
        attention_heads=(4, 4, 4, 4),
        cross_attention_dim=32,
        norm_num_groups=8,
        in_channels_scale=2,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "UNet2D\x1b[2J"}, r"is of a 'UNet2D.x1b.*supported is UNet2DConditionM"),
        ({"strange": 1}, "unknown key 'strange'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; supported is None"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ({"dual_cross_attention": True}, "dual_cross_attention is True; supported is False"),
        ({"only_cross_attention": [True, True, False, False]}, "only_cross_attention is"),
        ({"time_embedding_type": "fourier"}, "supported is 'positional'"),
        ({"time_embedding_dim": 512}, "time_embedding_dim is 512"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        (
            {"mid_block_type": None},
            "mid_block_type is None; supported is 'UNetMidBlock2DCrossAttn'",
        ),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; supported is 'silu'"),
        ({"freq_shift": 1}, "freq_shift is 1; supported is 0"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
        ({"encoder_hid_dim": 1280}, "encoder_hid_dim is 1280"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ({"conv_in_kernel": 1}, "conv_in_kernel is 1; supported is 3"),
        ({"center_input_sample": True}, "center_input_sample is True"),
        ({"downsample_padding": 0}, "downsample_padding is 0; supported is 1"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06; supported is 1e-05"),
        ({"norm_eps": []}, r"norm_eps is \[\]; supported is 1e-05"),
        ({"attention_type": "gated"}, "attention_type is 'gated'"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10"),
        ({"sample_size": None}, r"sample_size is None; supported is .*\[height, width\]"),
        ({"sample_size": [64]}, r"sample_size is \[64\]"),
        ({"sample_size": 60}, "sample_size 60 is not divisible by 8"),
        ({"layers_per_block": [2, 2, 2, 2]}, r"layers_per_block is \[2, 2, 2, 2\]; .* an integer"),
        ({"cross_attention_dim": None}, "cross_attention_dim is None; supported is an integer"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block is"),
        ({"attention_head_dim": [5, 10, 20]}, "attention_head_dim is .* each of 4 resolutions"),
        ({"num_attention_heads": "8"}, "num_attention_heads is '8'"),
        ({"num_attention_heads": 10}, "num_attention_heads is 10 and its attention_head_dim 8; "),
        ({"num_attention_heads": 8, "attention_head_dim": "8"}, "attention_head_dim is '8'"),
        ({"attention_head_dim": None}, "attention_head_dim is None; supported is an integer"),
        ({"attention_head_dim": 7}, "320 is not divisible by attention_heads 7"),
        ({"use_linear_projection": 1}, "use_linear_projection is 1; supported is true or false"),
        ({"block_out_channels": 320}, "block_out_channels is 320; supported is a list"),
        ({"block_out_channels": [32] * 2000}, "down_block_types .* each of 2000 resolutions"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types is .* each of 4 resolutions"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types is 'AttnDownBlock2D'"),
        ({"down_block_types": [["DownBlock2D"]] * 4}, "down_block_types is"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "supported is down_block_types in reverse"),
        ({"out_channels": 8}, "in_channels is 4 and its out_channels 8; a predictor takes as many"),
        ({"in_channels": "4"}, "in_channels is '4'; supported is an integer"),
    ],
)
def test_a_config_file_that_asks_for_something_else_is_refused(fields, message):
    with pytest.raises(InputError, match=f"U-Net.*{message}") as refusal:
        unet_architecture.unet_config({**PUBLISHED, **fields}, refiner=False)
    assert "\n" not in str(refusal.value)


def test_a_refiner_takes_twice_the_channels_it_gives():
    given = {**PUBLISHED, "in_channels": 8}
    assert unet_architecture.unet_config(given, refiner=True).in_channels_scale == 2
    with pytest.raises(InputError, match="a predictor takes as many as it gives"):
        unet_architecture.unet_config(given, refiner=False)
    with pytest.raises(InputError, match="a refiner takes twice as many as it gives"):
        unet_architecture.unet_config(PUBLISHED, refiner=True)


OTHER = UNetConfig(  # nothing as diffusers has it by default
    (32, 48),
    in_channels=8,
    block_out_channels=(64, 96),
    layers_per_block=3,
    attention_heads=(2, 3),
    cross_attention=(False, True),
    cross_attention_dim=40,
    transformer_layers=2,
    linear_projection=True,
    norm_num_groups=16,
)


@pytest.mark.parametrize("config", [SD1, SD2, SD1.refiner(), OTHER])
def test_diffusers_config_is_read_back(config):
    written = json.loads(json.dumps(unet_architecture.diffusers_config(config)))
    refiner = config.in_channels_scale == 2
    assert unet_architecture.unet_config(written, refiner=refiner) == config


def test_diffusers_config_says_what_the_published_one_says():
    written = unet_architecture.diffusers_config(SD1)
    per_level = {"attention_head_dim": [PUBLISHED["attention_head_dim"]] * 4}
    for key, value in (PUBLISHED | per_level).items():
        if key in written:
            assert written[key] == value, key
