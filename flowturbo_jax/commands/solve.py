"""Learns the fastest solver for a model: a time grid and multistep weights, for few evaluations.

  solve digits --evaluations 5 --out runs/solve_digits
  solve digits --schedule S3R1,S4R1 --guidance-scales 1,1.5,2,4 --out runs/solve_digits
  solve models/sit-xl-2-256 --evaluations 7 --refiner --dtype bfloat16 --out runs/solve_xl

No data are needed: a solver is learnt from noise and labels, by gradients through the sampler, to
end where a fine solution of the same flow ends (Tsit5 with a tight tolerance). The networks stay as
they are. Noises that are not learnt from say when it is done. MODEL_DIR/solvers gets a file that
can be read, and schedule="S5" samples with it. Interrupted, the same command goes on.
"""

import argparse
import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowturbo_jax import markdown, model_directory, parallel, run_folder, solver_files
from flowturbo_jax.commands.entry import LineParser, one_line
from flowturbo_jax.commands.progress import bars, say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver, Numbers
from flowturbo_jax.pipelines import any_model, fine_solution
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.solver_search import SolverSearch
from flowturbo_jax.pipelines.solver_settings import LOSSES, REMATS, Search
from flowturbo_jax.schedule import Schedule

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Search)}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "diffrax")


def main(argv: Sequence[str]) -> None:
    """Reads the command line, learns, and writes what was found."""
    args = _parser().parse_args(argv[1:])
    any_model.refuse_text(args.model_dir, "solve")
    directory = model_directory.resolve(args.model_dir)
    searches = [_search(args, schedule) for schedule in _schedules(args)]
    pipe = ClassToImage.load(args.model_dir, args.dtype)
    exact = pipe if args.dtype == "float32" else ClassToImage.load(args.model_dir, "float32")
    plans = _plans(pipe, args, [search.schedule for search in searches])
    guided = [(plan.guidance, plan.interval) for plan in plans if plan.guidance != "none"]
    own = (args.guidance or pipe.model.description.guidance, None)
    guidance, interval = (*guided, own)[0]  # scale 1 by itself is sampled without any
    _check_writable(directory)
    mode = (guidance, interval)
    solvers = [_known(directory, pipe, search.schedule, *mode) for search in searches]
    rows = []
    with run_folder.reserved(Path(args.out), "--out"):
        for search, solver in zip(searches, solvers, strict=True):
            compiled: dict[Any, SolverSearch] = {}
            for plan in plans:
                plan = plan._replace(schedule=search.schedule)
                kind = (plan.guidance, plan.interval is None)
                with bars() as show:
                    if kind not in compiled:
                        given = (pipe, exact, search, plan, Path(args.out))
                        compiled[kind] = SolverSearch(*given, show)
                    learning = compiled[kind].at(plan, show)
                    numbers = learning.run()
                numbers.results["seconds"] = round(learning.seconds, 1)
                solver = _with(solver, numbers, pipe, search, *mode)
                solver_files.write(directory, solver)
                rows.append((search.schedule, numbers))
    print(table(rows))
    if any(numbers.results["ended"] == "diverged" for _, numbers in rows):
        print("warning: a search diverged; its best numbers were kept; lower --learning-rate")
    files = dict.fromkeys(str(solver_files.place(directory, schedule)) for schedule, _ in rows)
    print(f"wrote {one_line(', '.join(files))}")


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax solve", description=__doc__)
    add = parser.add_argument
    add("model_dir", help="model directory, or the name of a shipped model")
    add("--out", required=True, help="folder of what an interrupted search goes on from")
    add("--evaluations", type=int, help="of the predictor: 5 learns S5")
    add("--refiner", action="store_true", help="with a step by the refiner at the end: S5R1")
    add("--schedule", help="instead: what to learn, such as S5, H1S4 or S3R1,S4R1 or H1P3@learnt")
    add("--guidance-scales", default="", help="to learn at, such as 1,1.5,2,4; the model's default")
    add("--guidance", help="paired, official or none; the model's default")
    add("--guidance-interval", help="of the sampler, such as 0.1:0.8; all of the time")
    add("--steps", type=int, default=DEFAULTS["steps"], help="of the optimiser (200)")
    add("--batch-size", type=int, default=DEFAULTS["batch_size"], help="noises of a step (32)")
    add("--learning-rate", type=float, default=DEFAULTS["learning_rate"], help="of Adam (0.02)")
    add("--noises", type=int, default=DEFAULTS["noises"], help="to learn from (512)")
    add("--held-out", type=int, default=DEFAULTS["held_out"], help="more, to measure on (256)")
    add(
        "--trajectory-weight",
        type=float,
        default=DEFAULTS["trajectory_weight"],
        help="of the distance on the way, beside 1 at the end (0.1)",
    )
    add("--loss", default="latents", help=f"distance of the ends: {' or '.join(LOSSES)} (latents)")
    add("--labels", default="", help="to learn from, such as 0,1,2; all, if not given")
    add("--evaluate-every", type=int, default=DEFAULTS["evaluate_every"], help="steps (25)")
    add("--patience", type=int, default=DEFAULTS["patience"], help="measurements no better (6)")
    add("--seed", type=int, default=0, help="of the noises (0)")
    add("--remat", default="", help=f"what is computed again: {', '.join(REMATS)}; by size")
    add("--dtype", default="float32", help="of the sampler's networks, float32 or bfloat16")
    return parser


