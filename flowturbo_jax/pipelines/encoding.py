"""Encodes a data set of images to a cache of latents, on all devices of this machine."""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax import data, model_directory, parallel, stopping
from flowturbo_jax.data import DataSource, UnreadableError
from flowturbo_jax.data.latent_manifest import Manifest, TextStates
from flowturbo_jax.data.latent_writer import ShardDraft, writing
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import memory
from flowturbo_jax.pipelines.encoding_batches import Encode, Encoded, Image, encoder_of
from flowturbo_jax.pipelines.encoding_setup import (
    Autoencoder,
    Options,
    TextEncoder,
    read_autoencoder,
    read_text_encoder,
)

__all__ = [
    "Autoencoder",
    "Options",
    "TextEncoder",
    "encode",
    "plan",
    "read_autoencoder",
    "read_text_encoder",
]

REMEDY = "--batch-size, and another --out if files are finished in this one"
CROPPED = ("folder", "tfds", "captions", "shards", "tfds_captions")  # kinds, by data/pixels.py
IN_FOLDERS = ("folder", "captions")  # kinds that take all images below a folder
SAMPLES, LOOKED_AT = 8, 512  # captions to sample pictures of, and how many they are chosen from
MAX_SAMPLE = 1000  # letters of one of them; a text encoder takes fewer


def plan(
    source: DataSource,
    autoencoder: Autoencoder,
    out: str | Path,
    options: Options,
    text: TextEncoder | None = None,
) -> Manifest:
    """What a cache is to be, decided before the first image is read; arguments as of `encode`.

    Raises:
      InputError: the source does not hold images, or not such as this autoencoder takes, or `out`
        lies in its folder, or captions and text encoder do not come together.
    """
    config = autoencoder.config
    _refuse_inside(source, out)
    height, width, channels = source.shape
    if source.latents is not None or source.draw is not None:
        raise InputError(f"{source.name} does not hold images; give a data set that does")
    if channels != config.in_channels:
        raise InputError(
            f"{source.name} has images of {channels} channel(s), and this VAE takes "
            f"{config.in_channels}; give other images or another VAE"
        )
    if height != width:
        raise InputError(f"{source.name} has images of {height} x {width}; they must be square")
    if height % config.downsampling:
        raise InputError(
            f"images of {height} pixels are not divisible by {config.downsampling}, the pixels per "
            "latent of this VAE; give another --image-size"
        )
    if not len(source.examples):
        raise InputError(f"{source.name} is empty; there is nothing to encode")
    return Manifest(
        source=source.name,
        source_fingerprint=source.fingerprint,
        class_names=source.class_names,
        images=len(source.examples),
        image_size=height,
        crop="adm" if source.name.partition(":")[0] in CROPPED else "none",
        vae=config,
        vae_fingerprint=model_directory.fingerprint(autoencoder.params),
        vae_dtype=options.dtype,
        moments_dtype=options.moments,
        shard_size=options.shard_size,
        batch_size=options.batch_size,
        text=_text_states(source, text, options),
        directory=Path(out),
    )


def _text_states(
    source: DataSource, text: TextEncoder | None, options: Options
) -> TextStates | None:
    if not source.captioned:
        if text is not None or options.captions_per_image != 1:
            raise InputError(
                f"{source.name} has no captions, so that a text encoder and captions_per_image "
                "mean nothing to it; leave them out"
            )
        return None
    if text is None:
        raise InputError(f"{source.name} has captions; give the text encoder that is to take them")
    captions = itertools.islice(data.captions_of(source), LOOKED_AT)
    different = dict.fromkeys(caption[:MAX_SAMPLE] for caption in captions)
    return TextStates(
        length=text.tokenizer.length,
        width=text.config.hidden_size,
        captions=options.captions_per_image,
        fingerprint=model_directory.text_fingerprint(text.params, text.tokenizer),
        samples=tuple(itertools.islice(different, SAMPLES)),
    )


def encode(
    source: DataSource,
    autoencoder: Autoencoder,
    out: str | Path,
    options: Options,
    report: Callable[[str], Any] = str,
    on_images: Callable[[int, int], Any] = max,
    text: TextEncoder | None = None,
) -> Manifest:
    """Encodes every image of a source and its mirror image; goes on where a run was killed.

    Of captioned data, captions are encoded as well: each image's first ones, as many as the options
    say.

    Args:
      source: images, all of one size.
      autoencoder: encodes them, and is stored beside the latents.
      out: the cache's folder; its parents are made.
      options: how.
      report: told in a line each what was found at `out`, and which images cannot be read.
      on_images: told how many images are done, and of how many, at first those done before.
      text: encodes the captions of captioned data; None for other data.

    Returns:
      The manifest of the finished cache.

    Raises:
      InputError: images, autoencoder and options do not fit, `out` is taken, too many images cannot
        be read, a batch does not fit into memory, or the disk is full; shards that are finished
        are kept.
      KeyboardInterrupt: SIGINT or SIGTERM asked to stop; shards that are finished are kept.
    """
    wanted = plan(source, autoencoder, out, options, text)
    parallel.check_batch_size(options.batch_size)
    with (
        stopping.requests() as stop,
        memory.one_line(options.batch_size, REMEDY),
        writing(wanted, autoencoder.params, report) as writer,
    ):
        tally = _Tally(source, writer.manifest, options.unreadable_limit, report, on_images)
        if missing := writer.missing:
            encode_all = encoder_of(autoencoder, text, options)
            ranges = [wanted.shard_images(number) for number in missing]
            images = _read_ahead(source, ranges, options)
            for number, indices in zip(missing, ranges, strict=True):
                try:
                    with writer.shard(number) as shard:
                        share = itertools.islice(images, len(indices))
                        _fill(shard, share, encode_all, tally, stop)
                except KeyboardInterrupt:
                    done = len(writer.manifest.shards)
                    report(
                        f"stopped: {done} of {wanted.shard_count} shards are finished; the same "
                        "command goes on"
                    )
                    raise
        return writer.finish()


