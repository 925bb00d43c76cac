"""Hyper-parameters read off names, shapes and config files."""

import dataclasses
import time

import golden
import jax
import ml_dtypes
import numpy as np
import pytest

from flowturbo_jax import architecture, convert
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import SiTConfig


def test_blocks_that_repa_kept_apart_are_put_together():
    state = golden.weights("sit/sit_micro")
    legacy = {
        name.replace("blocks.1.", "decoder_blocks.0."): array for name, array in state.items()
    }
    renamed, dropped = convert.with_known_names("sit", legacy)
    assert not dropped
    assert set(renamed) == set(state)
    np.testing.assert_array_equal(
        renamed["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"]
    )


def test_blocks_with_a_gap_are_refused():
    state = {"blocks.0.x": np.zeros(1), "blocks.9999.x": np.zeros(1)}
    with pytest.raises(InputError, match=r"blocks\.9999, but no blocks\.1"):
        convert.block_count(state)


def test_many_names_take_no_time_out_of_proportion():
    state = {f"projectors.{i % 9999}.{i // 9999}.weight": np.zeros(1) for i in range(90_000)}
    start = time.perf_counter()
    kept, dropped = convert.with_known_names("sit", state)
    assert (len(kept), len(dropped)) == (0, 90_000)
    assert time.perf_counter() - start < 5  # 0.1 s; minutes when it grew with the square


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_per_block": 1_000_000}, "layers_per_block is"),
        ({"layers_per_block": 17}, "layers_per_block is 17; at most 16"),
        ({"block_out_channels": [32] * 2000}, "has 2000 widths"),
        ({"block_out_channels": 32}, "no list"),
        ({"in_channels": 10**400}, "in_channels is 1000"),
        ({"_class_name": "Auto\x1b[2J"}, r"is of a 'Auto.x1b"),
        ({"strange": 1}, "unknown key 'strange'"),
        ({"act_fn": "relu"}, "act_fn is 'relu'; supported is 'silu'"),
        ({"down_block_types": ["AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"latents_mean": [0.0]}, "latents_mean"),
    ],
)
def test_a_vae_config_that_cannot_be_is_refused_at_once(fields, message):
    with pytest.raises(InputError, match=message):
        architecture.vae_config({"block_out_channels": [32], **fields})


def test_a_picture_of_absurdly_many_tokens_is_refused():
    state = {**golden.weights("sit/sit"), "pos_embed": np.broadcast_to(0.0, (1, 129**2, 64))}
    with pytest.raises(InputError, match="129 x 129 tokens; at most 128"):
        architecture.sit_config(state, {"num_heads": 4}, refiner=False)


def test_bfloat16_weights_convert_to_float32():
    state = golden.weights("sit/sit_micro")
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    params = convert.params_from_state("sit", golden.MICRO, halves, np.float32)
    exact = convert.params_from_state("sit", golden.MICRO, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), params, exact)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("side", [32, 64])
def test_official_sizes_are_known_by_their_shapes(size, patch, side):
    config = SiTConfig.named(
        f"SiT-{size}/{patch}", input_size=side, in_channels=4, num_classes=1000
    )
    for wanted, refiner in (
        (config, False),
        (config.refiner(), True),
        (dataclasses.replace(config, in_channels_scale=2), True),  # a SiT-S refiner, and such
    ):
        shapes = convert.official_shapes("sit", wanted)
        state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        found = architecture.sit_config(state, {}, refiner=refiner)
        assert found == wanted
    assert config.size_name == f"SiT-{size}/{patch}"


def test_a_vae_config_keeps_its_scaling():
    given = {"block_out_channels": [32, 64], "scaling_factor": 0.3611, "shift_factor": 0.1159}
    config = architecture.vae_config({**given, "layers_per_block": 2, "latent_channels": 16})
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)
    assert (config.layers_per_block, config.latent_channels) == (2, 16)
    assert architecture.vae_config({"block_out_channels": [32]}).layers_per_block == 1
    with pytest.raises(InputError, match="is of a 'AutoencoderTiny'"):
        architecture.vae_config({"_class_name": "AutoencoderTiny"})


@pytest.mark.parametrize(
    ("dropout", "classes", "null"), [(0.1, 10, True), (0, 11, False), (None, 10, True)]
)
def test_the_null_class_follows_the_label_dropout(dropout, classes, null):
    given = {"num_heads": 4} | ({} if dropout is None else {"class_dropout_prob": dropout})
    config = architecture.sit_config(golden.weights("sit/sit"), given, refiner=False)
    assert (config.num_classes, config.null_class) == (classes, null)


def test_a_thousand_rows_are_a_thousand_classes():
    state = {
        **golden.weights("sit/sit"),
        "y_embedder.embedding_table.weight": np.zeros((1000, 64), np.float32),
    }
    config = architecture.sit_config(state, {"num_heads": 4}, refiner=False)
    assert (config.num_classes, config.null_label) == (1000, None)
