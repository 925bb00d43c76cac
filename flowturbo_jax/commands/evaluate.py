r"""Measures schedules of a model directory, or compares what was measured.

  evaluate digits --schedules H8,H1P3R2 --samples 5000 --seeds 0,1,2 --out runs/digits.json
  evaluate models/sit-xl-2-256 --features inception:pt_inception-2015-12-05-6726825d.pth \
      --reference VIRTUAL_imagenet256_labeled.npz --out runs/xl.json
  evaluate models/2rf --captions prompts.txt --samples 5000 --reference images:photographs \
      --features inception:pt_inception-2015-12-05-6726825d.pth --out runs/2rf.json \
      --batch-size=8 --dtype=bfloat16
  evaluate --compare A.json B.json

Every row of the results has a protocol card: all that the numbers depend on. Rows that stand in the
file, made by the same protocol, are not made again, and a measurement that was interrupted goes on
at its last batch with the same command. --compare refuses rows whose protocols differ. What the
metrics are, and where their networks and references come from: docs/evaluation.md.
"""

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowturbo_jax import model_directory
from flowturbo_jax.commands import output_file
from flowturbo_jax.commands.entry import LineParser, one_line
from flowturbo_jax.commands.progress import images_done, say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import any_model, captions, comparison, evaluation, judging, memory
from flowturbo_jax.pipelines.captions import Captions
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.image_files import ImageFiles
from flowturbo_jax.pipelines.judging import Judges
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.sample_config import size_of

COMPARING = {"compare", "allow"}
OF_TEXTS = ("captions", "negative_prompt", "image_size")


def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures or compares, and prints a table in Markdown."""
    parser = _parser()
    args = parser.parse_args(argv[1:])
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.compare:
        if others := sorted(given - COMPARING):
            raise InputError(f"{_flag(others[0])} means nothing to --compare; leave it out")
        print(_compare(args))
        return
    if args.allow:
        raise InputError("--allow means nothing without --compare; leave it out")
    if args.model_dir is None or args.out is None:
        raise InputError("give a model directory and --out, or --compare with two files")
    try:
        rows = _measure(args)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("interrupted; the same command goes on where it was") from stop
    print(_printable(comparison.table(rows)))
    for warning in dict.fromkeys(line for row in rows for line in row["card"]["warnings"]):
        print(f"warning: {warning}")


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax evaluate", description=__doc__)
    add = parser.add_argument
    add("model_dir", nargs="?", help="model directory, or the name of a shipped model")
    add("--out", help="JSON file of results, continued if it exists")
    add("--schedules", help="such as H8,H1P3R2,fast (H1P5R3; H1P6 without a refiner)")
    add("--samples", type=int, default=50_000, help="per schedule and seed (50000)")
    add("--seeds", default="0", help="comma-separated (0); three say how far to trust a number")
    add("--labels", default="balanced", help="balanced (classes or captions in turn) or random")
    add("--captions", help="for models of texts: captions:DIR, digit_captions, or FILE")
    add("--negative-prompt", help="for models of texts: what guidance leads all images away from")
    add("--image-size", help="for models of texts: HEIGHTxWIDTH or one number; the model's own")
    add("--features", help="pixels, digits or inception:FILE; pixels for the digits' size")
    add("--reference", help="digits, FILE.npz, images:DIR, captions:DIR, tfds:NAME, mixture:DIR")
    add("--neighbours", type=int, default=3, help="of precision and recall (3)")
    add("--guidance", help="paired, official or none; the model's default")
    add("--guidance-scale", type=float, help="the model's default")
    add("--guidance-interval", help="flow times such as 0.1:0.8; all of the time")
    add("--batch-size", type=int, default=250, help="images per call, over all devices (250)")
    add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
    add("--quantization", help="int8 or fp8 for the transformer blocks' matrix products")
    add("--images", help="folder for the images as PNG, a sub-folder per schedule and seed")
    add("--npz", help="folder for the images as arr_0 in .npz, a file per schedule and seed")
    add("--compare", nargs=2, metavar="FILE", help="two files of results")
    add("--allow", default="", help="keys of cards that --compare lets differ, comma-separated")
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}" if name != "model_dir" else "a model directory"


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Makes what the command line asks for, and is not in the file yet; one row for each."""
    _check(args)
    seeds = _seeds(args.seeds)
    out = output_file.named(args.out)
    wanted = _captions(args)
    pipe = any_model.load(args.model_dir, args.dtype, args.quantization)
    if args.image_size is not None:
        pipe = pipe.at_size(*size_of(args.image_size, "--image-size"))
    plans = _plans(pipe, args)
    with output_file.reserved(out):
        known = comparison.read_rows(out, own=True) if out.exists() else []
        asked_for = [(plan, seed) for plan in plans for seed in seeds]
        cards = [_card(pipe, plan, seed, args, wanted) for plan, seed in asked_for]
        places = [_image_files(card, args) for card in cards]
        for files in places:  # all of them now, and not after hours of work
            files.begin()
        with _judges(pipe, args, wanted, out) as judges:
            jobs = [
                Job(plan, _card(pipe, plan, seed, args, wanted, judges), files)
                for (plan, seed), files in zip(asked_for, places, strict=True)
            ]
            rows = measure(pipe, jobs, judges, out, known, wanted)
        _clean(output_file.work_folder(out))
    return rows


