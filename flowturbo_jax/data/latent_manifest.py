"""What manifest.json says of cached latents: what was encoded, how, and each shard's checksum."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax.data.manifest_fields import (
    check_counts,
    check_digest,
    check_keys,
    check_names,
    check_texts,
    nested,
    plain,
)
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import DTYPES
from flowturbo_jax.models import VAEConfig

FORMAT = 1
MAX_SHARDS = 10_000  # with more, the manifest would be too large a JSON file to be read
MOMENTS_DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
LABEL = np.dtype("<i4")
STATES = np.dtype("<f2")  # of text states
ARGUMENTS = {
    "image_size": "--image-size",
    "vae_fingerprint": "the fingerprint of --vae",
    "vae_dtype": "--dtype",
    "moments_dtype": "--moments",
    "shard_size": "--shard-size",
    "batch_size": "--batch-size",
}
TEXT_ARGUMENTS = {
    "fingerprint": "the fingerprint of --text-encoder",
    "captions": "--captions-per-image",
    "length": "the number of token ids of a caption",
    "width": "the width of text states",
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One finished file of moments.

    Attributes:
      file: its name.
      count: how many images it holds.
      bytes: its size.
      sha256: of its content, in hexadecimal.
      unreadable: names of the images left out of it.
    """

    file: str
    count: int
    bytes: int
    sha256: str
    unreadable: tuple[str, ...] = ()

    def __post_init__(self):
        check_texts(self, ("file",))
        check_digest(self, "sha256")
        check_names(self, "unreadable")
        check_counts(self, ("count", "bytes"), least=0)


@dataclasses.dataclass(frozen=True)
class TextStates:
    """The text states that are stored with each image, of captioned data.

    Attributes:
      length: L, token ids of a caption.
      width: D, of a state.
      captions: K, how many captions of each image.
      fingerprint: of text encoder and tokenizer, `model_directory.text_fingerprint`.
      samples: some captions, to sample pictures of.
    """

    length: int
    width: int
    captions: int
    fingerprint: str
    samples: tuple[str, ...] = ()

    def __post_init__(self):
        check_counts(self, ("length", "width", "captions"), least=1)
        check_digest(self, "fingerprint")
        check_names(self, "samples")

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, L, D)` of one image's states."""
        return (self.captions, self.length, self.width)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json; without shards, a plan of what is to be encoded.

    Shard `i` is made of the source's images from `i * shard_size` on, so what a file holds does not
    depend on when it was written.

    Attributes:
      source: name of the data set, such as "folder:imagenet/train".
      source_fingerprint: its fingerprint.
      class_names: name of each label; () of captioned data.
      images: how many images the source has, unreadable ones included.
      image_size: side of the square images, in pixels.
      crop: how images were cropped to that size: "adm", or "none" where the source has that size.
      vae: config of the autoencoder.
      vae_fingerprint: of its parameters, `model_directory.fingerprint`.
      vae_dtype: of its matrix products, and of the text encoder's, "float32" or "bfloat16".
      moments_dtype: as stored, "float16" or "float32".
      shard_size: images of the source in each shard; the last one has the rest.
      batch_size: how many are encoded at once, which may change the last bits.
      shards: those that are finished, in order; all of them in manifest.json.
      text: the text states that are stored too, or None; manifest.json is silent on None.
      directory: where the cache is; not stored.
    """

    source: str
    source_fingerprint: str
    class_names: tuple[str, ...]
    images: int
    image_size: int
    crop: str
    vae: VAEConfig
    vae_fingerprint: str
    vae_dtype: str
    moments_dtype: str
    shard_size: int
    batch_size: int
    shards: tuple[Shard, ...] = ()
    text: TextStates | None = None
    directory: Path = dataclasses.field(default=Path(), compare=False)

    def __post_init__(self):
        check_texts(self, ("source", "source_fingerprint", "crop"))
        check_digest(self, "vae_fingerprint")
        check_names(self, "class_names")
        check_counts(self, ("images", "image_size", "shard_size", "batch_size"), least=1)
        for name, known in (("vae_dtype", DTYPES), ("moments_dtype", MOMENTS_DTYPES)):
            if getattr(self, name) not in tuple(known):  # which may be of any type
                raise InputError(f"{name} is {getattr(self, name)!r}, not {' or '.join(known)}")
        if self.image_size % self.vae.downsampling:
            raise InputError(
                f"image_size {self.image_size} is not divisible by {self.vae.downsampling}, the "
                "pixels per latent of this VAE"
            )
        if self.shard_count > MAX_SHARDS:
            raise InputError(
                f"{self.images} images make {self.shard_count} shards of {self.shard_size}, over "
                f"{MAX_SHARDS}; take a larger shard_size"
            )
        self._check_shards()

    def _check_shards(self) -> None:
        if not isinstance(self.shards, tuple) or not all(type(s) is Shard for s in self.shards):
            raise InputError("shards must be a list of objects")
        numbers = {self.shard_file(number): number for number in range(self.shard_count)}
        last = -1
        for shard in self.shards:
            number = numbers.get(shard.file, -1)
            if number <= last:
                raise InputError(f"{shard.file!r:.99} is no shard of these, or not in its place")
            if shard.count + len(shard.unreadable) != len(self.shard_images(number)):
                raise InputError(f"{shard.file} has {shard.count} images, and the rest is missing")
            last = number

    @property
    def shard_count(self) -> int:
        """How many shards the whole cache has."""
        return -(-self.images // self.shard_size)

    @property
    def count(self) -> int:
        """How many images the finished shards hold."""
        return sum(shard.count for shard in self.shards)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Names of the images that were left out."""
        return tuple(name for shard in self.shards for name in shard.unreadable)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(h, w, c)` of one image's latents."""
        side = self.image_size // self.vae.downsampling
        return (side, side, self.vae.latent_channels)

    @property
    def moments_shape(self) -> tuple[int, int, int, int]:
        """`(2, h, w, 2c)`: of the image and of its mirror image; mean and logvar."""
        height, width, channels = self.latent_shape
        return (2, height, width, 2 * channels)

    @property
    def record_bytes(self) -> int:
        """Size of one image's record."""
        itemsize = MOMENTS_DTYPES[self.moments_dtype].itemsize
        states = 0 if self.text is None else STATES.itemsize * math.prod(self.text.shape)
        return LABEL.itemsize + itemsize * math.prod(self.moments_shape) + states

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' checksums and counts and the networks' fingerprints."""
        lines = [f"{shard.sha256} {shard.count}" for shard in self.shards]
        lines.append(self.vae_fingerprint)
        if self.text is not None:
            lines.append(self.text.fingerprint)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def shard_file(self, number: int) -> str:
        """Name of a shard's file."""
        return f"latents-{number:05d}-of-{self.shard_count:05d}.array_record"

    def shard_images(self, number: int) -> range:
        """Indices in the source of the images that a shard is made of."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.images))

    def to_json(self) -> str:
        """The text of manifest.json; its "sha256" is of all that stands before it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["directory"]
        fields |= {
            "vae": dataclasses.asdict(self.vae),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        if self.text is None:
            del fields["text"]
        else:
            fields["text"] = dataclasses.asdict(self.text)
        text = json.dumps({"format": FORMAT, **fields, **self._derived()}, indent=1)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return text.removesuffix("\n}") + f',\n "sha256": "{digest}"\n}}\n'

    def _derived(self) -> dict[str, Any]:
        """What manifest.json says for whoever reads it, and follows from the rest."""
        return {"latent_shape": self.latent_shape, "count": self.count}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], directory: Path) -> "Manifest":
        """Reads the object in manifest.json; derived values and sha256 are left to be compared.

        Raises:
          InputError: it is of another format, or a key is missing, unknown or wrong.
        """
        if type(fields.get("format")) is not int or fields["format"] != FORMAT:
            raise InputError(f"it is not of format {FORMAT}, which this version reads")
        own = {field.name for field in dataclasses.fields(cls)} - {"directory", "text"}
        own |= {"text"} & fields.keys()
        check_keys(fields, {"format", "sha256", "latent_shape", "count", *own})
        values = {name: plain(fields[name]) for name in own}
        values["vae"] = nested(VAEConfig, fields["vae"], "vae")
        if isinstance(values["shards"], tuple):
            values["shards"] = tuple(nested(Shard, s, "a shard") for s in values["shards"])
        if "text" in fields:
            values["text"] = nested(TextStates, fields["text"], "text")
        return cls(**values, directory=directory)


