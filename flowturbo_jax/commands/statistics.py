"""Takes the statistics of real images that `evaluate` compares samples with, and stores them.

  statistics images:DIR --image-size 256 --features inception:FILE.pth --out imagenet256.npz
  statistics tfds:imagenet2012@validation --image-size 256 --features inception:FILE.pth --out v.npz

The .npz has mu, sigma, and of Inception mu_s, sigma_s, as ADM's evaluator and pytorch-fid name
them, and 10,000 images' features for precision and recall. Interrupted, the same command goes on.
"""

import argparse
import zipfile
from collections.abc import Sequence
from pathlib import Path

from flowturbo_jax import data
from flowturbo_jax.commands import output_file
from flowturbo_jax.commands.entry import LineParser, one_line
from flowturbo_jax.commands.progress import images_done
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import Reference, write_reference
from flowturbo_jax.pipelines import judging, real_images


def main(argv: Sequence[str]) -> None:
    """Reads the command line, and measures a data set."""
    parser = LineParser(prog="python -m flowturbo_jax statistics", description=__doc__)
    add = parser.add_argument
    add("source", help="images:DIR, folder:DIR, tfds:NAME[@SPLIT], digits or mixture:DIR")
    add("--features", required=True, help="pixels, digits or inception:FILE")
    add("--out", required=True, help="the .npz file")
    add("--image-size", type=int, default=0, help="side to crop to as ADM does; 0 for no crop")
    add("--count", type=int, help="take the first so many images only; all of them")
    add("--kept", type=int, default=10_000, help="rows kept for precision and recall (10000)")
    add("--batch-size", type=int, default=64, help="images at once (64)")
    args = parser.parse_args(argv[1:])
    for name, least in (("batch_size", 1), ("kept", 1), ("image_size", 0)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(args, name)}; it must be at least {least}")
    out = output_file.named(args.out)
    if out.suffix != ".npz":
        raise InputError(f"--out is {args.out}; it must end in .npz")
    try:
        reference = _measure(args, out)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("interrupted; the same command goes on where it was") from stop
    count, dimensions = reference.pooled.count, len(reference.pooled.mean)
    print(f"wrote {one_line(args.out)}: {count} images, {dimensions} features of {args.features}")
    if count <= dimensions:
        print(f"warning: {judging.TOO_FEW.format(count, 'reference images', dimensions)}")


def _measure(args: argparse.Namespace, out: Path) -> Reference:
    source = data.open_source(args.source, args.image_size)
    network = judging.open_network(args.features)
    work = output_file.work_folder(out)
    with output_file.reserved(out):
        _refuse_others(out)
        with images_done(source.name) as show:
            reference = real_images.measure_reference(
                source,
                network,
                work,
                kept=args.kept,
                batch_size=args.batch_size,
                count=args.count,
                on_images=show,
            )
        info = {
            "source": source.name,
            "source_sha256": source.fingerprint,
            "features": network.name,
        }
        write_reference(out, reference, info)
        judging.remove(work)
    return reference


def _refuse_others(out: Path) -> None:
    """Refuses to write over what this command has not made, such as samples."""
    if not out.exists():
        return
    try:
        with zipfile.ZipFile(out) as stored:
            own = "info.npy" in stored.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        own = False
    if not own:
        raise InputError(f"{out} exists and holds no statistics of this command; choose another")
