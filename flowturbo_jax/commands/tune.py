"""Finds the best schedules for a model on the device at hand, with no data set needed.

  tune digits --out runs/tune_digits
  tune models/sit-xl-2-256 --max-evaluations 12 --dtype bfloat16 --out runs/tune_xl --write

Schedules are measured by their distance from a fine solution of the same flow from the same noise
(Tsit5 with a tight tolerance), and by their time; what is near the front of both is varied in grid,
rule, order, guidance mode and interval. The last few are compiled, timed, and with --metric also
judged as evaluate does. OUT gets tune.json, tune.png and tune.svg; --write puts the schedules found
into the model directory, as "fast", "balanced" and "best". Interrupted, the same command goes on.
"""

import argparse
import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowturbo_jax import markdown, model_directory, run_folder, solver_files
from flowturbo_jax.commands import output_file, tune_plot
from flowturbo_jax.commands.entry import LineParser, one_line
from flowturbo_jax.commands.progress import bars, images_done, say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import any_model, evaluation, fine_solution, fronts, judging, tuning
from flowturbo_jax.pipelines.candidates import Space
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.fronts import Finalist
from flowturbo_jax.pipelines.judging import Judges
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.tuning import Tuner

LOWER = ("frechet_distance", "spatial_frechet_distance")
HIGHER = ("inception_score", "precision", "recall", "label_accuracy")
DEFAULTS = Space()
SAMPLES = 5000


def main(argv: Sequence[str]) -> None:
    """Reads the command line, searches, and writes what was found."""
    args = _parser().parse_args(argv[1:])
    if args.metric is not None and args.metric not in LOWER + HIGHER:
        raise InputError(f"--metric is {args.metric!r}; it can be {', '.join(LOWER + HIGHER)}")
    if args.finalists < 2 or (args.samples is not None and args.samples < 2):
        raise InputError("--finalists and --samples must be at least 2")
    if args.metric is None and (args.features or args.reference or args.samples):
        raise InputError("--samples, --features and --reference mean nothing without --metric")
    any_model.refuse_text(args.model_dir, "tune")
    pipe = ClassToImage.load(args.model_dir, args.dtype)
    exact = pipe if args.dtype == "float32" else ClassToImage.load(args.model_dir, "float32")
    space = tuning.space_for(pipe, _space(args))
    asked = (args.guidance_scale, space.modes[0])
    baselines = [pipe.plan(text, *asked) for text in args.baselines.split(",")]
    out = Path(args.out)
    with run_folder.reserved(out, "--out"), contextlib.ExitStack() as stack:
        judges = None
        if args.metric is not None:
            shape = pipe.model.description.image_shape
            judges = stack.enter_context(
                judging.opened(
                    args.features,
                    args.reference,
                    shape,
                    out / "reference",
                    say,
                    classes=pipe.model.description.predictor.num_classes,
                )
            )
            judging.check_fits(shape, judges)
        with bars() as show:
            tuner = Tuner(
                pipe,
                exact,
                out,
                noises=args.noises,
                seed=args.seed,
                batch_size=args.batch_size,
                latency_batch=args.latency_batch,
                on_progress=show,
            )
            front = tuner.search(space, baselines[0], _learnt(pipe, asked))
            chosen = [one.plan for one in fronts.thinned(front, args.finalists)]
            measured = tuner.finalists(list(dict.fromkeys([*baselines, *chosen])))
        if judges is not None:
            measured = [_judged(pipe, found, judges, args, out) for found in measured]
        baseline = measured[0]
        recommended = fronts.recommend(measured, baseline)
        report = _report(pipe, args, space, measured, recommended, judges)
        _write(out / "tune.json", report)
        tune_plot.draw(
            out / "tune",
            tuner.screened,
            measured,
            recommended,
            args.metric,
            args.metric in LOWER,
        )
    print(table(measured, recommended, args.metric))
    if recommended["fast"].plan == baseline.plan:
        print(f"warning: nothing cheaper is as good as {fronts.described(baseline.plan)}")
    if report["rank_correlation"] is not None:
        print(f"rank correlation of error and {args.metric}: {report['rank_correlation']:.3f}")
    if args.write:
        presets = {name: fronts.preset(found.plan) for name, found in recommended.items()}
        directory = model_directory.resolve(args.model_dir)
        model_directory.write_schedules(directory, presets)
        print(f"wrote {', '.join(presets)} into {one_line(str(directory / 'model.json'))}")
    print(f"wrote {one_line(str(out / 'tune.json'))}, tune.png and tune.svg")


