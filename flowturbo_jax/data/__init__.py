"""Data sets by name, and endless batches that depend on (seed, step) alone."""

from collections.abc import Callable

from flowturbo_jax.data.batches import READABLE, Batch, Unreadable, batches, order, stream
from flowturbo_jax.data.captions import captions_of, open_captions, tokenised
from flowturbo_jax.data.digit_captions import open_digit_captions
from flowturbo_jax.data.digits import open_digits
from flowturbo_jax.data.folder import open_folder, open_images
from flowturbo_jax.data.latents import open_latents
from flowturbo_jax.data.mixture import open_mixture
from flowturbo_jax.data.prompts import read_prompts
from flowturbo_jax.data.shards import open_shards
from flowturbo_jax.data.source import (
    ArrayExamples,
    CaptionedExample,
    CaptionedExamples,
    DataSource,
    Draw,
    Example,
    Examples,
    UnreadableError,
    arrays,
    mirror,
)
from flowturbo_jax.data.tfds import open_tfds
from flowturbo_jax.data.tfds_captions import open_tfds_captions
from flowturbo_jax.interfaces import InputError

__all__ = [
    "OPENERS",
    "READABLE",
    "ArrayExamples",
    "Batch",
    "CaptionedExample",
    "CaptionedExamples",
    "DataSource",
    "Draw",
    "Example",
    "Examples",
    "Unreadable",
    "UnreadableError",
    "arrays",
    "batches",
    "captions_of",
    "mirror",
    "open_source",
    "order",
    "read_prompts",
    "stream",
    "tokenised",
]

# Which function opens a name: "KIND" or "KIND:ARGUMENT" calls OPENERS[KIND](ARGUMENT, image_size).
OPENERS: dict[str, Callable[[str, int], DataSource]] = {
    "captions": open_captions,
    "digit_captions": open_digit_captions,
    "digits": open_digits,
    "folder": open_folder,
    "images": open_images,
    "latents": open_latents,
    "mixture": open_mixture,
    "shards": open_shards,
    "tfds": open_tfds,
    "tfds_captions": open_tfds_captions,
}


def open_source(name: str, image_size: int = 0) -> DataSource:
    """Opens a data set by name.

    Args:
      name: "KIND" or "KIND:ARGUMENT", where `OPENERS` knows the kind.
      image_size: side of the square images, in pixels; 0 where the data set has its own.

    Raises:
      InputError: no such kind (the message lists the known ones), or what its opener refuses.
    """
    kind, _, argument = name.partition(":")
    if kind not in OPENERS:
        raise InputError(f"unknown data set {name!r}; known: {', '.join(sorted(OPENERS))}.")
    return OPENERS[kind](argument, image_size)