def _captions(args: argparse.Namespace) -> Captions | None:
    """What a model of texts is to show; refuses what means nothing to the model there is."""
    description = model_directory.describe(args.model_dir)
    if not description.takes_text:
        for name in OF_TEXTS:
            if getattr(args, name) is not None:
                raise InputError(
                    f"{_flag(name)} is for models of texts, and {args.model_dir} is one of "
                    "classes; leave it out"
                )
        return None
    if args.quantization is not None:
        any_model.refuse_text(args.model_dir, "quantization")
    if args.captions is None:
        raise InputError(
            f"{args.model_dir} takes texts: say which with --captions (captions:DIR, "
            "digit_captions, or a file of a caption a line)"
        )
    if args.reference is None and args.captions != captions.DIGITS:
        raise InputError(
            "--reference is missing: real images such as images:DIR, or FILE.npz, to compare with"
        )
    if args.image_size is not None:
        description = description.resized(*size_of(args.image_size, "--image-size"))
    side = description.image_shape[0]
    return captions.open_captions(args.captions, side, args.negative_prompt or "")


def _plans(pipe: Generation, args: argparse.Namespace) -> list[Plan]:
    """How to sample; what is named twice is measured and counted once."""
    asked = (args.guidance_scale, args.guidance, args.guidance_interval)
    texts = [None] if args.schedules is None else args.schedules.split(",")
    for text in texts:
        pipe.check(pipe.placeholders(1), text, *asked)
    plans = list(dict.fromkeys(pipe.plan(text, *asked) for text in texts))
    if args.negative_prompt and all(plan.guidance == "none" for plan in plans):
        raise InputError(
            "--negative-prompt does nothing where nothing is guided; give --guidance-scale above "
            "1, or leave it out"
        )
    return plans


@contextlib.contextmanager
def _judges(
    pipe: Generation, args: argparse.Namespace, wanted: Captions | None, out: Path
) -> Iterator[Judges]:
    description = pipe.model.description
    classes = description.predictor.num_classes
    if wanted is not None and wanted.digits is not None:
        classes = judging.DIGITS
    with contextlib.ExitStack() as stack:
        with images_done("reference") as show:
            judges = stack.enter_context(
                judging.opened(
                    args.features,
                    args.reference,
                    description.image_shape,
                    output_file.work_folder(out) / "reference",
                    say,
                    classes=classes,
                    on_images=show,
                )
            )
        judges = judges._replace(neighbours=args.neighbours)
        judging.check_fits(description.image_shape, judges)
        yield judges


def _check(args: argparse.Namespace) -> None:
    for name, least in (("samples", 2), ("batch_size", 1), ("neighbours", 1)):
        if not least <= getattr(args, name) <= 2**31:
            raise InputError(
                f"{_flag(name)} is {getattr(args, name)}; it must be {least} to {2**31}"
            )
    for name in ("images", "npz", "features", "reference", "guidance", *OF_TEXTS):
        if getattr(args, name) == "":
            raise InputError(f"{_flag(name)} is empty; give a value or leave it out")
    evaluation.labels_of(1, 1, args.labels)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds is {text!r}; give numbers such as 0,1,2") from error
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise InputError(f"--seeds has {wrong[0]}; a seed is in [0, 2^32)")
    return list(dict.fromkeys(seeds))


