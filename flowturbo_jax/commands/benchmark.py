"""Measures how fast schedules of a model are on this device, and where the time goes.

  benchmark digits --schedules H8,H1P3R2 --batch-sizes 1,8 --out runs/digits_speed.json
  benchmark --size SiT-XL/2 --dtype bfloat16 --out runs/xl_speed.json
  benchmark --size "SD 1.x U-Net" --schedules H4,H8,H1P6R3 --dtype bfloat16

ms/image is the time of one call until its images are on the host; images/s is of calls that follow
each other without waiting. Each part is measured as a program of its own; the rest is what the
whole takes more, or less, than its parts. GMAC counts multiply-adds of the networks for one branch
of guidance, as the paper's GFLOPs do; utilisation counts all that is multiplied, over what matrix
products alone reach on this device. FILE.json gets everything, and a picture lies beside it.
"""

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowturbo_jax import plots
from flowturbo_jax.commands import benchmark_plot, output_file
from flowturbo_jax.commands.benchmark_tables import tables
from flowturbo_jax.commands.entry import LineParser, one_line
from flowturbo_jax.commands.progress import say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import network_dtype
from flowturbo_jax.pipelines import (
    ablation,
    benchmark,
    cold_start,
    program_cache,
    random_model,
)
from flowturbo_jax.pipelines.plan import Plan, resolve
from flowturbo_jax.pipelines.subject import Subject
from flowturbo_jax.pipelines.timing import Stopwatch
from flowturbo_jax.quantization import check_kind

MOST_IMAGES, MOST_REPEATS = 2**16, 1000
PICTURES = (".png", ".svg")
SCHEDULES, BATCH_SIZES = "H8,H1P5R3", "1,8"


def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures, and prints tables in Markdown."""
    args = _parser().parse_args(argv[1:])
    subject = _subject(args)
    plans, batch_sizes = _plans(args, subject), _batch_sizes(args.batch_sizes)
    if not 1 <= args.repeats <= MOST_REPEATS:
        raise InputError(f"--repeats is {args.repeats}; it must lie between 1 and {MOST_REPEATS}")
    with contextlib.ExitStack() as stack:
        out = None if args.out is None else _file(args.out)
        if out is not None:
            stack.enter_context(output_file.reserved(out))
        # First, while no device belongs to this process.
        started = None if args.no_cold_start else _cold_start(args, subject, batch_sizes[0])
        program_cache.enable(program_cache.OFF)  # or every program would be made twice
        pipe, stopwatch = subject.load(args.dtype, args.quantization), Stopwatch(args.repeats)
        report = benchmark.measure(
            pipe, plans, batch_sizes, stopwatch, ablate=args.ablation, say=say
        )
        report = {"model": subject.name, **report, "cold_start": started}
        if out is not None:
            output_file.replace(out, json.dumps(report, indent=1) + "\n")
            plots.save(benchmark_plot.draw(report), out.with_suffix(""))
    print("\n\n".join(tables(report)))
    if out is not None:
        print(f"\nwrote {one_line(str(out))}, {' and '.join(PICTURES)}")


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax benchmark", description=__doc__)
    add = parser.add_argument
    add("model_dir", nargs="?", help="model directory, or the name of a shipped model")
    add("--size", help="instead: a published size with random weights, such as those above")
    add("--image-size", type=int, help="side of its images (256; of a U-Net 512)")
    add("--no-vae", action="store_true", help="its latents alone, without a VAE to decode them")
    add("--schedules", default=SCHEDULES, help=f"the first is compared with ({SCHEDULES})")
    add("--batch-sizes", default=BATCH_SIZES, help=f"images of a call ({BATCH_SIZES})")
    add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
    add("--quantization", help="int8 or fp8 for the transformer blocks' matrix products")
    add("--guidance", help="paired, official or none; the model's default")
    add("--guidance-scale", type=float, help="the model's default")
    add("--guidance-interval", help="flow times such as 0.1:0.8; all of the time")
    add("--repeats", type=int, default=10, help="of a measurement, fewer where it is slow (10)")
    add("--ablation", action="store_true", help="also compile in pieces: the paper's table 3a")
    add("--no-cold-start", action="store_true", help="do not start two fresh processes first")
    add("--out", help="JSON file for the results; without it they are only printed")
    return parser


def _subject(args: argparse.Namespace) -> Subject:
    if (args.model_dir is None) == (args.size is None):
        raise InputError("give a model directory or --size, one of them")
    if args.size is None and (args.image_size is not None or args.no_vae):
        raise InputError("--image-size and --no-vae mean nothing without --size")
    size = args.image_size
    if size is None:
        size = random_model.default_size(args.size or "")
    return Subject(args.model_dir, args.size, size, not args.no_vae)


def _plans(args: argparse.Namespace, subject: Subject) -> list[Plan]:
    network_dtype(args.dtype)
    check_kind(args.quantization)
    description = subject.describe()
    if args.quantization is not None and description.takes_text:
        raise InputError(
            f"--quantization is for models of classes, and {subject.name} takes texts; leave it out"
        )
    asked = (args.guidance_scale, args.guidance, args.guidance_interval)
    words = args.schedules.split(",")
    plans = [resolve(description, text, *asked, subject.solver) for text in words]
    for plan in plans if args.ablation else ():
        ablation.check(plan)
    return list(dict.fromkeys(plans))


def _batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(number) for number in text.split(",")]
    except ValueError:
        sizes = [0]
    if not all(1 <= size <= MOST_IMAGES for size in sizes):
        raise InputError(
            f"--batch-sizes is {text!r}; give numbers of images such as 1,8, each up to "
            f"{MOST_IMAGES}"
        )
    return list(dict.fromkeys(sizes))


def _file(text: str) -> Path:
    out = output_file.named(text)
    if out.suffix != ".json":
        raise InputError(f"--out is {text!r}; it must end in .json")
    for suffix in PICTURES:
        if out.with_suffix(suffix).is_dir():
            raise InputError(f"{out.with_suffix(suffix)} is a folder; choose another --out")
    return out


def _cold_start(args: argparse.Namespace, subject: Subject, batch_size: int) -> dict[str, Any]:
    request = cold_start.Request(
        subject,
        args.dtype,
        batch_size,
        args.schedules.split(",")[-1].strip(),
        args.guidance_scale,
        args.guidance,
        args.guidance_interval,
        args.quantization,
    )
    say(f"two fresh processes, {request.schedule}, batch {batch_size}")
    return benchmark.cold_start_report(request, cold_start.measure(request))
