"""What int8 and fp8 matrix products cost in accuracy, and save in memory and time.

  python tests/quantized.py [--model digits | golden | SiT-B/2] [--schedule H1P5R3] [--batch 32]
      [--rounds 10] [--samples 1000] [--layers]

Samples a model, the digits' trained one or one of random weights, from the same noise with networks
in float32 and bfloat16, and with their blocks in int8 and fp8, guided as the model says. Prints a
line of JSON for each: relative l2 error of the final latents against float32, bytes of the
parameters, and ms/image over so many rounds (0 leaves it out). With --samples, of digits, also the
scores that `evaluate` gives them; with --layers the error when only those layers are quantized,
among them layers that never are. Not a test: pytest does not collect it, but test_quantization.py
makes the comparison with the golden weights.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import golden  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from flowturbo_jax import ClassToImage, model_directory  # noqa: E402
from flowturbo_jax.model_directory import Description, Model  # noqa: E402
from flowturbo_jax.pipelines import evaluation, judging  # noqa: E402
from flowturbo_jax.pipelines.random_model import random_model  # noqa: E402
from flowturbo_jax.quantization import KINDS, quantize, quantize_network  # noqa: E402

GROUPS = (
    "patch_embedding",
    "time_embedding/(up|down)",
    "blocks/modulation",
    "blocks/attention/qkv",
    "blocks/attention/out",
    "blocks/mlp/up",
    "blocks/mlp/down",
    "final/modulation",
    "final/linear",
)


def load(name: str, dtype: str = "float32") -> Model:
    """The digits' model, the golden one, or a random one of a published size."""
    if name == "digits":
        return model_directory.load(name, dtype)
    if name != "golden":
        return random_model(name, vae=False, dtype=dtype)
    description = Description(
        family="sit",
        predictor=golden.SIT,
        refiner=golden.REFINER,
        class_names=tuple(map(str, range(golden.SIT.num_classes))),
        guidance="official",
        guidance_scale=1.5,
        guided_channels=3,
        source={},
    )
    networks = model_directory.modules(description, dtype)
    for network, config in description.networks.items():
        file = {"predictor": "sit/sit", "refiner": "refiner/refiner"}[network]
        networks[f"{network}_params"] = golden.params(file, config)
    return Model(description, **networks)


def variants(name: str) -> dict[str, ClassToImage]:
    """The model in each way to compute it, by a name for it."""
    models: dict[str, Model] = {}
    for dtype in ("float32", "bfloat16"):
        models[dtype] = load(name, dtype)
        models |= {f"{dtype}, {kind} blocks": quantize(models[dtype], kind) for kind in KINDS}
    return {name: ClassToImage(model) for name, model in models.items()}


def only(model: Model, kind: str, layers: str) -> ClassToImage:
    """The model with these layers quantized, whatever `quantize` says of them."""
    networks = {}
    for name in ("predictor", "refiner"):
        module, params = getattr(model, name), getattr(model, f"{name}_params")
        module, params = quantize_network(module, params, kind, layers)
        networks |= {name: module, f"{name}_params": params}
    return ClassToImage(dataclasses.replace(model, **networks))


def latents(pipe: ClassToImage, schedule: str, batch: int) -> np.ndarray:
    """Final latents `[B, H, W, C]` of the same noise for every model of a shape."""
    config = pipe.model.description.predictor
    noise = jax.random.normal(jax.random.key(0), (batch, *config.shape))
    labels = np.arange(batch) % config.num_classes
    return np.asarray(pipe.sample_latents(noise, labels, schedule=schedule))


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Relative l2 error."""
    exact = exact.astype(np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def parameter_bytes(pipe: ClassToImage) -> int:
    """Bytes of the parameters as they lie on the device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params))


def milliseconds(
    pipes: Mapping[str, ClassToImage], schedule: str, batch: int, rounds: int
) -> dict[str, float]:
    """Median time of an image in ms for each, all in turn, so that a slow hour hits all."""
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(rounds + 1):
        for name, pipe in pipes.items():
            begin = time.perf_counter()
            latents(pipe, schedule, batch)
            times[name].append((time.perf_counter() - begin) / batch * 1e3)
    return {name: float(np.median(found[1:])) for name, found in times.items()}


def scores(pipe: ClassToImage, schedule: str, samples: int) -> dict[str, float]:
    """What `evaluate` says of that many images, without the time."""
    judges, plan = judging.digits_judges(), pipe.plan(schedule)
    card = evaluation.protocol_card(
        pipe, plan, seed=0, samples=samples, batch_size=250, judges=judges
    )
    with tempfile.TemporaryDirectory() as work:
        found = evaluation.measure(pipe, plan, judges, card, Path(work) / "rows")
    found.pop("ms_per_image", None)
    return found


def say(**row: object) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--schedule", default="H1P5R3")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--layers", action="store_true")
    args = parser.parse_args()
    if args.samples and args.model != "digits":
        parser.error("--samples needs --model digits: there is nothing to compare others with")
    pipes, settings = variants(args.model), (args.schedule, args.batch)
    found = {name: latents(pipe, *settings) for name, pipe in pipes.items()}
    times = milliseconds(pipes, *settings, args.rounds) if args.rounds else {}
    exact = found["float32"]
    for name, pipe in pipes.items():
        say(
            networks=name,
            error=error(found[name], exact),
            parameter_bytes=parameter_bytes(pipe),
            **({"ms_per_image": times[name]} if times else {}),
            **(scores(pipe, args.schedule, args.samples) if args.samples else {}),
        )
    model = pipes["float32"].model
    for layers in GROUPS if args.layers else ():
        made = {kind: latents(only(model, kind, layers), *settings) for kind in KINDS}
        say(layers=layers, **{kind: error(one, exact) for kind, one in made.items()})


if __name__ == "__main__":
    main()