def _card(
    pipe: Generation,
    plan: Plan,
    seed: int,
    args: argparse.Namespace,
    wanted: Captions | None,
    judges: Judges | None = None,
) -> dict[str, Any]:
    card = evaluation.protocol_card(
        pipe,
        plan,
        seed=seed,
        samples=args.samples,
        batch_size=args.batch_size,
        judges=judges,
        label_sampling=args.labels,
    )
    return card | ({} if wanted is None else wanted.card)


def _image_files(card: dict[str, Any], args: argparse.Namespace) -> ImageFiles:
    name = _name(card)
    return ImageFiles(
        card,
        png=Path(args.images).expanduser() / name if args.images else None,
        npz=Path(args.npz).expanduser() / f"{name}.npz" if args.npz else None,
    )


class Job(NamedTuple):
    """A measurement that is asked for: how to sample, its protocol card, where images go."""

    plan: Plan
    card: dict[str, Any]
    files: ImageFiles


def measure(
    pipe: Generation,
    jobs: Sequence[Job],
    judges: Judges,
    out: Path,
    known: list[dict[str, Any]],
    wanted: Captions | None = None,
) -> list[dict[str, Any]]:
    """Makes every measurement that is not known yet, or whose images are asked for and not there.

    Args:
      pipe: the model.
      jobs: what to measure.
      judges: what the samples are judged by.
      out: JSON file: a list of `{"card": ..., "results": ...}`, rewritten whole each time.
      known: the rows in that file; new ones are added.
      wanted: what images are made of by a model of texts; None for one of classes.

    Returns:
      One row per job, in order.

    Raises:
      InputError: something cannot be written, an image is not finite, or a batch does not fit into
        memory.
    """
    rows = []
    for plan, card, files in jobs:
        key = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:16]
        work = output_file.work_folder(out) / key
        row = next((row for row in known if row["card"] == card), None)
        if row is None or not files.whole():
            batch_size = min(card["batch_size"], card["samples"])
            with (
                images_done(_name(card)) as show,
                memory.one_line(batch_size, "--batch-size"),
            ):
                given = (pipe, plan, judges, card, work)
                results = evaluation.measure(*given, captions=wanted, files=files, on_images=show)
            if row is None:
                row = {"card": card, "results": results}
                known.append(row)
                output_file.replace(out, json.dumps(known, indent=1) + "\n")
        judging.remove(work)  # not before the results are written
        rows.append(row)
    return rows


def _name(card: dict[str, Any]) -> str:
    """What the images of a measurement are called; their card says the rest."""
    parts = [card["schedule"], card["guidance"]]
    if card["guidance"] != "none":
        parts += [f"{number:g}" for number in (card["guidance_scale"], *_interval(card))]
    return "-".join([*parts, f"seed{card['seed']}"])


def _interval(card: dict[str, Any]) -> Sequence[float]:
    return card["guidance_interval"] or ()


def _clean(folder: Path) -> None:
    """Says what other measurements left behind: it may be wanted, and it may be large."""
    left = [path for path in folder.glob("*") if path.is_dir()]
    if left:
        size = sum(file.stat().st_size for path in left for file in path.rglob("*"))
        say(
            f"{folder} keeps {len(left)} unfinished measurement(s) of other settings, "
            f"{size / 1e6:,.1f} MB; remove it if they are not to go on"
        )
    elif folder.is_dir():
        judging.remove(folder)


def _compare(args: argparse.Namespace) -> str:
    if Path(args.compare[0]).resolve() == Path(args.compare[1]).resolve():
        raise InputError(f"--compare names {args.compare[0]} twice; give two files")
    files = {name: comparison.read_rows(name) for name in args.compare}
    allowed = frozenset(key.strip() for key in args.allow.split(",") if key.strip())
    comparison.refuse_unlike(files, allowed)
    names = [name for name, rows in files.items() for _ in rows]
    return _printable(comparison.table([row for rows in files.values() for row in rows], names))


def _printable(text: str) -> str:
    """A table whose cells, which come from files, cannot command a terminal."""
    return "\n".join(one_line(line) for line in text.splitlines())
