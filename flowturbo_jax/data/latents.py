"""Cached latents as a data set: "latents:DIR", made by `python -m flowturbo_jax encode`."""

import bisect
import dataclasses
import itertools
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax.data.latent_cache import read_manifest
from flowturbo_jax.data.latent_manifest import STATES, Manifest, unpack
from flowturbo_jax.data.source import (
    DataSource,
    Example,
    UnreadableError,
    refuse_failing_machine,
)
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import VAEConfig

MAX_OPEN = 1024  # files held open; each takes 0.05 MB
# Records are drawn at random, so what follows one is not worth reading.
READER_OPTIONS = "readahead_buffer_size:0"
READER_BUFFER = 1 << 15


def open_latents(argument: str, image_size: int) -> DataSource:
    """Opens cached latents; of the shards, sizes are checked here and contents when they are read.

    Args:
      argument: the folder; what follows "latents:" in a name.
      image_size: 0, or the side of the images that were encoded, in pixels.

    Returns:
      Latents `[h, w, c]` float32, scaled as the autoencoder's config says, drawn anew each time
      from the encoder's moments of an image (or, if flipped, of its mirror image). Where captions
      were encoded too, the label is the text states `[L, D]` float16 of one of them, drawn as
      well. `latents` is the cache's manifest. The fingerprint is a sha256 over the shards'
      checksums and counts and the networks' fingerprints.

    Raises:
      InputError: the folder is missing, not finished, damaged, of another image size, or empty.
    """
    if not argument:
        raise InputError("'latents:' needs the name of a folder, such as latents:caches/imagenet.")
    manifest = read_manifest(Path(argument).expanduser())
    if image_size not in (0, manifest.image_size):
        raise InputError(
            f"the latents at {argument} are of {manifest.image_size} pixel images, not "
            f"{image_size}; leave image_size out, or encode the images again"
        )
    _check_sizes(manifest)
    source = DataSource(
        f"latents:{argument}",
        LatentExamples(manifest),
        manifest.latent_shape,
        manifest.class_names,
        manifest.fingerprint,
        partial(draw_latents, manifest.vae),
        manifest,
    )
    if manifest.text is None:
        return source
    return dataclasses.replace(source, label=(manifest.text.shape[1:], STATES.name))


def draw_latents(
    vae: VAEConfig, example: Example, generator: np.random.Generator, flip: bool
) -> Example:
    """Draws latents from the moments of an image, or of its mirror image.

        latents = (mean + exp(logvar / 2) noise - shift_factor) scaling_factor

    Args:
      vae: config of the autoencoder.
      example: `{"moments": [2, h, w, 2c]}`, and `"label": []` or `"states": [K, L, D]`.
      generator: where the noise, standard normal, and the choice of a caption come from.
      flip: take the mirror image in half of the cases.

    Returns:
      `{"data": [h, w, c] float32, "label": [] int32}`, the label being `[L, D]` float16 where there
      are states.
    """
    mirrored = int(flip and generator.random() < 0.5)
    mean, logvar = np.split(example["moments"][mirrored].astype(np.float32), 2, axis=-1)
    noise = generator.standard_normal(mean.shape, np.float32)
    z = mean + np.exp(logvar / 2) * noise
    data = (z - vae.shift_factor) * vae.scaling_factor
    if "states" not in example:
        return {"data": data, "label": example["label"]}
    states = example["states"]
    return {"data": data, "label": states[generator.integers(len(states))]}


class LatentExamples:
    """The moments of every image by index: `{"moments": [2, h, w, 2c], "label": [] int32}`.

    In place of labels, caches of captioned data have text states, `"states": [K, L, D]` float16.

    Args:
      manifest: of a cache that is finished.
    """

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        import resource  # here, because Windows has none, nor array_record

        # How many images there are up to and including a shard.
        self._totals = list(itertools.accumulate(shard.count for shard in manifest.shards))
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._max_open = min(MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def __len__(self) -> int:
        return self._totals[-1]

    def __getitem__(self, index: int) -> Example:
        number, position = self._find(index)
        try:
            record = self._reader(number).read([position])[0]
            label, moments, states = unpack(self._manifest, record)
        except (RuntimeError, ValueError, OSError) as error:  # array_record raises the first
            refuse_failing_machine(self.name(index), error)
            reason = " ".join(str(error).split())
            raise UnreadableError(f"the shard is damaged or missing ({reason:.200})") from error
        return {"moments": moments} | ({"label": label} if states is None else {"states": states})

    def name(self, index: int) -> str:
        number, position = self._find(index)
        path = self._manifest.directory / self._manifest.shards[number].file
        return f"record {position} of {path}"

    def _find(self, index: int) -> tuple[int, int]:
        """The shard of an example, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._totals, index)
        return number, index - (self._totals[number - 1] if number else 0)

    def _reader(self, number: int) -> Any:
        """A shard's reader, which any thread may use; the longest unused one is closed."""
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            reader = self._readers.pop(number, None)
            if reader is None:
                path = self._manifest.directory / self._manifest.shards[number].file
                reader = ArrayRecordReader(
                    str(path), READER_OPTIONS, file_reader_buffer_size=READER_BUFFER
                )
            self._readers[number] = reader
            if len(self._readers) > self._max_open:
                self._readers.popitem(last=False)  # closed when the last thread lets go of it
        return reader


def _check_sizes(manifest: Manifest) -> None:
    """Refuses a cache whose shards are missing or cut, or have no image."""
    for shard in manifest.shards:
        path = manifest.directory / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; restore a copy") from error
        if size != shard.bytes:
            raise InputError(
                f"{path} has {size} bytes instead of {shard.bytes}; restore a copy, or remove it "
                "and run the same encode command again"
            )
    if not manifest.count:
        raise InputError(f"there are no latents in {manifest.directory}: no image could be read")
