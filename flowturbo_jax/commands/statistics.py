"""Takes the statistics of real images that `evaluate` compares samples with, and stores them.

  statistics images:DIR --image-size 256 --features inception:FILE.pth --out imagenet256.npz
  statistics tfds:imagenet2012@validation --image-size 256 --features inception:FILE.pth --out v.npz

The .npz has mu, sigma, and of Inception mu_s, sigma_s, as ADM's evaluator and pytorch-fid name
them, and 10,000 images' features for precision and recall. Interrupted, the same command goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flowturbo_jax import data
from flowturbo_jax.commands.entry import LineParser, one_line
from flowturbo_jax.commands.progress import images_done
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import write_reference
from flowturbo_jax.pipelines import judging


def main(argv: Sequence[str]) -> None:
    """Reads the command line, and measures a data set."""
    parser = LineParser(prog="python -m flowturbo_jax statistics", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("source", help="images:DIR, folder:DIR, tfds:NAME[@SPLIT], digits or mixture:DIR")
    add("--features", required=True, help="pixels, digits or inception:FILE")
    add("--out", required=True, help="the .npz file")
    add("--image-size", type=int, default=0, help="side to crop to as ADM does; 0 for no crop")
    add("--kept", type=int, default=10_000, help="rows kept for precision and recall (10000)")
    add("--batch-size", type=int, default=64, help="images at once (64)")
    args = parser.parse_args(argv[1:])
    out = Path(args.out)
    if out.suffix != ".npz":
        raise InputError(f"--out is {args.out}; it must end in .npz")
    for name in ("batch_size", "kept"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(args, name)}; it must be at least 1")
    source = data.open_source(args.source, args.image_size)
    network = judging.open_network(args.features)
    work = out.with_name(f".{out.name}.work")
    with images_done(source.name) as show:
        reference = judging.measure_reference(
            source, network, work, args.kept, args.batch_size, show
        )
    info = {"source": source.name, "source_sha256": source.fingerprint, "features": network.name}
    write_reference(out, reference, info)
    judging.remove(work)
    count, dimensions = reference.pooled.count, len(reference.pooled.mean)
    print(f"wrote {one_line(str(out))}: {count} images, {dimensions} features of {network.name}")
    if count <= dimensions:
        print(f"warning: {judging.TOO_FEW.format(count, 'reference images', dimensions)}")
