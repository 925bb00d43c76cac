"""Images with captions in tar files, as webdataset and img2dataset write them."""

import bisect
import glob
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

from flowturbo_jax.data import pixels, tar_headers
from flowturbo_jax.data.folder import MAX_FILE, printable
from flowturbo_jax.data.source import (
    CaptionedExample,
    DataSource,
    UnreadableError,
    refuse_failing_machine,
)
from flowturbo_jax.data.texts import MAX_TEXT, json_object, lines_of, texts_of
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import Stamp, open_unnamed, stamp_of

IMAGE, TEXT, JSON = "image", "text", "json"
KINDS = {**dict.fromkeys(("jpg", "jpeg", "png", "webp"), IMAGE), "txt": TEXT, "json": JSON}
RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
MAX_SHARDS = 100_000
THREADS = 8  # shards looked through at once; on a network's disk most of the time is waiting
# Where a sample's parts are in the shard, whether the caption is JSON, and where the image's name
# ends among all names.
SAMPLE = np.dtype(
    [
        ("image", "<i8"),
        ("image_size", "<i4"),
        ("caption", "<i8"),
        ("caption_size", "<i4"),
        ("json", "?"),
        ("name_end", "<i4"),
    ]
)


class Shard(NamedTuple):
    """A tar file and where its samples are.

    Attributes:
      path: of the file.
      stamp: what the file was when it was looked through.
      samples: `[n]` SAMPLE.
      names: of the samples' images, one behind the other.
      without: how many images have no caption.
      example: the name of one of those.
    """

    path: str
    stamp: Stamp
    samples: np.ndarray
    names: bytes
    without: int
    example: str


def open_shards(argument: str, image_size: int) -> DataSource:
    """Opens tar files of images with captions, which stay packed.

    A sample is a run of files of one name up to the first dot: an image (.jpg, .jpeg, .png, .webp)
    and its caption, which is .txt with one in each line, or else .json with "caption" or "text",
    one text or a list. All else is passed over. Every shard's headers are read here, the contents
    when an example is.

    Args:
      argument: what follows "shards:" in a name: a folder of .tar files, or their path, in which *,
        ? and [...] are wildcards and {00000..00099} stands for each of the numbers.
      image_size: side of the square that is cropped from the middle, by `pixels.centre_crop`.

    Returns:
      Images `[image_size, image_size, 3]`, captioned, by the shards' paths and in their order. The
      fingerprint is a sha256 over the names and sizes of the shards, of the samples' parts, and
      their places, and the crop, not over what they hold.

    Raises:
      InputError: no image_size; no such files; one is compressed, cut or damaged; an image without
        a caption; two images or captions of a sample, or two samples, of one name in a shard; or a
        link in place of one.
    """
    name = f"shards:{argument}"
    if image_size < 1:
        raise InputError(f"{name} may hold images of any size: give image_size, such as 256.")
    paths = _paths(argument)
    with ThreadPoolExecutor(THREADS) as pool:
        shards = list(pool.map(_look_through, paths))
    if without := sum(shard.without for shard in shards):
        one = next(shard for shard in shards if shard.without)
        raise InputError(
            f"{without} images in {name} have no caption, such as {one.example} in "
            f"{printable(one.path)}; each must be followed or preceded by its .txt or .json"
        )
    if not any(len(shard.samples) for shard in shards):
        raise InputError(f"{name} holds no images (.{', .'.join(KINDS)})")
    digest = hashlib.sha256(f"shards, centre crop {image_size}\0".encode())
    for shard in shards:
        digest.update(os.fsencode(os.path.basename(shard.path)))
        digest.update(b"\0%d\0%d\0" % (shard.stamp.size, len(shard.samples)))
        digest.update(shard.samples.tobytes() + shard.names)
    shape = (image_size, image_size, 3)
    examples = ShardExamples(shards, image_size)
    return DataSource(name, examples, shape, (), digest.hexdigest(), captioned=True)


