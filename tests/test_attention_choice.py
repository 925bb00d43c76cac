"""Which implementation each attention layer of a network takes, on GPUs that are not here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_text

from flowturbo_jax import model_directory
from flowturbo_jax.models import SiT, SiTConfig, UNet, UNetConfig, layers, unet_blocks
from flowturbo_jax.models.attention import choose, for_head
from flowturbo_jax.models.sit import SIZES as SIT_SIZES
from flowturbo_jax.models.unet_config import SIZES as UNET_SIZES

LIMITS = {"8.0": 128, "9.0": 256}  # widest head of cuDNN's fused attention
WORDS = 77
# Heads of 20, 40 and 80: those of SD 1.x's refiner, and one of its predictor's.
MIXED = UNetConfig(
    (16, 16),
    block_out_channels=(160, 320, 640),
    layers_per_block=1,
    attention_heads=(8, 8, 8),
    cross_attention=(True, True, True),
    cross_attention_dim=64,
)


def built(name: str, capability: str, monkeypatch) -> dict[str, UNet | SiT]:
    """The bfloat16 networks of a published size as they are built on such a GPU."""
    monkeypatch.setattr(
        model_directory,
        "for_device",
        lambda device, dtype, size: choose("gpu", dtype, size, capability),
    )
    return networks_of(name)


def networks_of(name: str) -> dict[str, UNet | SiT]:
    if name in UNET_SIZES:  # one layer per resolution, which is quicker to trace, has all heads
        config = UNetConfig((64, 64), **{**UNET_SIZES[name], "layers_per_block": 1})
        description = tiny_text.description(vae=False, **dataclasses.asdict(config))
    else:
        fields = {"input_size": 32, "in_channels": 4, "num_classes": 10, "learn_sigma": True}
        config = SiTConfig.named(name, **fields)
        description = tiny.description(**dataclasses.asdict(config))
    modules = model_directory.modules(description, "bfloat16", fast_attention=True)
    return {"predictor": modules["predictor"], "refiner": modules["refiner"].network}


def taken(network: UNet | SiT, monkeypatch) -> set[tuple[int, str]]:
    """Head size and implementation of every self-attention that a network evaluates."""
    seen = set()

    def recorded(q, k, v, implementation="xla"):
        if k.shape[1] != WORDS:
            seen.add((q.shape[-1], implementation))
        return q

    for blocks in (layers, unet_blocks):
        monkeypatch.setattr(blocks, "attend", recorded)
    config = network.config
    x = jnp.zeros((1, *config.shape[:2], config.in_channels * config.in_channels_scale))
    words = jnp.zeros((1, WORDS, config.text_width)) if config.takes_text else None
    condition = jnp.zeros(1, jnp.int32) if words is None else words
    jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(()), condition)
    return seen


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("name", [*UNET_SIZES, *(f"SiT-{size}/2" for size in SIT_SIZES)])
def test_each_layer_of_a_published_size_takes_what_its_own_heads_allow(
    name, capability, monkeypatch
):
    for network in built(name, capability, monkeypatch).values():
        sizes, limit = network.config.head_sizes, LIMITS[capability]
        wanted = {(size, "xla" if size % 8 or size > limit else "cudnn") for size in sizes}
        assert taken(network, monkeypatch) == wanted


def test_one_head_that_cudnn_refuses_does_not_keep_it_from_the_others(monkeypatch):
    networks = built("SD 1.x U-Net", "8.0", monkeypatch)
    assert networks["predictor"].attention == ((40, "cudnn"), (80, "cudnn"), (160, "xla"))
    assert networks["refiner"].attention == ((20, "xla"), (40, "cudnn"))
    assert built("SD 1.x U-Net", "9.0", monkeypatch)["predictor"].attention == "cudnn"
    assert built("SiT-XL/2", "8.0", monkeypatch)["predictor"].attention == "cudnn"


def test_the_log_says_once_why_for_each_head_that_differs(monkeypatch):
    lines = []
    monkeypatch.setattr(
        model_directory.logging, "info", lambda text, *given: lines.append(text % given)
    )
    built("SD 1.x U-Net", "8.0", monkeypatch)
    assert lines == [
        "attention of the predictor by cudnn: bfloat16 heads of 40",
        "attention of the predictor by cudnn: bfloat16 heads of 80",
        "attention of the predictor by xla: cuDNN's attention takes heads of a multiple of 8 up to "
        "128, not 160",
        "attention of the refiner by xla: cuDNN's attention takes heads of a multiple of 8 up to "
        "128, not 20",
        "attention of the refiner by cudnn: bfloat16 heads of 40",
    ]


def test_without_a_gpu_all_heads_are_written_out_and_the_log_says_so_once(monkeypatch):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    lines = []
    monkeypatch.setattr(
        model_directory.logging, "info", lambda text, *given: lines.append(text % given)
    )
    networks = networks_of("SD 1.x U-Net")
    assert [network.attention for network in networks.values()] == ["xla", "xla"]
    assert lines == [
        f"attention of the {name} by xla: the {jax.default_backend()} has no cuDNN"
        for name in ("predictor", "refiner")
    ]


def test_a_head_size_nothing_was_chosen_for_is_an_error():
    assert for_head("cudnn", 20) == "cudnn"
    assert for_head(((20, "xla"), (40, "cudnn")), 40) == "cudnn"
    with pytest.raises(KeyError):
        for_head(((20, "xla"), (40, "cudnn")), 80)


@pytest.mark.gpu
def test_a_unet_of_mixed_heads_agrees_with_attention_written_out_on_a_gpu():
    description = tiny_text.description(refiner=False, vae=False, **dataclasses.asdict(MIXED))
    module = model_directory.modules(description, "bfloat16", fast_attention=True)["predictor"]
    assert module.attention == ((20, "xla"), (40, "cudnn"), (80, "cudnn"))
    params = tiny_text.random_params(module)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, *MIXED.shape)), jnp.float32)
    states = jnp.asarray(rng.normal(size=(2, WORDS, MIXED.text_width)), jnp.float32)

    def velocity(unet):
        out = jax.jit(unet.apply)({"params": params}, x, jnp.float32(0.5), states)
        return np.asarray(out, np.float64)

    plain, fused = velocity(UNet(MIXED, jnp.bfloat16)), velocity(module)
    # Two ways to round differ by 1.5 % in this network (on CPU, from jax.nn's attention), and a
    # scale of the logits that is wrong at one resolution makes over 10 %.
    assert np.linalg.norm(fused - plain) / np.linalg.norm(plain) < 0.05
