"""What it is worth to compute all conditioning before the first step.

  python benchmarks/conditioning.py --size SiT-B/2 --schedule H1P5R3 --batch-size 1

Samples latents of a model of that size with random weights, twice: with the conditioning of all
steps computed at once (adaLN modulations and embeddings, a third of SiT's weights), and with each
evaluation computing its own. Prints, as JSON, the time of each, in turn in one run; the bytes of
parameters that an evaluation reads; the memory of each program; how far the latents differ.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import path, sampler
from flowturbo_jax.interfaces import Latents
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.random_model import random_model

CONDITIONING = ("modulation", "time_embedding")


def sample(prepared: bool, pipe, plan, params, noise, labels, scale) -> Latents:
    """Latents, with the conditioning of all steps at once or step by step."""
    networks = programs.Networks(pipe.model)
    flow = programs.make_flow(networks, params, labels, scale, None, plan.guidance)
    flow = flow if prepared else flow._replace(prepare=None)
    return sampler.sample(flow, noise, plan.schedule)


def parameter_bytes(params) -> dict[str, int]:
    """Bytes of the predictor's parameters, and of those that only conditioning reads.

    The table of labels counts as nothing: of it only the rows of the batch are read.
    """
    sizes = {"all": 0, "conditioning": 0}
    for place, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(place)
        if "label_embedding" not in name:
            sizes["all"] += leaf.nbytes
            sizes["conditioning"] += leaf.nbytes * any(part in name for part in CONDITIONING)
    return sizes


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="SiT-B/2")
    parser.add_argument("--schedule", default="H1P5R3")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pipe = ClassToImage(random_model(args.size, vae=False, dtype=args.dtype))
    plan = pipe.plan(args.schedule)
    count, shape = args.batch_size, pipe.model.description.predictor.shape
    numbers = jnp.arange(count, dtype=jnp.uint32)
    given = (
        pipe.params,
        path.sample_noise(jnp.zeros_like(numbers), numbers, shape),
        jnp.zeros(count, jnp.int32),
        jnp.float32(plan.scale),
    )
    compiled = {
        name: jax.jit(partial(sample, prepared, pipe, plan)).lower(*given).compile()
        for name, prepared in (("at once", True), ("step by step", False))
    }
    latents = {name: np.asarray(program(*given)) for name, program in compiled.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(args.repeats):
        for name, program in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds[name].append(time.perf_counter() - begin)
    size = parameter_bytes(pipe.params[0])
    report = {
        "size": args.size,
        "schedule": str(plan.schedule),
        "batch_size": count,
        "dtype": args.dtype,
        "device": jax.devices()[0].device_kind,
        "ms": {name: 1e3 * float(np.median(found)) for name, found in seconds.items()},
        "parameter_bytes_an_evaluation_reads": {
            "at once": size["all"] - size["conditioning"],
            "step by step": size["all"],
        },
        "temporary_bytes": {
            name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()
        },
        "largest_difference": float(np.abs(latents["at once"] - latents["step by step"]).max()),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