class Record(NamedTuple):
    """What is stored of one image.

    Attributes:
      label: `[]` int32, of its class; 0 of captioned data.
      moments: `[2, h, w, 2c]`, its own and its mirror image's; read-only.
      states: text states `[K, L, D]` float16 of its captions, read-only; None of other data.
    """

    label: np.ndarray
    moments: np.ndarray
    states: np.ndarray | None


def pack(
    manifest: Manifest, label: int, moments: np.ndarray, states: np.ndarray | None = None
) -> bytes:
    """One image's record: label, moments `[2, h, w, 2c]`, states `[K, L, D]`; little-endian."""
    stored = np.asarray(moments, MOMENTS_DTYPES[manifest.moments_dtype])
    texts = b"" if states is None else np.asarray(states, STATES).tobytes()
    return np.asarray(label, LABEL).tobytes() + stored.tobytes() + texts


def unpack(manifest: Manifest, record: bytes) -> Record:
    """What a record holds.

    Raises:
      ValueError: the record has another size, or its label is of no class.
    """
    if len(record) != manifest.record_bytes:
        raise ValueError(f"the record has {len(record)} bytes, not {manifest.record_bytes}")
    label = np.frombuffer(record, LABEL, 1).astype(np.int32).reshape(())
    text, classes = manifest.text, len(manifest.class_names)
    if not 0 <= label < (classes if text is None else 1):
        raise ValueError(f"the label is {label}, of {classes} classes")
    stored, count = MOMENTS_DTYPES[manifest.moments_dtype], math.prod(manifest.moments_shape)
    moments = np.frombuffer(record, stored, count, LABEL.itemsize).reshape(manifest.moments_shape)
    if text is None:
        return Record(label, moments, None)
    states = np.frombuffer(record, STATES, offset=LABEL.itemsize + moments.nbytes)
    return Record(label, moments, states.reshape(text.shape))


def differences(begun: Manifest, plan: Manifest) -> list[str]:
    """What of a plan is not as it was."""
    was, now = _settings(begun), _settings(plan)
    return [
        f"{name} was {was[name]:.60}, now it is {now[name]:.60}"
        for name in was
        if was[name] != now[name]
    ]


def _settings(manifest: Manifest) -> dict[str, str]:
    """What must stay as it was, as messages show it."""
    settings = {
        ARGUMENTS.get(field.name, field.name): str(getattr(manifest, field.name))
        for field in dataclasses.fields(manifest)
        # The same images may lie elsewhere by now.
        if field.name not in ("source", "source_fingerprint", "vae", "shards", "text", "directory")
    }
    for name, value in dataclasses.asdict(manifest.vae).items():
        settings[f"the VAE's {name}"] = str(value)
    for name, shown in TEXT_ARGUMENTS.items():
        settings[shown] = str(getattr(manifest.text, name, "none"))
    settings["the fingerprint of --data"] = manifest.source_fingerprint
    return settings
