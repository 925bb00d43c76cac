"""Reads the golden arrays in fixtures/golden, and builds the networks that go with them."""

import dataclasses
import json
import zlib
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from safetensors.numpy import load_file

from flowturbo_jax import convert
from flowturbo_jax.models import Refiner, SiT, SiTConfig

FOLDER = Path(__file__).parent / "fixtures" / "golden"

SIT = SiTConfig(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=64,
    depth=3,
    num_heads=4,
    num_classes=10,
)
REFINER = SIT.refiner()
MICRO = dataclasses.replace(SIT, hidden_size=24, depth=2, num_heads=2)

# Absolute bounds: the reference's own float32 run is off its float64 run by 5e-6 (networks),
# 2e-5 (guided at scale 4) and 3e-5 (samples), and other orders of summation by a few times that.
# Ours are off by at most 5e-6, 2.4e-5 and 5e-5.
FORWARD = 5e-5
GUIDED = 1e-4
SAMPLES = 2e-4

# For jax.jit: halves the time to compile, and keeps within the bounds above.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of one npz file: latents `[..., H, W, C]`, integers as int32."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: _ours(file[key]) for key in file.files}


def _ours(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.int64:
        return array.astype(np.int32)
    side = SIT.input_size
    if array.shape[-2:] == (side, side):
        return rearrange(array, "... c h w -> ... h w c")
    return array


def weights(name: str) -> dict[str, np.ndarray]:
    """An official state dict, as stored: PyTorch names and layouts."""
    return load_file(FOLDER / f"{name}.safetensors")


def inception_tensors() -> dict[str, dict]:
    """Shape and float64 sum of every tensor of Inception, by its official name."""
    return json.loads((FOLDER / "inception" / "state_dict.json").read_text())


def inception_weights() -> dict[str, np.ndarray]:
    """Inception's official state dict of the stored answers: 24 million numbers, by a recipe."""
    return {
        name: _inception_tensor(name, tuple(tensor["shape"]))
        for name, tensor in inception_tensors().items()
    }


def _inception_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        z = 0.75 + 0.5 * np.abs(z)
    elif name.endswith("bn.weight"):
        z = 1 + 0.1 * z
    elif name == "fc.weight":
        z = z / np.sqrt(2048)
    elif name.endswith("conv.weight"):
        z = (z - z.mean(axis=(1, 2, 3), keepdims=True)) * 1.7 / np.sqrt(np.prod(shape[1:]))
    else:
        z = 0.1 * z
    return z.astype(np.float32)


@cache
def params(name: str, config: SiTConfig):
    """The parameters of a stored state dict."""
    return jax.tree.map(jnp.asarray, convert.params_from_state("sit", config, weights(name)))


@partial(jax.jit, static_argnums=0)
def apply(network: nn.Module, params, *inputs):
    """A network's output, compiled once for each network and input shape."""
    return network.apply({"params": params}, *inputs)


@cache
def fresh_params(config: SiTConfig):
    """Newly initialised parameters; compiled, which is much faster than op by op."""
    return jax.jit(SiT(config).initialise)(jax.random.key(0))


def predictor(params, config: SiTConfig = SIT):
    """The function `(x, t, labels) -> velocity` of a predictor's parameters."""
    return partial(apply, SiT(config), params)


def refiner(params, config: SiTConfig = REFINER):
    """The function `(x, v, t, labels) -> offset` of a refiner's parameters."""
    return partial(apply, Refiner(SiT(config)), params)


def deviation(ours, theirs) -> float:
    """The largest absolute difference."""
    return float(np.max(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))))
