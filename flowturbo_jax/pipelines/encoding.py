"""Encodes a data set of images to a cache of latents, on all devices of this machine."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from flowturbo_jax import model_directory, parallel, stopping
from flowturbo_jax.data import DataSource, Example, UnreadableError
from flowturbo_jax.data.latent_manifest import MOMENTS_DTYPES, Manifest
from flowturbo_jax.data.latent_writer import ShardDraft, writing
from flowturbo_jax.interfaces import Images, InputError, Params
from flowturbo_jax.models import VAE
from flowturbo_jax.pipelines.encoding_setup import Autoencoder, Options, read_autoencoder

__all__ = ["Autoencoder", "Options", "encode", "plan", "read_autoencoder"]

CROPS = {"folder": "adm", "tfds": "adm"}  # kinds of sources that crop, by data/pixels.py


class Image(NamedTuple):
    """An image as it was read: the example, or why there is none."""

    index: int
    example: Example | None
    reason: str = ""


def plan(
    source: DataSource, autoencoder: Autoencoder, out: str | Path, options: Options
) -> Manifest:
    """What a cache is to be, decided before the first image is read.

    Raises:
      InputError: the source does not hold images, or not such as this autoencoder takes, or `out`
        lies in its folder.
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
        crop=CROPS.get(source.name.partition(":")[0], "none"),
        vae=config,
        vae_fingerprint=model_directory.fingerprint(autoencoder.params),
        vae_dtype=options.dtype,
        moments_dtype=options.moments,
        shard_size=options.shard_size,
        batch_size=options.batch_size,
        directory=Path(out),
    )


def encode(
    source: DataSource,
    autoencoder: Autoencoder,
    out: str | Path,
    options: Options,
    report: Callable[[str], Any] = str,
    on_images: Callable[[int, int], Any] = max,
) -> Manifest:
    """Encodes every image of a source and its mirror image; goes on where a run was killed.

    Args:
      source: images, all of one size.
      autoencoder: encodes them, and is stored beside the latents.
      out: the cache's folder; its parents are made.
      options: how.
      report: told in a line each what was found at `out`, and which images cannot be read.
      on_images: told how many images are done, and of how many, at first those done before.

    Returns:
      The manifest of the finished cache.

    Raises:
      InputError: images, autoencoder and options do not fit, `out` is taken, too many images cannot
        be read, a batch does not fit into memory, or the disk is full; shards that are finished
        are kept.
      KeyboardInterrupt: SIGINT or SIGTERM asked to stop; shards that are finished are kept.
    """
    wanted = plan(source, autoencoder, out, options)
    parallel.check_batch_size(options.batch_size)
    with (
        stopping.requests() as stop,
        _memory_errors(options.batch_size),
        writing(wanted, autoencoder.params, report) as writer,
    ):
        tally = _Tally(source, writer.manifest, options.unreadable_limit, report, on_images)
        if missing := writer.missing:
            moments_of = _moments_of(autoencoder, options)
            ranges = [wanted.shard_images(number) for number in missing]
            images = _read_ahead(source, ranges, options)
            for number, indices in zip(missing, ranges, strict=True):
                try:
                    with writer.shard(number) as shard:
                        share = itertools.islice(images, len(indices))
                        _fill(shard, share, moments_of, tally, stop)
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
    if kind != "folder":
        return
    root, place = (os.path.realpath(os.path.expanduser(path)) for path in (argument, out))
    if os.path.commonpath([root, place]) == root:
        raise InputError(f"{out} lies in {source.name}, the images' own folder; give another --out")


@contextlib.contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    """Says what to do when a batch does not fit into memory."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        words = str(error)
        if not isinstance(error, MemoryError) and not (
            "RESOURCE_EXHAUSTED" in words or "out of memory" in words.lower()
        ):
            raise
        raise InputError(
            f"a batch of {batch_size} images does not fit into memory; take a smaller --batch-size"
            ", and another --out if files are finished in this one"
        ) from error


def both_moments(
    vae: VAE, dtype: Any, params: Params, images: Images
) -> Float[Array, "batch 2 rows columns moments"]:
    """Moments of images and of their mirror images; pure.

    Args:
      vae: the autoencoder.
      dtype: of the result.
      params: its parameters, of which the encoder's half is used.
      images: `[B, H, W, 3]` float32 in [-1, 1].

    Returns:
      `[B, 2, h, w, 2c]`: the image and its mirror image; mean and logvar, not scaled.
    """
    # The mirror image is encoded itself: mirrored latents are others, off by the down-sampling's
    # padding, which is on one side only.
    both = jnp.concatenate([images, images[:, :, ::-1]])
    moments = vae.apply({"params": params}, both, method="encode")
    joined = jnp.concatenate(moments, axis=-1).astype(dtype)
    return rearrange(joined, "(mirrored b) h w c -> b mirrored h w c", mirrored=2)


def _moments_of(
    autoencoder: Autoencoder, options: Options
) -> Callable[[Iterable[Image]], Iterator[tuple[Image, np.ndarray]]]:
    """What turns images, batch by batch, into pairs of image and moments `[2, h, w, 2c]`."""
    vae = VAE(autoencoder.config, model_directory.network_dtype(options.dtype))
    compiled = parallel.map_batch(partial(both_moments, vae, MOMENTS_DTYPES[options.moments]))
    params = parallel.replicate({"encoder": autoencoder.params["encoder"]})

    def encoded(images: Iterable[Image]) -> Iterator[tuple[list[Image], Any]]:
        images = iter(images)
        while batch := list(itertools.islice(images, options.batch_size)):
            pixels = np.zeros((options.batch_size, *batch[0].example["data"].shape), np.float32)
            for row, image in enumerate(batch):
                pixels[row] = image.example["data"]
            yield batch, compiled(params, pixels)

    def moments_of(images: Iterable[Image]) -> Iterator[tuple[Image, np.ndarray]]:
        for batch, moments in _one_late(encoded(images)):
            yield from zip(batch, np.asarray(moments), strict=False)  # the last batch is padded

    return moments_of


def _one_late(items: Iterable[Any]) -> Iterator[Any]:
    """The same items; each is handed on after the next is begun, so that devices need not wait."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


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

    def check(self, image: Image, moments: np.ndarray) -> int:
        """The image's label; InputError if it or the moments are not such as can be stored."""
        label, classes = int(image.example["label"]), len(self._source.class_names)
        if not 0 <= label < classes:
            name = self._source.examples.name(image.index)
            raise InputError(f"{name} has label {label}, but there are {classes} classes")
        if not np.isfinite(moments).all():
            raise InputError(
                f"the moments of {self._source.examples.name(image.index)} are not finite in "
                f"{moments.dtype}; try --dtype=float32 --moments=float32 with another --out"
            )
        return label

    def _show(self) -> None:
        self._on_images(self._done + self._unreadable, len(self._source.examples))


def _fill(
    shard: ShardDraft,
    images: Iterable[Image],
    moments_of: Callable[[Iterable[Image]], Iterator[tuple[Image, np.ndarray]]],
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

    for image, moments in moments_of(readable()):
        shard.add(tally.check(image, moments), moments)
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