def _schedules(args: argparse.Namespace) -> list[Schedule]:
    if (args.schedule is None) == (args.evaluations is None):
        raise InputError("say what to learn: --evaluations=5, or --schedule=S5; one of them")
    if args.schedule is not None:
        if args.refiner:
            raise InputError("--refiner goes with --evaluations; write the R into --schedule")
        return [Schedule.parse(text) for text in args.schedule.split(",")]
    if args.evaluations < 1:
        raise InputError(f"--evaluations is {args.evaluations}; it must be 1 or more")
    return [Schedule.parse(f"S{args.evaluations}{'R1' if args.refiner else ''}")]


def _search(args: argparse.Namespace, schedule: Schedule) -> Search:
    given = {name: getattr(args, name) for name in DEFAULTS if name not in ("schedule", "labels")}
    return Search(schedule, labels=tuple(_numbers(args.labels, int, "--labels")), **given)


def _numbers(text: str, kind: Any, flag: str) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise InputError(f"{flag} is {text!r}; give numbers with commas between") from error


def _plans(
    pipe: ClassToImage, args: argparse.Namespace, schedules: Sequence[Schedule]
) -> list[Plan]:
    """How to sample, at each guidance scale; their schedule is to be replaced."""
    for schedule in schedules:
        if schedule.needs_refiner and pipe.model.description.refiner is None:
            raise InputError(
                f"schedule {schedule} refines, but this model has no refiner; leave R out, or "
                "train one with train.py"
            )
    scales: list[float | None] = [*_numbers(args.guidance_scales, float, "--guidance-scales")]
    asked = (args.guidance, args.guidance_interval)
    return [pipe.plan("H1", scale, *asked) for scale in scales or [None]]


def _check_writable(directory: Path) -> None:
    """Refuses now a model directory that could not take the solver after the search."""
    folder = directory / solver_files.FOLDER
    if not os.access(folder if folder.exists() else directory, os.W_OK):
        raise InputError(
            f"cannot write into {directory}; copy the model to a place that can be written to"
        )


def _known(
    directory: Path, pipe: ClassToImage, schedule: Schedule, guidance: str, interval: Any
) -> LearntSolver | None:
    """The model's solver of a schedule, which numbers are added to; None for none that fits.

    Raises:
      InputError: the model has one for another guidance, or a file that cannot be read.
    """
    file = solver_files.place(directory, schedule)
    if not file.exists():
        return None
    known = solver_files.of_model(directory, schedule)
    try:
        known.check_model(pipe.model.fingerprints)
    except InputError:
        say(f"{file} was learnt for other weights, and is replaced")
        return None
    if (known.guidance, known.guidance_interval) != (guidance, interval):
        raise InputError(
            f"{file} is for guidance {known.guidance!r} on {known.guidance_interval or 'all'} of "
            "the time; move it away to learn it for another guidance"
        )
    return known


def _with(
    known: LearntSolver | None,
    numbers: Numbers,
    pipe: ClassToImage,
    search: Search,
    guidance: str,
    interval: Any,
) -> LearntSolver:
    """A solver with one more scale, or the first one of a new solver."""
    if known is not None:
        return dataclasses.replace(known.with_numbers(numbers), card=_card(pipe, search))
    sha256 = pipe.model.fingerprints
    refiner = sha256["refiner"] if search.schedule.needs_refiner else None
    return LearntSolver(
        search.schedule,
        guidance,
        interval,
        (numbers,),
        sha256["predictor"],
        refiner,
        _card(pipe, search),
    )


def _card(pipe: ClassToImage, search: Search) -> dict[str, Any]:
    """How it was learnt."""
    settings = {name: value for name, value in vars(search).items() if name != "schedule"}
    return {
        **settings,
        "fine_solution": fine_solution.METHOD,
        "dtype": np.dtype(pipe.model.predictor.dtype).name,
        "device": jax.devices()[0].device_kind,
        "devices": parallel.total_devices(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def table(rows: Sequence[tuple[Schedule, Numbers]]) -> str:
    """What was learnt, as a Markdown table."""
    heading = ["schedule", "guidance scale", "evaluations", "+ refiner", "RMSE before", "learnt"]
    cells = [
        [
            str(schedule),
            f"{numbers.guidance_scale:g}",
            str(schedule.predictor_evaluations),
            str(schedule.refiner_evaluations),
            f"{numbers.results['start_rmse']:.4f}",
            f"{numbers.results['held_out_rmse']:.4f}",
        ]
        for schedule, numbers in rows
    ]
    return markdown.table(heading, cells)
