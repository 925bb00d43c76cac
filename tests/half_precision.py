"""How far bfloat16 networks move the final latents, and whether that is rounding.

  python tests/half_precision.py [--size SiT-B/2 | golden] [--schedule H1P5R3] [--batch 2]

Samples a random model of that size from the same noise in float32, in bfloat16, and in float32 with
the parameters and the inputs and outputs of every layer rounded to some mantissa bits. bfloat16 has
7 of them: rounding to 7 must move the latents about as far, and to 10 about 8 times less far; a bug
would do neither. Prints the relative l2 errors as JSON. Not a test: pytest does not collect it, but
test_half_precision.py makes the same comparison with the golden weights.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import golden  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import linen as nn  # noqa: E402

from flowturbo_jax import guidance, sampler  # noqa: E402
from flowturbo_jax.models import Refiner, SiT, SiTConfig  # noqa: E402
from flowturbo_jax.schedule import Schedule  # noqa: E402


def final_latents(
    config: SiTConfig,
    params: Any,
    schedule: str,
    noise,
    labels,
    dtype: Any,
    bits: int | None = None,
):
    """Final latents, guided at 1.5 in the official mode, perhaps rounded to mantissa bits."""

    def rounded(value: Any) -> Any:
        if bits is None or not hasattr(value, "dtype") or value.dtype != jnp.float32:
            return value
        return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=bits)

    def layer(call, args, kwargs, context):
        if context.method_name != "__call__" or isinstance(context.module, SiT | Refiner):
            return call(*args, **kwargs)
        return jax.tree.map(rounded, call(*map(rounded, args), **kwargs))

    @jax.jit
    def run(params, noise, labels):
        predictor, refiner = SiT(config, dtype), Refiner(SiT(config.refiner(), dtype))
        params = jax.tree.map(rounded, params)
        flow = guidance.official(
            lambda *args: predictor.apply({"params": params[0]}, *args),
            lambda *args: refiner.apply({"params": params[1]}, *args),
            labels,
            jnp.full_like(labels, config.null_label),
            1.5,
            3,
        )
        with nn.intercept_methods(layer):
            return sampler.sample(flow, noise, Schedule.parse(schedule))

    return np.asarray(run(params, noise, labels), np.float64)


def errors(config: SiTConfig, params: Any, schedule: str, noise, labels) -> dict[str, float]:
    """Relative l2 error of the final latents against float32: bfloat16, and rounding to bits."""
    run = partial(final_latents, config, params, schedule, noise, labels)
    exact = run(jnp.float32)
    found = {"bfloat16": run(jnp.bfloat16)}
    found |= {f"{bits} bits": run(jnp.float32, bits) for bits in (7, 10)}
    norm = np.linalg.norm(exact)
    return {name: float(np.linalg.norm(x - exact) / norm) for name, x in found.items()}


def random_params(config: SiTConfig, seed: int) -> Any:
    """Parameters of which none is zero, of the size that training gives them."""
    shapes = jax.eval_shape(SiT(config).initialise, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (
            rng.standard_normal(leaf.shape, np.float32)
            * np.float32(0.5 / np.sqrt(leaf.shape[-2] if len(leaf.shape) > 1 else 25))
        ),
        shapes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="SiT-B/2")
    parser.add_argument("--schedule", default="H1P5R3")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    if args.size == "golden":
        config = golden.SIT
        params = golden.params("sit/sit", config), golden.params("refiner/refiner", golden.REFINER)
    else:
        config = SiTConfig.named(args.size, input_size=32, in_channels=4, num_classes=1000)
        params = random_params(config, 0), random_params(config.refiner(), 1)
    noise = jax.random.normal(jax.random.key(0), (args.batch, *config.shape))
    labels = jnp.arange(args.batch) % config.num_classes
    found = errors(config, params, args.schedule, noise, labels)
    sys.stdout.write(json.dumps({**vars(args), **found}) + "\n")


if __name__ == "__main__":
    main()
