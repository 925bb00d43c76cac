"""Measures how steady a model's velocity is along its trajectories, and where refining is safe.

  stability digits --out runs/stability
  stability models/sit-xl-2-256 --labels "otter,golden retriever" --dtype bfloat16 --out runs/xl

Writes stability.json, .png and .svg: the paper's figure 1 for any model directory, beside what
keeping the velocity for a step errs, and what is left of that after the refiner. Interrupted, the
same command goes on.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax import markdown, plots, run_folder
from flowturbo_jax.commands import output_file
from flowturbo_jax.commands.entry import LineParser, one_line
from flowturbo_jax.commands.progress import images_done
from flowturbo_jax.guidance import check_interval
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import Model
from flowturbo_jax.pipelines import any_model, stability
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.stability import Samples
from flowturbo_jax.pipelines.stability_rule import Verdict, judge

TABLE_ROWS = 20
MOST_DECADES = 6  # that a logarithmic axis shows of numbers that reach 0


def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures, and prints a table in Markdown and a sentence."""
    args = _parser().parse_args(argv[1:])
    _check(args)
    model, plan, samples, card = _request(args)
    out = Path(args.out)
    _check_writable(out)
    with run_folder.reserved(out, "--out"):
        rows = stability.open_rows(out / ".stability.work", card)
        with images_done("stability", "trajectory") as show:
            measured = stability.measure(
                model, plan, samples, rows, batch_size=args.batch_size, on_images=show
            )
        result, verdict = report(card, measured, args.safe_below)
        plots.save(draw(result, verdict), out / "stability")
        output_file.replace(out / "stability.json", json.dumps(result, indent=1) + "\n")
        rows.remove()
    print(table(result), end="\n\n")
    print(verdict.sentence)
    if card["dtype"] != "float32":
        print(f"warning: the curvature has the rounding of {card['dtype']} in it; take float32")
    print(f"wrote {one_line(str(out / 'stability'))}.json, .png and .svg")


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax stability", description=__doc__)
    add = parser.add_argument
    add("model_dir", help="model directory, or the name of a shipped model")
    add("--out", required=True, help="folder for stability.json, .png and .svg")
    add("--noises", type=int, default=8, help="noises under each label (8)")
    add("--labels", help="class names or numbers, comma-separated; 10 spread over all classes")
    add("--steps", type=int, default=20, help="Euler steps (20); refining bridges one of them")
    add("--safe-below", type=float, default=0.05, help="error that is safe, of |v| (0.05)")
    add("--seed", type=int, default=0, help="of the noises (0)")
    add("--guidance", help="paired, official or none; the model's default")
    add("--guidance-scale", type=float, help="the model's default")
    add("--guidance-interval", help="flow times such as 0.1:0.8; all of the time")
    add("--batch-size", type=int, default=64, help="trajectories at once, over all devices (64)")
    add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
    return parser


def _check(args: argparse.Namespace) -> None:
    limits = {
        "noises": (1, 2**20),
        "steps": (stability.LEAST_STEPS, stability.MOST_STEPS),
        "seed": (0, 2**32 - 1),
        "batch_size": (1, 2**20),
    }
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            flag = name.replace("_", "-")
            raise InputError(
                f"--{flag} is {getattr(args, name)}; it must lie between {least} and {most}"
            )
    if not 0 < args.safe_below <= 1:
        raise InputError(
            f"--safe-below is {args.safe_below:g}; it is a fraction of |v|, such as 0.05"
        )


def _request(args: argparse.Namespace) -> tuple[Model, Plan, Samples, dict[str, Any]]:
    any_model.refuse_text(args.model_dir, "stability")
    pipe = ClassToImage.load(args.model_dir, args.dtype)
    interval = check_interval(args.guidance_interval)
    plan = pipe.plan(f"E{args.steps}", args.guidance_scale, args.guidance, interval)
    labels = stability.choose_labels(pipe.model.description, args.labels)
    samples = Samples(args.seed, args.noises, labels)
    return pipe.model, plan, samples, stability.describe(pipe, plan, samples)


