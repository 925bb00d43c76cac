"""Weights of the official code, to our parameters and back."""

import dataclasses

import golden
import jax
import numpy as np
import pytest

from flowturbo_jax import convert
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import SiT

STORED = [
    ("sit/sit", golden.SIT),
    ("sit/sit_micro", golden.MICRO),
    ("refiner/refiner", golden.REFINER),
]


def assert_same_bits(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        assert (array.shape, array.dtype) == (theirs[name].shape, theirs[name].dtype), name
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize(("name", "config"), STORED)
def test_official_weights_survive_the_round_trip_bit_for_bit(name, config):
    state = golden.weights(name)
    params = convert.params_from_state("sit", config, state)
    assert_same_bits(convert.state_from_params("sit", config, params), state)


@pytest.mark.parametrize(("name", "config"), STORED)
def test_converted_parameters_have_the_form_of_fresh_ones(name, config):
    params = convert.params_from_state("sit", config, golden.weights(name))
    fresh = jax.eval_shape(SiT(config).initialise, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), fresh
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 0},
        {"null_class": False},
        {"learn_sigma": False, "in_channels": 3, "patch_size": 4},
        {"in_channels_scale": 2, "depth": 1},
    ],
)
def test_our_parameters_survive_the_round_trip_bit_for_bit(changes):
    config = dataclasses.replace(golden.MICRO, **changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(SiT(config).initialise, jax.random.key(0)),
    )
    state = convert.state_from_params("sit", config, params)
    back = convert.params_from_state("sit", config, state)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_every_block_of_the_state_dict_goes_to_its_own_place():
    state = golden.weights("sit/sit")
    blocks = convert.params_from_state("sit", golden.SIT, state)["blocks"]
    for block in range(golden.SIT.depth):
        kernel = blocks["attention"]["qkv"]["kernel"][block]
        np.testing.assert_array_equal(kernel, state[f"blocks.{block}.attn.qkv.weight"].T)


def test_dtype_of_the_weights_is_kept():
    halves = {
        key: array.astype(np.float16) for key, array in golden.weights("sit/sit_micro").items()
    }
    params = convert.params_from_state("sit", golden.MICRO, halves)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float16)}
    assert_same_bits(convert.state_from_params("sit", golden.MICRO, params), halves)


def test_one_message_names_all_that_is_missing_extra_and_misshapen():
    state = golden.weights("sit/sit_micro")
    del state["pos_embed"], state["blocks.1.mlp.fc2.bias"]
    state["blocks.2.attn.qkv.bias"] = np.zeros(72, np.float32)
    state["ema.decay"] = np.zeros((), np.float32)
    state["t_embedder.mlp.0.weight"] = state["t_embedder.mlp.0.weight"].T
    with pytest.raises(InputError) as error:
        convert.params_from_state("sit", golden.MICRO, state)
    assert str(error.value) == (
        "the weights do not fit this sit model: pos_embed is missing; "
        "blocks.1.mlp.fc2.bias is missing; blocks.2.attn.qkv.bias is not known; "
        "ema.decay is not known; t_embedder.mlp.0.weight is [256, 24], not [24, 256]"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (golden.REFINER, r"blocks\.1\.attn\.qkv\.weight is not known"),
        (dataclasses.replace(golden.SIT, depth=4), r"blocks\.3\.attn\.qkv\.weight is missing"),
        (
            dataclasses.replace(golden.SIT, num_classes=1000),
            r"embedding_table\.weight is \[11, 64\], not \[1001, 64\]",
        ),
        (dataclasses.replace(golden.SIT, num_classes=0), r"embedding_table\.weight is not known"),
        (
            dataclasses.replace(golden.SIT, learn_sigma=False),
            r"final_layer\.linear\.weight is \[32, 64\], not \[16, 64\]",
        ),
        (
            dataclasses.replace(golden.SIT, patch_size=4),
            r"x_embedder\.proj\.weight is \[64, 4, 2, 2\], not \[64, 4, 4, 4\]",
        ),
        (
            dataclasses.replace(golden.SIT, input_size=16),
            r"pos_embed is \[1, 16, 64\], not \[1, 64",
        ),
    ],
)
def test_weights_of_another_model_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        convert.params_from_state("sit", config, golden.weights("sit/sit"))


def test_unknown_kind_of_network_is_refused():
    with pytest.raises(InputError, match="unknown kind of network 'vit'; known are sit, vae"):
        convert.params_from_state("vit", golden.SIT, {})


def test_export_names_all_parameters_that_are_missing_extra_or_misshapen():
    params = convert.params_from_state("sit", golden.MICRO, golden.weights("sit/sit_micro"))
    kernel = params["final"]["linear"].pop("kernel")
    params["time_embedding"]["up"]["scale"] = kernel
    params["blocks"]["mlp"]["up"]["bias"] = params["blocks"]["mlp"]["up"]["bias"][:1]
    with pytest.raises(InputError) as error:
        convert.state_from_params("sit", golden.MICRO, params)
    assert "final/linear/kernel is missing" in str(error.value)
    assert "time_embedding/up/scale is not known" in str(error.value)
    assert "blocks/mlp/up/bias is [1, 96], not [2, 96]" in str(error.value)
