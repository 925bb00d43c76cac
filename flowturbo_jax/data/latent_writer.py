"""Writes a cache of latents shard by shard, so that a run that was killed at any moment goes on.

A shard is written as a draft, read back, listed with its checksum in unfinished.json, and renamed:
what bears its final name is whole. When all are there, unfinished.json becomes manifest.json.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowturbo_jax.checkpoint import save_params
from flowturbo_jax.data import latent_cache
from flowturbo_jax.data.latent_cache import MANIFEST, UNFINISHED, VAE_FOLDER, VAE_SHA256
from flowturbo_jax.data.latent_manifest import Manifest, Shard, differences, pack
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.weights.json_file import MAX_JSON

LOCK = ".lock"
DRAFT = ".draft-"  # what begins so is unfinished; after a kill it is in nobody's way
# Stored as they are, so that the bytes do not depend on a compressor's version; moments have little
# to compress. In groups of 1, reading one record costs one record.
RECORD_OPTIONS = "group_size:1,uncompressed"
# How messages name what makes one plan differ from another: by the arguments of encode.


@contextlib.contextmanager
def writing(
    plan: Manifest, vae_params: Params, report: Callable[[str], Any] = str
) -> Iterator["Writer"]:
    """Begins a cache at `plan.directory`, or goes on with one that the same plan began.

    What another plan began without finishing a shard is begun anew.

    Args:
      plan: what is to be encoded.
      vae_params: parameters of the autoencoder, stored with the latents.
      report: told in a line what was found there.

    Yields:
      The writer of the shards that are missing.

    Raises:
      InputError: the folder holds something else or was begun by another plan, another process is
        writing it, or it cannot be written.
    """
    with _disk_errors(plan.directory):
        _check_space(plan, _begun(plan), vae_params)  # before anything is made
        plan.directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _disk_errors(plan.directory):
            stack.enter_context(_lock(plan.directory))
            found = _begun(plan)  # again, now that nobody else writes
            writer = Writer(_begin(plan, found, vae_params, report))
        yield writer


class Writer:
    """What `writing` gives: takes the missing shards, one after the other.

    Args:
      manifest: lists the shards there are.
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards to be made."""
        return _missing(self.manifest)

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator["ShardDraft"]:
        """A shard to be filled; it is kept when the block ends, and dropped if that raises.

        Raises:
          InputError: the disk is full or fails; the shards before are kept.
        """
        directory, file = self.manifest.directory, self.manifest.shard_file(number)
        draft = ShardDraft(self.manifest, file)
        try:
            yield draft
            with _disk_errors(directory):
                shards = sorted(
                    [*self.manifest.shards, draft.close()], key=lambda shard: shard.file
                )
                manifest = dataclasses.replace(self.manifest, shards=tuple(shards))
                # In this order: a shard that bears its final name is always listed.
                _write_text(directory / UNFINISHED, manifest.to_json())
                _rename(draft.path, directory / file)
        finally:
            draft.remove()
        self.manifest = manifest

    def finish(self) -> Manifest:
        """Makes the cache one that can be opened, and returns what its manifest says."""
        directory = self.manifest.directory
        with _disk_errors(directory):
            if not (directory / MANIFEST).exists():
                _rename(directory / UNFINISHED, directory / MANIFEST)
        return latent_cache.read_manifest(directory)


class ShardDraft:
    """A shard that is being written.

    Args:
      manifest: what the records are to be like.
      file: the shard's final name.
    """

    def __init__(self, manifest: Manifest, file: str):
        # Here, because only whoever writes needs it.
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = manifest.directory / (DRAFT + file)
        self._manifest, self._file = manifest, file
        self._count, self._unreadable = 0, []
        with _disk_errors(manifest.directory):
            self._writer = ArrayRecordWriter(str(self.path), RECORD_OPTIONS)

    def add(self, label: int, moments: np.ndarray, states: np.ndarray | None = None) -> None:
        """Adds an image.

        Args:
          label: of its class; 0 of captioned data.
          moments: `[2, h, w, 2c]`, its own and its mirror image's.
          states: text states `[K, L, D]` of captioned data.
        """
        record = pack(self._manifest, label, moments, states)
        with _disk_errors(self._manifest.directory):
            self._writer.write(record)
        self._count += 1

    def leave_out(self, name: str) -> None:
        """Notes an image that cannot be read."""
        self._unreadable.append(name)

    def close(self) -> Shard:
        """Ends the file and reads it back; raises RuntimeError where records are missing."""
        from array_record.python.array_record_module import ArrayRecordReader

        self._writer.close()
        _sync(self.path)
        sha256, size = latent_cache.sha256_and_size(self.path)
        count = ArrayRecordReader(str(self.path)).num_records()
        if count != self._count:
            raise RuntimeError(f"of {self._count} records {count} were stored")
        return Shard(self._file, count, size, sha256, tuple(self._unreadable))

    def remove(self) -> None:
        """Removes the draft, if it is one still."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _begun(plan: Manifest) -> Manifest | None:
    """The manifest of what the folder holds of this plan, or None where it holds nothing."""
    directory = plan.directory
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; choose another --out")
    names = [name for name in (MANIFEST, UNFINISHED) if (directory / name).exists()]
    if not names:
        if others := sorted(path.name for path in directory.glob("[!.]*")):
            raise InputError(
                f"{directory} is not empty: it holds {others[0]}, and no latents; choose another "
                "--out"
            )
        return None
    begun = latent_cache.read_manifest(directory, names[0])
    found = differences(begun, plan)
    if found and names[0] == UNFINISHED and not begun.shards:
        return None  # nothing is lost if another plan begins anew
    if found:
        raise InputError(
            f"{directory} was begun by another command: {'; '.join(found)}; give the same again, "
            "or choose another --out"
        )
    return begun


