"""Turns a data set of images into cached latents to train on, or verifies such a cache.

  encode --data=folder:imagenet/train --image-size=256 --vae=models/sit-xl-2-256 --out=DIR
  encode --verify DIR

Every image and its mirror image goes through the autoencoder once, and training draws latents from
the stored moments. A run that was stopped goes on with the same command. --vae is a model directory
that has one, the folder of a diffusers AutoencoderKL, or hf://owner/name.

Of images with captions, such as captions:DIR, the text states are stored as well: those of the text
encoder in --text-encoder, a model directory that takes text, or in --vae where that is one.
"""

from collections.abc import Sequence

from tqdm import tqdm

from flowturbo_jax import data
from flowturbo_jax.commands.entry import LineParser, one_line
from flowturbo_jax.commands.progress import images_done, say
from flowturbo_jax.data import latent_cache
from flowturbo_jax.data.latent_manifest import Manifest
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import encoding

DEFAULTS = encoding.Options()
OPTIONS = {
    "batch_size": "images at once, over all devices; each also mirrored",
    "shard_size": "images in each file",
    "dtype": "of the VAE's products: float32 or bfloat16",
    "moments": "stored in float16 or float32",
    "unreadable_limit": "fraction of the images that may be unreadable",
    "threads": "how many read images ahead",
    "captions_per_image": "of how many captions text states are stored",
}
TEXT = ("text_encoder", "captions_per_image")  # what means something to captioned data only


def main(argv: Sequence[str]) -> None:
    """Reads the command line, and encodes or verifies."""
    args = _parser().parse_args(argv[1:])
    given = {name: value for name, value in vars(args).items() if value is not None}
    if empty := [name for name, value in given.items() if value == ""]:
        raise InputError(f"{_flag(empty[0])} is empty; give a value or leave it out")
    if args.verify is not None:
        if others := sorted(given.keys() - {"verify"}):
            raise InputError(f"{_flag(others[0])} means nothing to --verify; leave it out")
        print(_verify(args.verify))
        return
    if missing := [name for name in ("data", "vae", "out") if name not in given]:
        raise InputError(f"{_flag(missing[0])} is missing; give --data, --vae and --out")
    options = encoding.Options(**{name: given[name] for name in OPTIONS if name in given})
    source = data.open_source(args.data, args.image_size or 0)
    if (unused := [name for name in TEXT if name in given]) and not source.captioned:
        raise InputError(
            f"{_flag(unused[0])} means nothing to {args.data}, which has no captions; leave it out"
        )
    text = encoding.read_text_encoder(args.text_encoder, args.vae) if source.captioned else None
    autoencoder = encoding.read_autoencoder(args.vae, say)
    with images_done() as show:
        manifest = encoding.encode(source, autoencoder, args.out, options, say, show, text)
    print(_summary(manifest, args.out))


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax encode", description=__doc__)
    parser.add_argument("--data", help="images, such as folder:DIR")
    parser.add_argument("--image-size", type=int, help="side of the square they are cropped to")
    parser.add_argument("--vae", help="model directory, diffusers folder, or hf://owner/name")
    parser.add_argument("--text-encoder", help="model directory that takes text (that of --vae)")
    parser.add_argument("--out", help="folder of the cache; one that is not finished is continued")
    for name, text in OPTIONS.items():
        default = getattr(DEFAULTS, name)
        parser.add_argument(_flag(name), type=type(default), help=f"{text} ({default})")
    parser.add_argument("--verify", metavar="DIR", help="compare a cache with its checksums")
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _summary(manifest: Manifest, out: str) -> str:
    """What was written, and how to train on it."""
    size = sum(shard.bytes for shard in manifest.shards)
    left_out = f", {len(manifest.unreadable)} left out" if manifest.unreadable else ""
    texts = "" if manifest.text is None else f", {manifest.text.captions} caption(s) of each"
    return (
        f"wrote {one_line(out)}: {manifest.count} images and their mirror images{texts}{left_out}, "
        f"in {len(manifest.shards)} files, {size / 1e6:,.1f} MB in all; train on them with "
        f"--config.data=latents:{one_line(out)}"
    )


def _verify(directory: str) -> str:
    manifest = latent_cache.read_manifest(directory)
    total = sum(shard.bytes for shard in manifest.shards)
    with tqdm(total=total, unit="B", unit_scale=True) as bar:
        # The VAE's files, whose sizes are not listed, would go beyond the end.
        found = latent_cache.verify(directory, lambda count: bar.update(min(count, total - bar.n)))
    for line in found:
        print(one_line(line))
    if found:
        raise InputError(
            f"{len(found)} file(s) of {directory} are not as they were written; remove those named "
            "above and run the same encode command again, which makes them anew"
        )
    return (
        f"{one_line(directory)} is whole: {manifest.count} images in {len(manifest.shards)} files "
        "and the VAE"
    )
