"""Statistics of real images: their features, taken one batch after the other and kept on disk."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax import data, images
from flowturbo_jax.growing_arrays import GrowingArrays
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import FeatureNetwork, Features, Moments, Reference, Statistics

STREAM_ROWS = 2000  # features held at once
MOST_DIMENSIONS = 20_000  # whose covariance takes 3.2 GB


def measure_reference(
    source: data.DataSource,
    network: FeatureNetwork,
    work: Path | None = None,
    kept: int = 10_000,
    batch_size: int = 64,
    count: int | None = None,
    on_images: Callable[[int, int], Any] = max,
) -> Reference:
    """Takes the statistics of a data set's images, each as it is, none mirrored.

    Args:
      source: the images.
      network: takes their features.
      work: folder in which interrupted work is continued; None for one that is removed.
      kept: how many rows of features to keep for precision and recall, spread over the images.
      batch_size: images whose features are taken at once.
      count: how many images to take, from the first; None for all.
      on_images: told how many images are done, and of how many.

    Raises:
      InputError: the source has fewer than 2 images, fewer than `count`, or one that cannot be
        read; or the network does not take them.
    """
    if source.latents is not None:
        raise InputError(f"{source.name} holds latents; statistics are of images")
    there = len(source.examples)
    count = there if count is None else count
    if not 2 <= count <= there:
        raise InputError(
            f"{source.name} has {there} images, of which {count} are to be taken; statistics need "
            "at least 2"
        )
    columns = feature_columns(network, source.shape)
    identity = {"source": source.fingerprint, "network": network.fingerprint}
    identity |= {"count": count} if count < there else {}
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = GrowingArrays(work, identity, columns)
        done = min(rows.rows, count)
        rows.keep(done if done == count else done // batch_size * batch_size)  # the same batches
        on_images(rows.rows, count)
        while rows.rows < count:
            indices = range(rows.rows, min(rows.rows + batch_size, count))
            pixels = np.stack([_read_image(source, index) for index in indices])
            found = network.extract(np.asarray(images.to_uint8(pixels)))
            rows.append(**named_features(found))
            on_images(rows.rows, count)
        pooled = rows.read("pooled")
        chosen = np.linspace(0, count - 1, min(kept, count)).round().astype(int)
        spatial = stream_statistics(rows.read("spatial")) if "spatial" in columns else None
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return Reference(
            source.name,
            digest,
            stream_statistics(pooled),
            spatial,
            np.asarray(pooled[chosen]),
            network.fingerprint,
        )


def _read_image(source: data.DataSource, index: int) -> np.ndarray:
    try:
        return source.examples[index]["data"]
    except data.UnreadableError as error:
        raise InputError(
            f"{source.examples.name(index)} cannot be read ({error}); statistics are of all images "
            "or none: mend or remove it"
        ) from error


def feature_columns(
    network: FeatureNetwork, shape: tuple[int, int, int]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Dtype and shape of the features of one image, by name, as `GrowingArrays` wants them.

    Args:
      network: takes the features.
      shape: [H, W, C] of the images.

    Raises:
      InputError: the network does not take such images, or has too many features of them.
    """
    found = network.extract(np.zeros((1, *shape), np.uint8))
    if found.pooled.shape[1] > MOST_DIMENSIONS:
        raise InputError(
            f"{network.name} of images {list(shape)} are {found.pooled.shape[1]:,} features, whose "
            f"covariance is too large (over {MOST_DIMENSIONS:,}); take --features inception:FILE"
        )
    return {name: (rows.dtype, rows.shape[1:]) for name, rows in named_features(found).items()}


def named_features(found: Features) -> dict[str, np.ndarray]:
    """The features that there are, by name."""
    return {name: np.asarray(rows) for name, rows in found._asdict().items() if rows is not None}


def stream_statistics(rows: np.ndarray) -> Statistics:
    """Mean and covariance of rows that need not fit into memory, in float64."""
    moments = Moments()
    for first in range(0, len(rows), STREAM_ROWS):
        moments.add(np.asarray(rows[first : first + STREAM_ROWS]))
    return moments.statistics()
