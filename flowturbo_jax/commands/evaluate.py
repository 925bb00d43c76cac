"""Measures schedules of a model directory on the real digits, several seeds each.

Results are written after every measurement, and those that stand in the file already, made by the
same protocol, are not made again: a run that was stopped continues with the same command.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flowturbo_jax.commands.entry import LineParser
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import evaluation
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.schedule import Schedule


def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures, and prints a table in Markdown."""
    parser = LineParser(prog="python -m flowturbo_jax evaluate", description=__doc__)
    parser.add_argument("model_dir", help="model directory, or the name of a shipped model")
    parser.add_argument("--schedules", required=True, help="comma-separated, such as H8,H1P3R2")
    parser.add_argument("--out", required=True, help="JSON file of results, continued if it exists")
    parser.add_argument("--samples", type=int, default=5000, help="per schedule and seed")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--guidance", default=None, help="paired, official or none")
    parser.add_argument("--guidance-scale", type=float, default=None)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    args = parser.parse_args(argv[1:])
    # What is named twice is measured and counted once.
    schedules = list(dict.fromkeys(Schedule.parse(text) for text in args.schedules.split(",")))
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
    except ValueError as error:
        raise InputError(f"--seeds is {args.seeds!r}; give numbers such as 0,1,2") from error
    if args.samples < 2:
        raise InputError(f"--samples is {args.samples}; a covariance needs at least 2")
    pipe = ClassToImage.load(args.model_dir, args.dtype)
    settings = {
        "batch_size": args.batch_size,
        "guidance": args.guidance,
        "guidance_scale": args.guidance_scale,
    }
    jobs = [(schedule, seed) for schedule in schedules for seed in seeds]
    print(table(measure(pipe, jobs, args.samples, Path(args.out), settings), schedules))


def measure(
    pipe: ClassToImage,
    jobs: Sequence[tuple[Schedule, int]],
    samples: int,
    out: Path,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Makes every measurement that is not in the file yet.

    Args:
      pipe: the model.
      jobs: (schedule, seed) of each.
      samples: images each.
      out: JSON file: a list of `{"card": ..., "results": ...}`, rewritten whole each time.
      settings: batch_size, guidance and guidance_scale.

    Returns:
      One row per job, in order.

    Raises:
      InputError: the file holds something else, or cannot be written.
    """
    reference = evaluation.digits_reference()
    evaluation.check_fits(pipe, reference)
    known = _read(out)
    rows = []
    with tqdm(total=len(jobs) * samples, unit="image") as bar:
        for schedule, seed in jobs:
            card = evaluation.protocol_card(
                pipe, schedule, seed=seed, samples=samples, reference=reference, **settings
            )
            row = next((row for row in known if row["card"] == card), None)
            bar.set_description(str(schedule))
            if row is None:
                classes = pipe.model.description.predictor.num_classes
                labels = evaluation.balanced_labels(samples, classes)
                made = evaluation.generate(
                    pipe, labels, schedule, seed=seed, on_batch=bar.update, **settings
                )
                scores = evaluation.score(made, reference)
                row = {"card": card, "results": {"ms_per_image": made.ms_per_image, **scores}}
                known.append(row)
                _write(out, known)
            else:
                bar.update(samples)
            rows.append(row)
    return rows


def _read(out: Path) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    try:
        rows = json.loads(out.read_text())
        return [{"card": row["card"], "results": row["results"]} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out} holds no results of this command; choose another --out") from error


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    draft = out.with_name(f".{out.name}.draft")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(draft, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error}; choose another --out") from error


def table(rows: Sequence[dict[str, Any]], schedules: Sequence[Schedule]) -> str:
    """Mean and standard deviation over seeds of each schedule, as a Markdown table."""
    lines = [
        "| schedule | evaluations | + refiner | Fréchet distance | label accuracy | ms/image |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for schedule in schedules:
        results = [row["results"] for row in rows if row["card"]["schedule"] == str(schedule)]
        distance = [result["frechet_distance"] for result in results]
        accuracy = [100 * result["label_accuracy"] for result in results]
        spread = f" ± {np.std(distance, ddof=1):.4f}" if len(distance) > 1 else ""
        lines.append(
            f"| {schedule} | {schedule.predictor_evaluations} | {schedule.refiner_evaluations} "
            f"| {np.mean(distance):.4f}{spread} | {np.mean(accuracy):.2f} % "
            f"| {np.median([result['ms_per_image'] for result in results]):.2f} |"
        )
    return "\n".join(lines)
