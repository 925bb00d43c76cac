r"""Measures schedules of a model directory, or compares what was measured.

  evaluate digits --schedules H8,H1P3R2 --samples 5000 --seeds 0,1,2 --out runs/digits.json
  evaluate models/sit-xl-2-256 --features inception:pt_inception-2015-12-05-6726825d.pth \
      --reference VIRTUAL_imagenet256_labeled.npz --out runs/xl.json
  evaluate --compare A.json B.json

Every row of the results has a protocol card: all that the numbers depend on. Rows that stand in the
file, made by the same protocol, are not made again, and a measurement that was interrupted goes on
at its last batch with the same command. --compare refuses rows whose protocols differ.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowturbo_jax.commands.entry import LineParser
from flowturbo_jax.commands.progress import images_done, say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import comparison, evaluation, judging
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.judging import Judges
from flowturbo_jax.pipelines.plan import Plan


def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures or compares, and prints a table in Markdown."""
    args = _parser().parse_args(argv[1:])
    if args.compare:
        print(_compare(args))
        return
    if args.allow:
        raise InputError("--allow means nothing without --compare; leave it out")
    if args.model_dir is None or args.out is None:
        raise InputError("give a model directory and --out, or --compare with two files")
    pipe = ClassToImage.load(args.model_dir, args.dtype)
    asked = (args.guidance_scale, args.guidance, args.guidance_interval)
    # What is named twice is measured and counted once.
    plans = list(dict.fromkeys(pipe.plan(text, *asked) for text in args.schedules.split(",")))
    seeds = list(dict.fromkeys(_seeds(args.seeds)))
    shape = pipe.model.description.image_shape
    out = Path(args.out)
    with judging.opened(
        args.features, args.reference, shape, _work(out, "reference"), say
    ) as judges:
        judges = judges._replace(neighbours=args.neighbours)
        judging.check_fits(shape, judges)
        jobs = [(plan, _card(pipe, plan, seed, args, judges)) for plan in plans for seed in seeds]
        rows = measure(pipe, jobs, judges, out, args.images, args.npz)
    print(comparison.table(rows))
    for warning in dict.fromkeys(line for row in rows for line in row["card"]["warnings"]):
        print(f"warning: {warning}")


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model_dir", nargs="?", help="model directory, or the name of a shipped model")
    add("--out", help="JSON file of results, continued if it exists")
    add("--schedules", default="H1P5R3", help="comma-separated, such as H8,H1P3R2,fast (H1P5R3)")
    add("--samples", type=int, default=50_000, help="per schedule and seed (50000)")
    add("--seeds", default="0", help="comma-separated (0); three say how far to trust a number")
    add("--labels", default="balanced", help="balanced (each class equally often) or random")
    add("--features", help="pixels, digits or inception:FILE; pixels for the digits' size")
    add("--reference", help="digits, FILE.npz, images:DIR, folder:DIR, tfds:NAME or mixture:DIR")
    add("--neighbours", type=int, default=3, help="of precision and recall (3)")
    add("--guidance", help="paired, official or none; the model's default")
    add("--guidance-scale", type=float, help="the model's default")
    add("--guidance-interval", help="flow times such as 0.1:0.8; all of the time")
    add("--batch-size", type=int, default=250, help="images per call, over all devices (250)")
    add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
    add("--images", help="folder for the images as PNG, a sub-folder per schedule and seed")
    add("--npz", help="folder for the images as arr_0 in .npz, a file per schedule and seed")
    add("--compare", nargs=2, metavar="FILE", help="two files of results")
    add("--allow", default="", help="keys of cards that --compare lets differ, comma-separated")
    return parser


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds is {text!r}; give numbers such as 0,1,2") from error
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise InputError(f"--seeds has {wrong[0]}; a seed is in [0, 2^32)")
    return seeds


def _card(
    pipe: ClassToImage, plan: Plan, seed: int, args: argparse.Namespace, judges: Judges
) -> dict[str, Any]:
    for name, least in (("samples", 2), ("batch_size", 1), ("neighbours", 1)):
        if not least <= getattr(args, name) <= 2**31:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(args, name)}; it must be at least {least}")
    evaluation.labels_of(1, 1, args.labels)
    return evaluation.protocol_card(
        pipe,
        plan,
        seed=seed,
        samples=args.samples,
        batch_size=args.batch_size,
        judges=judges,
        label_sampling=args.labels,
    )


def measure(
    pipe: ClassToImage,
    jobs: Sequence[tuple[Plan, dict[str, Any]]],
    judges: Judges,
    out: Path,
    images: str | None = None,
    npz: str | None = None,
) -> list[dict[str, Any]]:
    """Makes every measurement that is not in the file yet.

    Args:
      pipe: the model.
      jobs: how to sample, and the protocol card, of each.
      judges: what the samples are judged by.
      out: JSON file: a list of `{"card": ..., "results": ...}`, rewritten whole each time.
      images: folder for PNGs; None for none.
      npz: folder for .npz files of images; None for none.

    Returns:
      One row per job, in order.

    Raises:
      InputError: the file holds something else, or cannot be written.
    """
    known = comparison.read_rows(out) if out.exists() else []
    _check_writable(out)
    rows = []
    for plan, card in jobs:
        row = next((row for row in known if row["card"] == card), None)
        if row is None:
            key = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:16]
            name = f"{plan.schedule}-{card['guidance']}-seed{card['seed']}"
            with images_done(name) as show:
                results = evaluation.measure(
                    pipe,
                    plan,
                    judges,
                    card,
                    _work(out, key),
                    png=Path(images) / name if images else None,
                    npz=Path(npz) / f"{name}.npz" if npz else None,
                    on_images=show,
                )
            row = {"card": card, "results": results}
            known.append(row)
            _write(out, known)
        rows.append(row)
    return rows


def _work(out: Path, key: str) -> Path:
    """Where what an interruption must not lose is kept."""
    return out.with_name(f".{out.name}.work") / key


def _check_writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise InputError(f"{out} is a folder; --out names a file")
        draft = _draft(out)
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def _draft(out: Path) -> Path:
    return out.with_name(f".{out.name}.draft")


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    try:
        _draft(out).write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(_draft(out), out)
        folder = _work(out, "any").parent
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def _compare(args: argparse.Namespace) -> str:
    files = {name: comparison.read_rows(name) for name in args.compare}
    if len(files) < 2:
        raise InputError(f"--compare names {args.compare[0]} twice; give two files")
    allowed = frozenset(key.strip() for key in args.allow.split(",") if key.strip())
    comparison.refuse_unlike(files, allowed)
    names = [name for name, rows in files.items() for _ in rows]
    return comparison.table([row for rows in files.values() for row in rows], names)