class ShardExamples:
    """Samples of tar files by index, in any order; 50 bytes of memory each.

    Args:
      shards: the files; none is held open.
      image_size: side of the square that is cropped from each image.
    """

    def __init__(self, shards: list[Shard], image_size: int) -> None:
        self._shards, self._image_size = shards, image_size
        # How many examples there are up to and including a shard.
        self._totals = list(itertools.accumulate(len(shard.samples) for shard in shards))

    def __len__(self) -> int:
        return self._totals[-1]

    def __getitem__(self, index: int) -> CaptionedExample:
        captions = self.captions(index)
        shard, place = self._find(index)
        sample = shard.samples[place]
        content = self._read(index, int(sample["image"]), int(sample["image_size"]), MAX_FILE)
        return {"data": pixels.decode(content, self._image_size), "captions": captions}

    def name(self, index: int) -> str:
        shard, place = self._find(index)
        start = shard.samples["name_end"][place - 1] if place else 0
        name = shard.names[start : shard.samples["name_end"][place]]
        return f"{printable(name)} in {printable(shard.path)}"

    def captions(self, index: int) -> tuple[str, ...]:
        shard, place = self._find(index)
        sample = shard.samples[place]
        content = self._read(index, int(sample["caption"]), int(sample["caption_size"]), MAX_TEXT)
        try:
            captions = _captions_in_json(content) if sample["json"] else lines_of(content)
        except InputError as error:
            raise UnreadableError(f"its caption cannot be read: {error}") from error
        if not captions:
            raise UnreadableError("its caption is empty")
        return captions

    def _find(self, index: int) -> tuple[Shard, int]:
        """The shard of an example, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._totals, index)
        return self._shards[number], index - (self._totals[number - 1] if number else 0)

    def _read(self, index: int, offset: int, size: int, limit: int) -> bytes:
        if size > limit:
            raise UnreadableError(f"it has a part of more than {limit} bytes")
        shard, _ = self._find(index)
        try:
            # Opened each time, which is little beside decoding: threads share nothing.
            with open_unnamed(shard.path, shard.stamp) as file:
                file.seek(offset)
                content = file.read(size)
        except (InputError, OSError) as error:
            refuse_failing_machine(self.name(index), error)
            raise UnreadableError(str(error)) from error
        if len(content) < size:
            raise UnreadableError(f"the shard ends within it; {tar_headers.CUT}")
        return content


def _paths(argument: str) -> list[str]:
    """The tar files that an argument stands for, sorted."""
    shown = printable(argument)
    if not argument or "\0" in argument:
        raise InputError(
            f"'shards:' needs a folder or a path, such as shards:data/*.tar, got {shown!r}"
        )
    path = os.path.expanduser(argument)
    if os.path.isdir(path):
        return _in_folder(path)
    if os.path.lexists(path):  # whose name may have letters of a pattern
        return [path]
    expanded = list(itertools.islice(_expanded(path), MAX_SHARDS + 1))
    if len(expanded) > MAX_SHARDS:
        raise InputError(f"{shown} stands for over {MAX_SHARDS} files, more than are read")
    matches = {one: glob.glob(one, recursive=True) for one in expanded}
    missing = [one for one, found in matches.items() if not found]
    if missing:
        which = f"{len(missing)} of the {len(expanded)} files, such as " if expanded[1:] else ""
        raise InputError(f"there is no file {which}{printable(missing[0])}; check the path")
    return sorted(set(itertools.chain.from_iterable(matches.values())))


def _in_folder(folder: str) -> list[str]:
    shown = printable(folder)
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot list {shown}: {error.strerror}; check who may read it") from error
    found = [os.path.join(folder, name) for name in names if name.lower().endswith(".tar")]
    packed = [name for name in names if name.lower().endswith(PACKED)]
    if packed:
        raise InputError(
            f"{shown} holds compressed files, such as {printable(packed[0])}, which cannot be read "
            "in any order; decompress them, or give the path of the others"
        )
    if not found:
        raise InputError(f"{shown} holds no .tar files; give the folder or the path of some")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """The pattern with each number of its ranges, in order; as many digits as the range has."""
    match = RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise InputError(f"the range {match[0]} has no numbers; write the smaller one first")
    if last - first >= MAX_SHARDS:
        raise InputError(f"the range {match[0]} has over {MAX_SHARDS} numbers; take larger shards")
    for number in range(first, last + 1):
        digits = f"{number:0{len(match[1])}d}"
        yield from _expanded(pattern[: match.start()] + digits + pattern[match.end() :])


def _look_through(path: str) -> Shard:
    try:
        with open_unnamed(path) as file:
            return _shard(path, file)
    except (InputError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {printable(path)}: {reason}") from error


def _shard(path: str, file: BinaryIO) -> Shard:
    stamp, seen, table, names, without = stamp_of(file), set(), [], bytearray(), []
    for key, parts in _samples(tar_headers.members(file)):
        if IMAGE not in parts:
            continue
        image, caption = parts[IMAGE], parts.get(TEXT) or parts.get(JSON)
        if key in seen:
            raise InputError(f"it holds the sample {key!a:.200} twice; remove or rename one")
        seen.add(key)
        if caption is None:
            without.append(printable(image.name))
            continue
        names += os.fsencode(image.name)
        image_size, text_size = min(image.size, MAX_FILE + 1), min(caption.size, MAX_TEXT + 1)
        is_json = TEXT not in parts
        places = (image.offset_data, image_size, caption.offset_data, text_size)
        table.append((*places, is_json, len(names)))
    example = without[0] if without else ""
    return Shard(path, stamp, np.array(table, SAMPLE), bytes(names), len(without), example)


def _samples(
    members: Iterable[tarfile.TarInfo],
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The parts of each run of members of one name up to the first dot, by kind."""
    named = ((*_key_and_suffix(member.name), member) for member in members)
    for key, run in itertools.groupby((one for one in named if one[0]), lambda one: one[0]):
        parts: dict[str, tarfile.TarInfo] = {}
        for _, suffix, member in run:
            kind = KINDS.get(suffix.lower())
            if kind is None:
                continue
            if not tar_headers.is_plain(member):
                raise InputError(f"{member.name!a:.200} in it is no plain file; pack what it means")
            if kind in parts:
                raise InputError(
                    f"{parts[kind].name!a:.200} and {member.name!a:.200} in it are parts of one "
                    "sample; remove one"
                )
            parts[kind] = member
        yield key, parts


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A member's name up to the first dot, and what follows; "" for hidden ones.

    Source: `base_plus_ext` in webdataset's tariterators.py.
    """
    folder, slash, file = name.rpartition("/")
    base, _, suffix = file.partition(".")
    return (folder + slash + base if base else ""), suffix


def _captions_in_json(content: bytes) -> tuple[str, ...]:
    record = json_object(content)
    value = record.get("caption")
    return texts_of(record.get("text") if value is None else value)