def report(
    card: Mapping[str, Any], measured: Mapping[str, np.ndarray], safe_below: float
) -> tuple[dict[str, Any], Verdict]:
    """What stability.json holds, and the verdict in it.

    Args:
      card: the protocol card.
      measured: of `stability.measure`.
      safe_below: threshold of the rule, a fraction of |v|.
    """
    steps = card["steps"]
    t = [i / steps for i in range(steps)]
    curves: dict[str, Any] = {
        name: {"t": t[1 : 1 + values.shape[1]], **stability.summarise(values)}
        for name, values in measured.items()
    }
    refine = curves.setdefault("refine", None)
    verdict = judge(
        t[1:], curves["keep"]["mean"], None if refine is None else refine["mean"], safe_below
    )
    rule = {"safe_below": safe_below, "better": verdict.better, "safe": verdict.safe}
    return (
        {"card": dict(card), "t": t, **curves, "rule": rule, "sentence": verdict.sentence},
        verdict,
    )


def table(result: Mapping[str, Any]) -> str:
    """The means as a table in Markdown, at most 20 times of them."""
    keep, refine = result["keep"], result["refine"]
    curvature = dict(zip(result["curvature"]["t"], result["curvature"]["mean"], strict=True))
    rows = []
    last = len(keep["t"]) - 1
    for i in dict.fromkeys(round(i) for i in np.linspace(0, last, TABLE_ROWS).tolist()):
        t = keep["t"][i]
        bend = f"{curvature[t]:.3g}" if t in curvature else ""
        refined = "" if refine is None else f"{100 * refine['mean'][i]:.2f} %"
        rows.append([f"{t:.3g}", bend, f"{100 * keep['mean'][i]:.2f} %", refined])
    return markdown.table(["t", "curvature", "keeping errs", "refining errs"], rows)


def draw(result: Mapping[str, Any], verdict: Verdict) -> Any:
    """The figure of stability.png: curvature per t, and errors per t with the ranges shaded.

    Args:
      result: of `report`.
      verdict: of `report`.
    """
    card, refine = result["card"], result["refine"]
    with plots.style():
        figure, (left, right) = plots.panels(2)
        _curve(left, result["curvature"], plots.PURPLE, "curvature")
        _log_scale(left, result["curvature"])
        left.set_title("Curvature of the velocity")
        left.set_ylabel(r"$|v_{i+1} - 2 v_i + v_{i-1}|\ /\ (|v_i|\, dt^2)$")

        _curve(right, result["keep"], plots.VERMILION, "velocity kept", 100)
        if refine is not None:
            _curve(right, refine, plots.BLUE, "velocity refined", 100)
        limit = 100 * result["rule"]["safe_below"]
        dashes = {"color": plots.QUIET_INK, "linewidth": 0.9, "linestyle": "--"}
        right.axhline(limit, label=f"threshold, {limit:g} %", **dashes)
        wider = None if verdict.better == verdict.safe else verdict.better
        for label, found, opacity in (
            ("refining errs less", wider, 0.12),
            ("refining is safe", verdict.safe, 0.25),
        ):
            if found is not None:
                right.axvspan(found[0], 1, color=plots.GREEN, alpha=opacity, lw=0, label=label)
        right.set_ylim(bottom=0)
        right.set_title(f"Error of the velocity after dt = {card['dt']:.3g}")
        right.set_ylabel("% of |v|")
        right.legend(loc="best")
        for axes in (left, right):
            axes.set_xlim(0, 1)
            axes.set_xlabel("flow time t (0 noise, 1 data)")
        guided = "no guidance"
        if card["guidance"] != "none":
            guided = f"{card['guidance']} guidance {card['guidance_scale']:g}"
        figure.supxlabel(
            f"mean, and 10 to 90 % of {card['samples']} trajectories ({card['noises']} noises, "
            f"{len(card['labels'])} labels, {guided})",
            fontsize=8.5,
            color=plots.QUIET_INK,
        )
    return figure


def _curve(axes: Any, curve: Mapping[str, Any], colour: str, label: str, unit: float = 1) -> None:
    low, mean, high = (unit * np.asarray(curve[name]) for name in ("q10", "mean", "q90"))
    axes.fill_between(curve["t"], low, high, color=colour, alpha=plots.BAND, linewidth=0)
    axes.plot(curve["t"], mean, color=colour, marker="o", label=label)


def _log_scale(axes: Any, curve: Mapping[str, Any]) -> None:
    """A logarithmic axis labelled with plain numbers; a linear one where all is 0."""
    from matplotlib import ticker

    if not (highest := max(curve["mean"])) > 0:
        return
    lowest = max(min(curve["q10"]), highest / 10**MOST_DECADES)
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(0.8 * lowest, 1.25 * max(*curve["q90"], highest))
    few = highest < 100 * lowest
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft = out / f".stability.{os.getpid()}.tmp"
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {out}: {error.strerror}; choose another --out"
        ) from error
