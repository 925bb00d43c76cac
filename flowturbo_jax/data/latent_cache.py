"""The folder of cached latents: what lies in it, how it is read, and how it is verified.

  manifest.json                        what was encoded, how, and the checksum of every shard
  latents-00007-of-00313.array_record  moments of 4096 images and of their mirror images
  vae/, vae.sha256                     the autoencoder, and its files' checksums (sha256sum -c)

`latent_writer` makes it; until all shards are there, unfinished.json stands for manifest.json.
Shards of captioned data hold text states too, whose encoder the manifest names by its fingerprint.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flowturbo_jax import model_directory
from flowturbo_jax.checkpoint import load_params
from flowturbo_jax.data.latent_manifest import Manifest, Shard
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models import VAE
from flowturbo_jax.weights.json_file import read_json

__all__ = ["Manifest", "Shard", "load_vae", "read_manifest", "verify"]

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
VAE_FOLDER, VAE_SHA256 = "vae", "vae.sha256"
CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  ([!-~]+)\n")  # as sha256sum writes it
BLOCK = 1 << 20  # bytes read at once


def read_manifest(directory: str | Path, name: str = MANIFEST) -> Manifest:
    """Reads a cache's manifest, every byte of which counts; no other file is looked at.

    Args:
      directory: the cache.
      name: MANIFEST or UNFINISHED.

    Raises:
      InputError: there is none, its keys or values are wrong, or it is damaged or was edited.
    """
    directory = Path(directory)
    path = directory / name
    if not path.exists() and (directory / UNFINISHED).exists():
        raise InputError(f"{directory} is not finished; run the same encode command again")
    if not path.exists():
        raise InputError(
            f"no cached latents at {directory}: it has no {name}; make them of images: "
            "python -m flowturbo_jax encode --help"
        )
    fields = read_json(path)
    try:
        manifest = Manifest.from_json(fields, directory)
        if manifest.to_json().encode() != path.read_bytes():
            raise InputError("its sha256 does not fit, so it is damaged or was edited")
        if name == MANIFEST and len(manifest.shards) != manifest.shard_count:
            raise InputError(f"{len(manifest.shards)} of {manifest.shard_count} shards are listed")
    except (InputError, OSError) as error:
        raise InputError(f"cannot use {path}: {error}; restore a copy, or encode anew") from error
    return manifest


def load_vae(directory: str | Path, manifest: Manifest) -> Params:
    """Loads the parameters of the autoencoder that made a cache.

    Args:
      directory: the cache.
      manifest: what its manifest.json says.

    Returns:
      The parameters of `VAE(manifest.vae)`, a nested dict of float32 arrays.

    Raises:
      InputError: they are missing or damaged.
    """
    place = Path(directory) / VAE_FOLDER
    params = load_params(place, model_directory.abstract_params(VAE(manifest.vae)))
    if model_directory.fingerprint(params) != manifest.vae_fingerprint:
        raise InputError(f"the VAE at {place} is not the one that made the latents; restore a copy")
    return params


def verify(directory: str | Path, on_bytes: Callable[[int], Any] = int) -> list[str]:
    """Compares every byte of a cache with its manifest.

    Args:
      directory: the cache.
      on_bytes: told how many more bytes have been read.

    Returns:
      A line on each file that is missing, extra, too short, too long or of other content, with the
      images it holds; none if all is well.

    Raises:
      InputError: the manifest itself is missing or damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    found = []
    for number, shard in enumerate(manifest.shards):
        wrong = _difference(directory / shard.file, shard.sha256, shard.bytes, on_bytes)
        images = manifest.shard_images(number)
        which = f"images {images[0]} to {images[-1]} of {manifest.source}"
        found += [f"{shard.file} {reason}; it holds {which}" for reason in wrong]
    in_vae = vae_damage(directory, on_bytes)
    if not in_vae:
        try:
            load_vae(directory, manifest)
        except InputError as error:
            in_vae = [str(error)]
    known = {MANIFEST, VAE_FOLDER, VAE_SHA256, *(shard.file for shard in manifest.shards)}
    # Names that begin with a dot are the writer's, or the operating system's.
    return found + in_vae + _extra((path.name for path in directory.glob("[!.]*")), known)


def vae_damage(directory: Path, on_bytes: Callable[[int], Any] = int) -> list[str]:
    """A line on each of the VAE's files that is not as vae.sha256 says."""
    try:
        lines = (directory / VAE_SHA256).read_bytes().decode("ascii").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        return [f"{VAE_SHA256} cannot be read ({error})"]
    listed = {}
    for line in lines:
        match = CHECKSUM_LINE.fullmatch(line)
        if match is None or match[2] in listed:
            return [f"{VAE_SHA256} is damaged; it holds the checksums of the VAE's files"]
        listed[match[2]] = match[1]
    found = []
    for name, sha256 in listed.items():
        wrong = _difference(directory / name, sha256, None, on_bytes)
        found += [f"{name} {reason}; it is part of the VAE" for reason in wrong]
    return found + _extra(_vae_files(directory / VAE_FOLDER), set(listed))


def vae_checksums(folder: Path) -> str:
    """The text of vae.sha256 for the VAE in a folder, wherever that is now."""
    files = sorted(_vae_files(folder).items())
    return "".join(f"{sha256_and_size(path)[0]}  {name}\n" for name, path in files)


def sha256_and_size(path: Path, on_bytes: Callable[[int], Any] = int) -> tuple[str, int]:
    """The sha256 of a file in hexadecimal, and its size in bytes; OSError if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
            on_bytes(len(block))
    return digest.hexdigest(), size


def _vae_files(folder: Path) -> dict[str, Path]:
    """The VAE's files by their names in vae.sha256."""
    return {
        f"{VAE_FOLDER}/{path.relative_to(folder).as_posix()}": path
        for path in folder.rglob("[!.]*")
        if path.is_file()
    }


def _difference(
    path: Path, sha256: str, size: int | None, on_bytes: Callable[[int], Any]
) -> list[str]:
    """What is wrong with a file, if anything is."""
    if not path.is_file():
        return ["is missing"]
    try:
        found, found_size = sha256_and_size(path, on_bytes)
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]
    if size is not None and found_size != size:
        return [f"has {found_size} bytes instead of {size}"]
    return [] if found == sha256 else ["is damaged: its sha256 is another"]


def _extra(names: Iterable[str], known: set[str]) -> list[str]:
    return [f"{name} is no part of the cache" for name in sorted(set(names) - known)]
