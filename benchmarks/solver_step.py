r"""What learning a solver costs on this device: memory and time of a step of the search.

  python benchmarks/solver_step.py --size SiT-XL/2 --dtype bfloat16 --batch-sizes 16,32,64 \
      --out runs/solver_step.json

Random weights of a published size, noise, and ends at random: the arithmetic is that of a search.
Each batch size is compiled and run; one that does not fit is said so. --compile-only runs nothing
and reports what the compiler says of memory.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from flowturbo_jax.commands import entry
from flowturbo_jax.commands.progress import say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import program_cache, random_model
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.solver_examples import POINTS, Examples
from flowturbo_jax.pipelines.solver_search import SolverSearch
from flowturbo_jax.pipelines.solver_settings import Search
from flowturbo_jax.schedule import Schedule

SEARCH_STEPS = 300  # of the projection


def main(argv: list[str]) -> None:
    """Reads the command line, measures, and prints and writes the results."""
    parser = entry.LineParser(prog="python benchmarks/solver_step.py", description=__doc__)
    add = parser.add_argument
    add("--size", default="SiT-XL/2", help="published size (SiT-XL/2)")
    add("--image-size", type=int, default=256, help="side of its images (256)")
    add("--schedule", default="S5", help="to learn (S5)")
    add("--dtype", default="bfloat16", help="of the networks (bfloat16)")
    add("--batch-sizes", default="32", help="noises of a step, with commas between (32)")
    add("--remat", default="", help="as in solve")
    add("--steps", type=int, default=5, help="whose median time counts (5)")
    add("--compile-only", action="store_true", help="run nothing")
    add("--out", required=True, help="JSON file of the results")
    args = parser.parse_args(argv[1:])
    schedule = Schedule.parse(args.schedule)
    with program_cache.preparing():
        model = random_model.random_model(args.size, args.image_size, False, args.dtype)
    pipe = ClassToImage(model)
    rows = []
    for batch_size in (int(text) for text in args.batch_sizes.split(",")):
        rows.append(_row(pipe, schedule, batch_size, args))
        say(json.dumps(rows[-1]))
    report = {
        "size": args.size,
        "image_size": args.image_size,
        "schedule": str(schedule),
        "dtype": args.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


def _row(pipe: ClassToImage, schedule: Schedule, batch_size: int, args: Any) -> dict[str, Any]:
    """Memory and time of a step."""
    if batch_size < 1 or args.steps < 1:
        raise InputError(f"{batch_size} noises, {args.steps} steps; both must be 1 or more")
    settings = Search(schedule, batch_size=batch_size, noises=batch_size, remat=args.remat)
    plan = pipe.plan("H1")._replace(schedule=schedule)
    with tempfile.TemporaryDirectory() as work:
        search = SolverSearch(pipe, pipe, settings, plan, Path(work))
    moving, batch = search.begin(), _examples(pipe, batch_size)
    row: dict[str, Any] = {"batch_size": batch_size}
    begin = time.perf_counter()
    compiled = search.compiled(moving, batch)
    row["compile_seconds"] = time.perf_counter() - begin
    found = compiled.memory_analysis()
    row["temporary_gb"] = found.temp_size_in_bytes / 1e9
    row["arguments_gb"] = found.argument_size_in_bytes / 1e9
    if args.compile_only:
        return row
    seconds = []
    for _ in range(args.steps + 1):
        begin = time.perf_counter()
        moving = jax.block_until_ready(compiled(moving, search.frozen, batch))
        seconds.append(time.perf_counter() - begin)
    row["seconds_per_step"] = float(np.median(seconds[1:]))
    row[f"minutes_of_{SEARCH_STEPS}_steps"] = SEARCH_STEPS * row["seconds_per_step"] / 60
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    row["peak_gb"] = None if peak is None else peak / 1e9
    return row


def _examples(pipe: ClassToImage, count: int) -> Examples:
    shape, draw = pipe.model.description.predictor.shape, np.random.default_rng(0)
    noise = draw.normal(size=(count, *shape)).astype(np.float32)
    way = draw.normal(size=(count, POINTS, *shape)).astype(np.float32)
    classes = pipe.model.description.predictor.num_classes
    return Examples(noise, np.arange(count, dtype=np.int32) % classes, way)


if __name__ == "__main__":
    entry.run(main)