def _learnt(pipe: ClassToImage, asked: tuple[float | None, str]) -> list[Plan]:
    """Plans by the solvers that the model directory has; those that do not fit are left out."""
    plans = []
    for schedule in solver_files.learnt_schedules(pipe.model.directory):
        try:
            plans.append(pipe.plan(schedule, *asked))
        except InputError as error:
            say(f"left out: {error}")
    return plans


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax tune", description=__doc__)
    add = parser.add_argument
    add("model_dir", help="model directory, or the name of a shipped model")
    add("--out", required=True, help="folder of the results, continued if it exists")
    add("--max-evaluations", type=int, default=DEFAULTS.max_evaluations, help="at most (12)")
    add("--max-refiner-steps", type=int, default=DEFAULTS.max_refiner_steps, help="at most (4)")
    add("--modes", default="", help="guidance modes; the model's own and the other one")
    add("--guidance-scale", type=float, help="the model's default")
    add("--rules", default=",".join(DEFAULTS.refiner_rules), help="refiner rules (R,Rc)")
    shifts = ",".join(f"{shift:g}" for shift in DEFAULTS.shifts)
    add("--shifts", default=shifts, help=f"of the time grid, beside 1 ({shifts})")
    spacings = ",".join(DEFAULTS.spacings)
    adams = ",".join(DEFAULTS.adams)
    add("--adams", default=adams, help=f"Adams-Bashforth's methods to try ({adams})")
    add("--spacings", default=spacings, help=f"other time grids ({spacings})")
    intervals = ",".join(DEFAULTS.intervals)
    add("--intervals", default=intervals, help=f"of guidance, beside all ({intervals})")
    add("--one-order", action="store_true", help="try no other order than H, P, R")
    add("--noises", type=int, default=128, help="of the finalists' errors (128)")
    add("--finalists", type=int, default=10, help="to compile and time (10)")
    add("--baselines", default="H8,H4", help="to compare with, the first to be reached (H8,H4)")
    add("--metric", help=f"also judge finalists by: {', '.join(LOWER + HIGHER)}")
    add("--samples", type=int, help=f"of the metric ({SAMPLES})")
    add("--features", help="of the metric, as in evaluate")
    add("--reference", help="of the metric, as in evaluate")
    add("--seed", type=int, default=0, help="of the noises (0)")
    add("--batch-size", type=int, default=64, help="noises solved, samples judged at once (64)")
    add("--latency-batch", type=int, default=8, help="images of a timed call (8)")
    add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
    add("--write", action="store_true", help="put the schedules found into the model directory")
    return parser


def _space(args: argparse.Namespace) -> Space:
    def words(text: str) -> tuple[str, ...]:
        return tuple(word.strip() for word in text.split(",") if word.strip())

    try:
        shifts = tuple(float(shift) for shift in words(args.shifts))
    except ValueError as error:
        raise InputError(f"--shifts is {args.shifts!r}; give numbers such as 0.5,2") from error
    return Space(
        max_evaluations=args.max_evaluations,
        max_refiner_steps=args.max_refiner_steps,
        modes=words(args.modes),
        refiner_rules=words(args.rules),
        shifts=shifts,
        intervals=words(args.intervals),
        spacings=words(args.spacings),
        adams=words(args.adams),
        orders=not args.one_order,
    )


