"""What compiling more of the sampler at once is worth: the ablation of FlowTurbo's section on it.

  PYTHONPATH=. python tests/compile_ablation.py digits --schedule H1P5R3 --batch-size 8

Times one batch, in ms per image, with the same arithmetic compiled in ever larger pieces: every
operation by itself, each network, each sample block, and the whole sampler as one program. Not a
test: pytest does not collect it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import guidance, path
from flowturbo_jax.interfaces import State
from flowturbo_jax.pipelines import stepwise
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.sampler import BLOCKS


def median_ms(call: Callable[[], jax.Array], batch_size: int, repeats: int) -> float:
    """Median wall time per image, in ms, after one call that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds)) / batch_size * 1e3


def network_by_network(
    pipe: ClassToImage,
    predict: Callable[..., jax.Array],
    refine: Callable[..., jax.Array],
    noise: jax.Array,
    labels: jax.Array,
    plan: Plan,
) -> jax.Array:
    """The sampler in Python around two functions of (parameters, arguments of the network)."""
    null = jnp.full_like(labels, pipe.model.description.predictor.null_label)
    flow = guidance.paired(
        partial(predict, pipe.params[0]), partial(refine, pipe.params[1]), labels, null, plan.scale
    )
    grid = plan.schedule.time_grid()
    state = State(noise, jnp.zeros((2, *noise.shape)))
    for run, first, last in plan.schedule.intervals():
        for i in range(first, last):
            state = BLOCKS[run.block](flow, state, grid[i], grid[i + 1])
    return state.x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir")
    parser.add_argument("--schedule", default="H1P5R3")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    pipe = ClassToImage.load(args.model_dir)
    plan = pipe.plan(args.schedule, guidance="paired")
    count = args.batch_size
    shape = pipe.model.description.predictor.shape
    noise = path.sample_noise(
        jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32), shape
    )
    labels = jnp.zeros(count, jnp.int32)

    def predict(params, *given):
        return pipe.model.predictor.apply({"params": params}, *given)

    def refine(params, *given):
        return pipe.model.refiner.apply({"params": params}, *given)

    networks = jax.jit(predict), jax.jit(refine)
    ways = {
        "each network": lambda: network_by_network(pipe, *networks, noise, labels, plan),
        "each block": lambda: stepwise.sample_latents(pipe, noise, labels, plan),
        "the whole sampler": lambda: pipe.sample_latents(
            noise, labels, schedule=plan.schedule, guidance="paired"
        ),
    }
    result = {name: median_ms(call, count, args.repeats) for name, call in ways.items()}
    with jax.disable_jit():
        result["nothing"] = median_ms(
            lambda: network_by_network(pipe, predict, refine, noise, labels, plan), count, 3
        )
    report = {"schedule": args.schedule, "ms_per_image": result}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
