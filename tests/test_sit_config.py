"""Hyper-parameters of SiT: the published sizes, and what cannot be built."""

import dataclasses

import golden
import jax
import pytest

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import SiT, SiTConfig, family


def parameter_count(config):
    abstract = jax.eval_shape(SiT(config).initialise, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def expected_count(depth, width, patch, channels, scale=1, classes=1000, side=32):
    """Counted by hand from the architecture, linear layer by linear layer."""

    def linear(fan_in, fan_out):
        return fan_in * fan_out + fan_out

    block = linear(width, 3 * width) + linear(width, width) + linear(width, 6 * width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    embedders = linear(patch**2 * channels * scale, width) + linear(256, width)
    embedders += linear(width, width) + (classes + 1) * width + (side // patch) ** 2 * width
    final = linear(width, 2 * width) + linear(width, patch**2 * channels * 2)
    return depth * block + embedders + final


# SiT models.py, SiT_models.
PUBLISHED = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", PUBLISHED)
def test_named_size_has_the_published_architecture(size, patch):
    config = SiTConfig.named(f"SiT-{size}/{patch}", input_size=32, in_channels=4, num_classes=1000)
    depth, width, heads = PUBLISHED[size]
    assert (config.depth, config.hidden_size, config.num_heads) == (depth, width, heads)
    assert config.patch_size == patch
    assert parameter_count(config) == expected_count(depth, width, patch, 4)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("SiT-S/2", 33.0), ("SiT-B/2", 130.5), ("SiT-L/2", 458.1), ("SiT-XL/2", 675.13)],
)
def test_named_size_has_the_published_number_of_parameters(name, millions):
    config = SiTConfig.named(name, input_size=32, in_channels=4, num_classes=1000)
    digits = 2 if name == "SiT-XL/2" else 1
    assert round(parameter_count(config) / 1e6, digits) == millions


def test_refiner_of_the_largest_size_has_29_71_million_parameters():
    config = SiTConfig.named("SiT-XL/2", input_size=32, in_channels=4, num_classes=1000).refiner()
    assert (config.depth, config.in_channels_scale, config.hidden_size) == (1, 2, 1152)
    assert parameter_count(config) == expected_count(1, 1152, 2, 4, scale=2)
    assert round(parameter_count(config) / 1e6, 2) == 29.71


def test_refiner_and_named_take_overrides():
    fields = {"input_size": 16, "in_channels": 3, "num_classes": 0}
    config = SiTConfig.named("SiT-B/4", **fields, depth=5, patch_size=8)
    assert (config.depth, config.patch_size, config.hidden_size) == (5, 8, 768)
    assert config.refiner(depth=2, hidden_size=96).hidden_size == 96
    assert config.shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["SiT-XXL/2", "SiT-XL/3", "DiT-XL/2", "SiT-XL", "SiT-XL/2/2", ""])
def test_unknown_size_is_refused(name):
    with pytest.raises(InputError, match=r"unknown SiT size .* known are SiT-\{S,B,L,XL\}"):
        SiTConfig.named(name, input_size=32, in_channels=4, num_classes=1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 0}, "input_size is 0; it must be a positive integer"),
        ({"in_channels": -4}, "in_channels is -4; it must be a positive"),
        ({"depth": 0}, "depth is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"frequency_embedding_size": 0}, "frequency_embedding_size is 0"),
        ({"in_channels_scale": 0}, "in_channels_scale is 0"),
        ({"num_classes": -1}, "num_classes is -1; it must be 0 or more"),
        ({"depth": True}, "depth is True; it must be a positive integer"),
        ({"num_classes": True}, "num_classes is True; it must be 0 or more"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0; it must be a positive number"),
        ({"mlp_ratio": -4}, "mlp_ratio is -4; it must be a positive number"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio is inf"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan"),
        ({"patch_size": 3}, "input_size 8 is not divisible by 3"),
        ({"num_heads": 5}, "hidden_size 64 is not divisible by 5"),
        ({"hidden_size": 6, "num_heads": 3}, "hidden_size 6 is not divisible by 4"),
        ({"frequency_embedding_size": 255}, "frequency_embedding_size 255 is not divisible by 2"),
    ],
)
def test_config_refuses_what_cannot_be_built(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(golden.SIT, **changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("patch_size", 2.0, "patch_size is 2.0; it must be a positive integer"),
        ("hidden_size", "64", "hidden_size is '64'; it must be a positive integer"),
        ("depth", None, "depth is None; it must be a positive integer"),
        ("num_classes", 10.0, "num_classes is 10.0; it must be 0 or more"),
        ("mlp_ratio", "4", "mlp_ratio is '4'; it must be a positive number"),
        ("null_class", 1, "null_class is 1; it must be true or false"),
        ("learn_sigma", None, "learn_sigma is None; it must be true or false"),
    ],
)
def test_config_refuses_other_types(name, value, message):
    # Built by hand: the type checks of the tests would refuse it before the config does.
    config = object.__new__(SiTConfig)
    for key, field in {**dataclasses.asdict(golden.SIT), name: value}.items():
        object.__setattr__(config, key, field)
    with pytest.raises(InputError, match=message):
        config.__post_init__()


@pytest.mark.parametrize(
    "fields",
    [{}, {"depth": 3}, {"hidden_size": 32, "num_heads": 2}, {"patch_size": 4}],
)
def test_refiner_of_any_width_and_depth_fits_its_predictor(fields):
    assert golden.SIT.check_refiner(golden.SIT.refiner(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels_scale": 1}, "with 1 inputs side by side"),
        ({"input_size": 16}, r"\(16, 16, 4\), 10, True\)"),
        ({"in_channels": 3}, r"\(8, 8, 3\), 10, True\)"),
        ({"num_classes": 9}, r"\(8, 8, 4\), 9, True\)"),
        ({"null_class": False}, r"\(8, 8, 4\), 10, False\)"),
    ],
)
def test_refiner_of_another_predictor_is_refused(fields, message):
    with pytest.raises(InputError, match=f"the refiner is for another model's shape.*{message}"):
        golden.SIT.check_refiner(golden.SIT.refiner(**fields))


def test_unknown_family_is_refused():
    with pytest.raises(InputError, match=r"unknown model family 'dit'; known are .*sit"):
        family("dit")
    assert family("sit").predictor(golden.SIT, remat=True) == SiT(golden.SIT, remat=True)