def _judged(
    pipe: ClassToImage, found: Finalist, judges: Judges | None, args: argparse.Namespace, out: Path
) -> Finalist:
    """A finalist with the scores of `evaluate`, read where they were measured before."""
    if judges is None:
        return found
    card = evaluation.protocol_card(
        pipe,
        found.plan,
        seed=args.seed,
        samples=args.samples or SAMPLES,
        batch_size=args.batch_size,
        judges=judges,
    )
    key = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:16]
    file = out / "scores" / f"{key}.json"
    try:
        scores = json.loads(file.read_text())
    except (OSError, ValueError):
        with images_done(fronts.described(found.plan)) as show:
            scores = evaluation.measure(
                pipe, found.plan, judges, card, out / "scores" / key, on_images=show
            )
        _write(file, scores)
        judging.remove(out / "scores" / key)
    if args.metric not in scores:
        raise InputError(
            f"--metric {args.metric} cannot be had from these features and this reference; there "
            f"are {', '.join(scores)}"
        )
    value = scores[args.metric]
    badness = value if args.metric in LOWER else 1 / max(value, 1e-9)
    return found._replace(scores=scores, badness=badness)


def _report(
    pipe: ClassToImage,
    args: argparse.Namespace,
    space: Space,
    measured: Sequence[Finalist],
    recommended: dict[str, Finalist],
    judges: Judges | None,
) -> dict[str, Any]:
    """The contents of tune.json."""
    best = recommended["best"].plan
    card = evaluation.protocol_card(
        pipe,
        best,
        seed=args.seed,
        samples=args.noises,
        batch_size=args.latency_batch,
        judges=judges,
    )
    for key in ("schedule", "steps", "predictor_evaluations", "refiner_evaluations"):
        del card[key]  # of one plan, as are these:
    for key in ("guidance", "guidance_interval", "guided_channels"):
        del card[key]
    if judges is not None:
        card["metric"], card["metric_samples"] = args.metric, args.samples or SAMPLES
    report: dict[str, Any] = {
        "card": card,
        "space": vars(space),
        "error": {
            "what": "mean of |z - z*| / |z*| over noises",
            "fine_solution": fine_solution.METHOD,
            "tolerance": fine_solution.TOLERANCE,
        },
        "baseline": fronts.described(measured[0].plan),
        "recommended": {name: _row(found) for name, found in recommended.items()},
        "finalists": [_row(found) for found in measured],
    }
    correlation = fronts.rank_correlation(measured) if args.metric and len(measured) > 2 else None
    report["rank_correlation"] = _finite(correlation)
    return report


def _finite(number: float | None) -> float | None:
    """A number as JSON can hold it: None if it is not finite."""
    return number if number is not None and math.isfinite(number) else None


def _row(found: Finalist) -> dict[str, Any]:
    plan = found.plan
    return {
        "schedule": str(plan.schedule),
        "guidance": plan.guidance,
        "guidance_scale": float(plan.scale),
        "guidance_interval": plan.interval,
        "predictor_evaluations": plan.schedule.predictor_evaluations,
        "refiner_evaluations": plan.schedule.refiner_evaluations,
        "ms_per_image": found.ms_per_image,
        "error": _finite(found.error),
        **found.scores,
    }


def _write(path: Path, content: Any) -> None:
    output_file.replace(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def table(
    measured: Sequence[Finalist], recommended: dict[str, Finalist], metric: str | None
) -> str:
    """What was measured at last, fastest first, as a Markdown table."""
    names: dict[Any, list[str]] = {}
    for name, found in recommended.items():
        names.setdefault(found.plan, []).append(name)
    heading = ["schedule", "guidance", "evaluations", "+ refiner", "ms/image", "error"]
    heading += [metric, ""] if metric else [""]
    rows = []
    for found in sorted(measured, key=lambda found: found.ms_per_image):
        schedule, guidance = found.plan.schedule, fronts.described(found.plan).partition(" ")[2]
        cells = [str(schedule), guidance]
        cells += [str(schedule.predictor_evaluations), str(schedule.refiner_evaluations)]
        cells += [f"{found.ms_per_image:.3f}", f"{found.error:.4f}"]
        cells += [f"{found.scores[metric]:.4f}"] if metric else []
        rows.append([*cells, ", ".join(names.get(found.plan, []))])
    return markdown.table(heading, rows)
