r"""How near schedules come to the exact solution of a model's flow, and how solvers carry over.

  python -m flowturbo_jax evaluate digits --schedules=H8,S5 --samples=5000 --seeds=0,1,2 \
      --out=runs/solvers/quality.json
  python -m flowturbo_jax benchmark digits --schedules=H8,S5 --batch-sizes=250 --no-cold-start \
      --out=runs/solvers/speed.json
  python benchmarks/solvers.py --scores=runs/solvers/quality.json --speed=runs/solvers/speed.json \
      --out=runs/solvers
  python benchmarks/solvers.py --schedules=S5,A2x5 --scales=1,1.25,1.5,2,3,4 --out=runs/solvers
  python benchmarks/solvers.py --model=runs/other/model --solvers=digits --schedules=S5,A2x5 \
      --out=runs/solvers

The distance is the root mean square over latents of a seed that no solver was learnt from, to the
fine solution that tune takes, too (Tsit5 with a tight tolerance). With --scores the table has the
Fréchet distances of those schedules, as evaluate measured them, mean and standard deviation over
its seeds; with --speed the times per image that benchmark measured. With --solvers the solvers of
another model are used.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax.numpy as jnp
import numpy as np

from flowturbo_jax import markdown, model_directory, solver_files
from flowturbo_jax.commands import entry
from flowturbo_jax.commands.progress import bars
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import comparison
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.solver_examples import Examples, examples
from flowturbo_jax.schedule import Schedule

SEED = 1  # solvers are learnt from noises of seed 0 unless they are told otherwise
BATCH = 64


def main(argv: list[str]) -> None:
    """Reads the command line, measures, and prints a Markdown table."""
    parser = entry.LineParser(prog="python benchmarks/solvers.py", description=__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder of the fine solutions, read where they are there")
    add("--model", default="digits", help="model directory (digits)")
    add("--schedules", default="", help="with commas between; those of --scores")
    add("--scores", help="JSON file of evaluate")
    add("--speed", help="JSON file of benchmark")
    add("--scales", default="", help="guidance scales, with commas between; the model's default")
    add("--solvers", help="model directory whose solvers are used; the model's own")
    add("--noises", type=int, default=512, help="to measure the distance on (512)")
    args = parser.parse_args(argv[1:])
    scores = _scores(args.scores) if args.scores else {}
    speed = _speed(args.speed) if args.speed else {}
    schedules = [text for text in args.schedules.split(",") if text] or list(scores)
    if not schedules:
        raise InputError("say what to measure: --schedules=S5,H8, or --scores=FILE")
    pipe = ClassToImage.load(args.model)
    scales = [float(text) for text in args.scales.split(",") if text] or [None]
    plans = [[_plan(pipe, args.solvers, text, scale) for scale in scales] for text in schedules]
    with bars() as show:
        found = {
            scale: _examples(pipe, plans[0][column], args.noises, Path(args.out), show)
            for column, scale in enumerate(scales)
        }
        errors = [
            [rmse(pipe, plan, found[scale]) for plan, scale in zip(row, scales, strict=True)]
            for row in plans
        ]
    sys.stdout.write(_table(plans, scales, errors, scores, speed) + "\n")


def _plan(pipe: ClassToImage, solvers: str | None, text: str, scale: float | None) -> Plan:
    schedule: Any = text
    if solvers is not None and Schedule.parse(text).learnt:
        schedule = solver_files.of_model(model_directory.resolve(solvers), Schedule.parse(text))
    return pipe.plan(schedule, scale)


def _examples(pipe: ClassToImage, plan: Plan, count: int, out: Path, show: Any) -> Examples:
    labels = np.arange(max(pipe.model.description.predictor.num_classes, 1))
    what = f"fine solution at scale {float(plan.scale):g}"
    place = (SEED, out / "solutions", BATCH)
    return examples(pipe, plan, 0, count, labels, *place, lambda *done: show(what, *done))


def rmse(pipe: ClassToImage, plan: Plan, given: Examples) -> float:
    """Root mean square distance of a plan's latents from the fine solution.

    Args:
      pipe: the model.
      plan: how to sample.
      given: noises, and where they lead.
    """
    parts = []
    for first in range(0, len(given.noise), BATCH):
        rows = np.minimum(np.arange(first, first + BATCH), len(given.noise) - 1)
        some = given.rows(rows)
        made = pipe.sample_latents(jnp.asarray(some.noise), some.labels, **plan.settings)
        apart = np.asarray(made, np.float64) - some.way[:, -1]
        parts.append((apart**2).reshape(BATCH, -1).mean(1)[: len(given.noise) - first])
    return float(np.sqrt(np.concatenate(parts).mean()))


def _scores(file: str) -> dict[str, list[float]]:
    """Of each schedule the Fréchet distances, one of each seed."""
    found: dict[str, list[float]] = {}
    rows = comparison.read_rows(file)
    how = {
        (row["card"]["guidance_scale"], str(row["card"].get("guidance_interval"))) for row in rows
    }
    if len(how) > 1:
        raise InputError(f"{file} has several guidance scales or intervals; evaluate them apart")
    for row in rows:
        if "frechet_distance" not in row["results"]:
            raise InputError(f"{file} has no Fréchet distances; evaluate with a --reference")
        kept = found.setdefault(row["card"]["schedule"], [])
        kept.append(row["results"]["frechet_distance"])
    return found


def _speed(file: str) -> dict[str, float]:
    """Of each schedule milliseconds per image, in the largest batch."""
    try:
        rows = json.loads(Path(file).read_text())["rows"]
        ordered = sorted(rows, key=lambda row: row["batch_size"])
        return {row["schedule"]: row["ms_per_image"] for row in ordered}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no file of python -m flowturbo_jax benchmark") from error


def _table(
    plans: Any,
    scales: Any,
    errors: Any,
    scores: dict[str, list[float]],
    speed: dict[str, float],
) -> str:
    heading = ["schedule", "evaluations", "+ refiner"]
    heading += ["Fréchet distance"] if scores else []
    heading += ["ms/image"] if speed else []
    heading += ["RMSE" if scale is None else f"RMSE at {scale:g}" for scale in scales]
    lines = []
    for row, distances in zip(plans, errors, strict=True):
        schedule = row[0].schedule
        cells = [f"`{schedule}`", str(schedule.predictor_evaluations)]
        cells.append(str(schedule.refiner_evaluations))
        if scores:
            cells.append(_mean(scores.get(str(schedule), [])))
        if speed:
            cells.append(f"{speed[str(schedule)]:.2f}" if str(schedule) in speed else "")
        lines.append([*cells, *(f"{distance:.4f}" for distance in distances)])
    return markdown.table(heading, lines)


def _mean(values: list[float]) -> str:
    """And the standard deviation, of several."""
    text = f"{np.mean(values):.4f}" if values else ""
    return f"{text} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else text


if __name__ == "__main__":
    entry.run(main)