def _refuse_inside(source: DataSource, out: str | Path) -> None:
    """Refuses to write into a folder of images, which would become another data set by that."""
    kind, _, argument = source.name.partition(":")
    if kind not in IN_FOLDERS:
        return
    root, place = (os.path.realpath(os.path.expanduser(path)) for path in (argument, out))
    if os.path.commonpath([root, place]) == root:
        raise InputError(f"{out} lies in {source.name}, the images' own folder; give another --out")


class _Tally:
    """Counts images that are done and images that cannot be read."""

    def __init__(
        self,
        source: DataSource,
        begun: Manifest,
        limit: float,
        report: Callable[[str], Any],
        on_images: Callable[[int, int], Any],
    ):
        self._source, self._limit, self._report = source, limit, report
        self._unreadable = len(begun.unreadable)
        self._done, self._on_images = begun.count, on_images
        self._show()

    def add(self) -> None:
        """Counts an image that is encoded."""
        self._done += 1
        self._show()

    def leave_out(self, image: Image) -> str:
        """Counts an image that cannot be read, and returns its name; InputError at too many."""
        name, total = self._source.examples.name(image.index), len(self._source.examples)
        self._unreadable += 1
        self._report(f"cannot read {name}: {image.reason}")
        if self._unreadable > self._limit * total:
            raise InputError(
                f"{self._unreadable} of {total} images of {self._source.name} cannot be read, more "
                f"than unreadable_limit {self._limit:g} allows; the last: {name}: "
                f"{image.reason}; raise --unreadable-limit to keep the finished files, or mend "
                "the images and encode into another --out"
            )
        self._show()
        return name

    def check(self, encoded: Encoded) -> int:
        """The image's label; InputError if it, moments or states are not such as can be stored."""
        image, moments, states = encoded
        name, classes = self._source.examples.name(image.index), len(self._source.class_names)
        label = 0 if states is not None else int(image.example["label"])
        if states is None and not 0 <= label < classes:
            raise InputError(f"{name} has label {label}, but there are {classes} classes")
        if not np.isfinite(moments).all():
            raise InputError(
                f"the moments of {name} are not finite in {moments.dtype}; try --dtype=float32 "
                "--moments=float32 with another --out"
            )
        if states is not None and not np.isfinite(states).all():
            raise InputError(
                f"the text states of {name} are not finite in {states.dtype}; try --dtype=float32 "
                "with another --out, or another --text-encoder"
            )
        return label

    def _show(self) -> None:
        self._on_images(self._done + self._unreadable, len(self._source.examples))


def _fill(
    shard: ShardDraft,
    images: Iterable[Image],
    encode_all: Encode,
    tally: _Tally,
    stop: threading.Event,
) -> None:
    """Encodes one shard's images; batches do not go beyond it, so its bytes are always the same.

    Raises KeyboardInterrupt, before the next image is taken, once `stop` is set.
    """

    def readable() -> Iterator[Image]:
        for image in images:
            # Here and not in a signal's handler, whose exception a library's callback may swallow.
            if stop.is_set():
                raise KeyboardInterrupt
            if image.example is None:
                shard.leave_out(tally.leave_out(image))
            else:
                yield image

    for encoded in encode_all(readable()):
        shard.add(tally.check(encoded), encoded.moments, encoded.states)
        tally.add()


def _read_ahead(source: DataSource, ranges: list[range], options: Options) -> Iterator[Image]:
    """The source's images in its own order, two batches of them read before they are asked for."""
    import grain  # here, because it takes a quarter of a second

    images = grain.MapDataset.source(_Images(source, np.concatenate(ranges)))
    ahead = options.threads + 2 * options.batch_size
    reading = grain.ReadOptions(num_threads=options.threads, prefetch_buffer_size=ahead)
    return iter(images.to_iter_dataset(reading))


class _Images:
    """Some images of a source; one that cannot be read is there with the reason."""

    def __init__(self, source: DataSource, indices: np.ndarray):
        self._examples, self._indices = source.examples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Image:
        index = int(self._indices[place])
        try:
            return Image(index, self._examples[index])
        except UnreadableError as error:
            return Image(index, None, str(error))
