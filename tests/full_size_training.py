"""Trains the refiner of a SiT-XL/2 of random weights with the official hyper-parameters, measured.

  python tests/full_size_training.py --workdir DIR                   3 steps; on CPU, minutes
  python tests/full_size_training.py --workdir DIR --steps 200 --batch-sizes 18,64,256,1024   a GPU
  python tests/full_size_training.py --count                         only what the recipes cost

The recipe is configs/sit_xl_2_256_refiner.py on latents of noise; DIR gets 2.7 GB of weights. Each
batch size runs in a process of its own, and one that does not fit ends the list. Prints JSON. Not a
test: pytest does not collect it.
"""

import argparse
import importlib
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import jax  # noqa: E402
import numpy as np  # noqa: E402

from flowturbo_jax import cost, data, model_directory, tasks, trainer  # noqa: E402
from flowturbo_jax.model_description import Description  # noqa: E402
from flowturbo_jax.models import SiT, SiTConfig, family  # noqa: E402

RECIPES = ("sit_xl_2_256_refiner", "sit_b_2_256_predictor", "sit_s_2_256_predictor")
PREDICTOR = SiTConfig.named("SiT-XL/2", input_size=32, in_channels=4, num_classes=1000)


def recipe_of(name: str) -> Any:
    return importlib.import_module(f"configs.{name}").get_config()


def count() -> dict[str, Any]:
    """What each recipe costs, from its networks' traced programs."""
    costs = {}
    for name in RECIPES:
        recipe = recipe_of(name)
        if recipe.objective == "refiner":
            predictor = PREDICTOR
            refiner = predictor.refiner(**recipe.model.to_dict())
            trained = family("sit").refiner(refiner)
            products = 2 * tasks.forward_multiply_adds(SiT(predictor), predictor)
            products += 3 * tasks.forward_multiply_adds(trained, predictor, inputs=2)
        else:
            _, predictor, _ = tasks.predictor_config_of(recipe.model.to_dict())
            trained = SiT(predictor)
            products = 3 * tasks.forward_multiply_adds(trained, predictor)
        flop = 2 * products
        costs[name] = {
            "trained_parameters": cost.parameter_count(model_directory.abstract_params(trained)),
            "flop_per_image_and_step": flop,
            "flop_in_all": flop * recipe.batch_size * recipe.steps,
        }
    return costs


def write_teacher(directory: Path) -> None:
    """A model directory of random weights, which stays for the next time."""
    if directory.exists():
        return
    shapes = model_directory.abstract_params(SiT(PREDICTOR))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02), shapes
    )
    description = Description(
        family="sit",
        predictor=PREDICTOR,
        refiner=None,
        class_names=tuple(map(str, range(1000))),
        guidance="paired",
        guidance_scale=1.5,
        guided_channels=None,
        source={"predictor": "random"},
    )
    model_directory.save(directory, description, params, None)


def open_noise(argument: str, image_size: int) -> data.DataSource:
    """Latents of noise, in memory."""
    latents = np.random.default_rng(1).standard_normal((2048, *PREDICTOR.shape), np.float32)
    examples = data.ArrayExamples(latents, np.arange(2048, dtype=np.int32) % 1000)
    names = tuple(map(str, range(1000)))
    return data.DataSource("noise", examples, PREDICTOR.shape, names, examples.fingerprint())


def train(workdir: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """Trains for some steps, and reports what they took."""
    data.OPENERS["noise"] = open_noise
    recipe = recipe_of("sit_xl_2_256_refiner")
    recipe.update(data="noise", model_dir=str(workdir / "model"), steps=steps)
    recipe.update(batch_size=batch_size, evaluation_size=1, log_every=max(steps - 1, 1))
    recipe.update(evaluate_every=steps, checkpoint_every=steps, schedule="H1")
    run = workdir / f"run{batch_size}"
    trainer.train_and_evaluate(recipe, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = next(line for line in lines if line["step"] == max(steps - 1, 1))
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}) if device.platform == "gpu" else {}
    steps_per_second = 1e3 / speed["speed/ms_per_step"]
    return {
        "device": device.device_kind,
        "batch_size": batch_size,
        "steps": steps,
        "loss": speed["train/loss"],
        "steps_per_second": steps_per_second,
        "images_per_second": speed["speed/images_per_second"],
        "mfu": speed.get("speed/mfu", math.nan),
        "input_wait": speed["speed/input_wait"],
        "hours_for_30k_steps": 30_000 / steps_per_second / 3600,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "peak_device_memory_gb": memory.get("peak_bytes_in_use", 0) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-sizes", default="18")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--alone", action="store_true", help="one batch size, in this process")
    args = parser.parse_args()
    if args.count:
        sys.stdout.write(json.dumps(count(), indent=1) + "\n")
        return
    if args.alone:
        sys.stdout.write(json.dumps(train(args.workdir, args.steps, int(args.batch_sizes))) + "\n")
        return
    write_teacher(args.workdir / "model")
    results = []
    for batch_size in args.batch_sizes.split(","):
        command = [sys.executable, __file__, "--alone", f"--workdir={args.workdir}"]
        command += [f"--steps={args.steps}", f"--batch-sizes={batch_size}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            results.append({"batch_size": int(batch_size), "exit_code": done.returncode})
            break
        results.append(json.loads(done.stdout.splitlines()[-1]))
        sys.stderr.write(json.dumps(results[-1]) + "\n")
    sys.stdout.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