def _missing(manifest: Manifest) -> list[int]:
    files = {shard.file for shard in manifest.shards}
    return [n for n in range(manifest.shard_count) if manifest.shard_file(n) not in files]


def _whole(manifest: Manifest) -> Manifest:
    """The manifest of those shards that are there and have their size."""

    def is_whole(shard: Shard) -> bool:
        path = manifest.directory / shard.file
        return path.is_file() and path.stat().st_size == shard.bytes

    return dataclasses.replace(manifest, shards=tuple(filter(is_whole, manifest.shards)))


def _begin(
    plan: Manifest, found: Manifest | None, vae_params: Params, report: Callable[[str], Any]
) -> Manifest:
    """Makes the folder ready for the missing shards; returns the manifest of those there are."""
    directory = plan.directory
    for path in directory.glob(f"{DRAFT}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = plan if found is None else _whole(found)
    if found is None and (directory / VAE_SHA256).exists():
        (directory / VAE_SHA256).unlink()  # of another plan, whose VAE is to be written over
        _sync(directory)
    if found is None or manifest != found:
        _reopen(directory)
        _write_text(directory / UNFINISHED, manifest.to_json())
    if latent_cache.vae_damage(directory):
        _reopen(directory)
        _write_vae(directory, vae_params)
    if found is not None:
        again = len(found.shards) - len(manifest.shards)
        report(
            f"{directory}: {len(manifest.shards)} of {plan.shard_count} shards are finished"
            + (f", {again} that were are missing or cut" if again else "")
        )
    return manifest


def _reopen(directory: Path) -> None:
    """Takes the manifest from a cache that was finished, so that it cannot be opened meanwhile."""
    if (directory / MANIFEST).exists():
        _rename(directory / MANIFEST, directory / UNFINISHED)


def _write_vae(directory: Path, params: Params) -> None:
    draft, folder = directory / f"{DRAFT}{VAE_FOLDER}", directory / VAE_FOLDER
    if folder.exists():
        shutil.rmtree(folder)
    save_params(draft, params)
    for path in draft.rglob("*"):
        _sync(path)
    text = latent_cache.vae_checksums(draft)
    _rename(draft, folder)
    _write_text(directory / VAE_SHA256, text)


def _write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    if len(text) > MAX_JSON:
        raise InputError(
            f"{path.name} would be larger than {MAX_JSON} bytes: too many images cannot be read"
        )
    draft = path.with_name(DRAFT + path.name)
    draft.write_text(text)
    _sync(draft)
    _rename(draft, path)


def _rename(path: Path, final: Path) -> None:
    os.replace(path, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(plan: Manifest, found: Manifest | None, vae_params: Params) -> None:
    """Refuses to begin what the disk cannot hold."""
    missing = _missing(plan if found is None else _whole(found))
    needed = sum(_shard_bytes(plan, number) for number in missing)
    if not (plan.directory / VAE_SHA256).exists():
        needed += sum(leaf.nbytes for leaf in jax.tree.leaves(vae_params))
    place = plan.directory.absolute()
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise InputError(
            f"the latents need {needed / 1e9:.2f} GB at {plan.directory}, and {free / 1e9:.2f} GB "
            "are free; make room, or choose another --out"
        )


def _shard_bytes(plan: Manifest, number: int) -> int:
    """About the size of a shard's file, rather more than less."""
    # ArrayRecord pads a file to whole blocks of 64 KB and adds some 92 bytes to a record, and to
    # each block a header of 24; measured.
    count = len(plan.shard_images(number))
    return int(count * (plan.record_bytes * 1.001 + 128)) + 3 * 2**16


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Keeps other processes from writing there; the system frees it when this one ends."""
    import fcntl

    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            reason = f"another process is encoding to {directory}; let it finish"
            raise InputError(reason) from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Turns what a disk and its libraries raise into one line."""
    try:
        yield
    except InputError:
        raise
    # array_record reports a full disk as a RuntimeError, Orbax as a ValueError.
    except (OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"cannot write {directory}: {lines[0]:.200}; mend that and run the same command again, "
            "which keeps the shards that are finished"
        ) from error
