"""Images with captions: turned into token ids for training, and read from a folder."""

import hashlib
import os
import posixpath
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from flowturbo_jax.data.folder import LISTED, FolderExamples, image_files, printable
from flowturbo_jax.data.source import (
    CaptionedExample,
    CaptionedExamples,
    DataSource,
    Draw,
    Example,
    UnreadableError,
    mirror,
)
from flowturbo_jax.data.texts import MAX_TEXT, json_lines, lines_of, texts_of
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import read_start

Tokenize = Callable[[Sequence[str]], np.ndarray]  # k texts -> [k, L] int32
METADATA = "metadata.jsonl"  # as Hugging Face's imagefolder calls it
SUFFIX = b".txt"


def tokenised(source: DataSource, tokenize: Tokenize, tokenizer_fingerprint: str) -> DataSource:
    """A captioned data set as one whose labels are token ids, which can be trained on.

    Args:
      source: captioned.
      tokenize: turns k texts into ids `[k, L]` int32, of the same L for all texts; called from
        several threads.
      tokenizer_fingerprint: what tells the tokenizer from any other.

    Returns:
      A data set whose stored examples are `{"data", "captions": [k, L] int32}`, and whose `draw`
      takes one caption at random, all alike likely, and flips: `{"data", "label": [L] int32}`. The
      fingerprint follows the tokenizer's.

    Raises:
      InputError: the source has no captions, or `tokenize` returns something else; the latter also
        when an example is read.
    """
    if not source.captioned:
        raise InputError(f"{source.name} has no captions to tokenise; give one that has")
    probe = tokenize(("",))
    length = probe.shape[-1] if probe.ndim else 0
    _refuse_other_ids(probe, 1, length)
    content = f"{source.fingerprint}\0tokenised\0{tokenizer_fingerprint}"
    return replace(
        source,
        examples=TokenisedExamples(source.examples, tokenize, length),
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        draw=partial(draw_caption, source.draw or mirror),
        label=((length,), "int32"),
        captioned=False,
    )


def draw_caption(
    draw: Draw, example: Example, generator: np.random.Generator, flip: bool
) -> Example:
    """Takes one caption of an example as its label.

    Args:
      draw: what else is random in the example, such as `mirror`.
      example: with "captions" `[k, L]`.
      generator: where the choice comes from.
      flip: handed to `draw`.

    Returns:
      What `draw` makes of the example with "label" `[L]` in place of the captions.
    """
    rest = {name: array for name, array in example.items() if name != "captions"}
    captions = example["captions"]
    chosen = captions[generator.integers(len(captions))]
    return draw({**rest, "label": chosen}, generator, flip)


def captions_of(source: DataSource) -> Iterator[str]:
    """All captions of a data set in its order, such as to learn a tokenizer of; decodes no image.

    Those that cannot be read are left out, as they are in training.

    Args:
      source: captioned, or made of such a one by `tokenised`.

    Raises:
      InputError: at once, where the source has no captions.
    """
    if not isinstance(source.examples, CaptionedExamples):
        raise InputError(f"{source.name} has no captions; give a data set that has")
    return _captions(source.examples)


def open_captions(argument: str, image_size: int) -> DataSource:
    """Opens a folder of images with captions, whatever its sub-folders.

    The captions of all images are in a metadata.jsonl in the folder, as Hugging Face's imagefolder
    has it: in each line an object with "file_name", relative to the folder, and "text", one text or
    a list of them; the captions of several lines for an image are joined. Without that file, those
    of each image are in a file of the same name that ends in .txt, one in each line.

    Args:
      argument: the folder; what follows "captions:" in a name.
      image_size: side of the square that is cropped from the middle, by `pixels.centre_crop`.

    Returns:
      Images `[image_size, image_size, 3]`, captioned, by name. The fingerprint is a sha256 over the
      names and sizes of the images, the captions, and the crop, not over what the images hold.

    Raises:
      InputError: no image_size, no such folder, no images in it, an image without a caption, or a
        file of captions that is damaged, or names what is no image in the folder.
    """
    name, root = f"captions:{argument}", os.fsencode(os.path.expanduser(argument))
    if not root:
        raise InputError("'captions:' needs the name of a folder, such as captions:photographs.")
    if image_size < 1:
        raise InputError(f"{name} may hold images of any size: give image_size, such as 256.")
    if os.path.isfile(root):
        raise InputError(f"{printable(root)} is a file; give the folder that holds the images")
    found = sorted(image_files(root, b""))
    if not found:
        raise InputError(f"{printable(root)} holds no images ({LISTED})")
    files = [file for file, _ in found]
    metadata = os.path.join(os.fsdecode(root), METADATA)
    read = _from_metadata(metadata, files) if os.path.lexists(metadata) else _beside(root, files)
    captions = CaptionTable(read)
    digest = hashlib.sha256(f"captions, centre crop {image_size}\0".encode())
    digest.update(b"".join(b"%s\0%d\0" % pair for pair in found))
    digest.update(captions.digest())
    images = FolderExamples(root, {b"": b"".join(file + b"\0" for file in files)}, image_size)
    shape = (image_size, image_size, 3)
    examples = CaptionedFolder(images, captions)
    return DataSource(name, examples, shape, (), digest.hexdigest(), captioned=True)


class TokenisedExamples:
    """Examples whose captions are token ids `[k, L]` int32.

    Args:
      examples: with captions.
      tokenize: as for `tokenised`.
      length: L.
    """

    def __init__(self, examples: CaptionedExamples, tokenize: Tokenize, length: int) -> None:
        self._examples, self._tokenize, self._length = examples, tokenize, length

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        ids = self._tokenize(example["captions"])
        _refuse_other_ids(ids, len(example["captions"]), self._length)
        return {**example, "captions": ids}

    def name(self, index: int) -> str:
        return self._examples.name(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._examples.captions(index)


class CaptionTable:
    """The captions of every image, in one piece of UTF-8: 8 bytes each, and 8 an image, beside it.

    Args:
      captions: those of image 0, 1, ...
    """

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        self._text, self._ends, self._totals = bytearray(), array("q"), array("q")
        for texts in captions:
            for text in texts:
                self._text += text.encode()
                self._ends.append(len(self._text))
            self._totals.append(len(self._ends))

    def __getitem__(self, index: int) -> tuple[str, ...]:
        first = self._totals[index - 1] if index else 0
        ends = self._ends[first : self._totals[index]]
        starts = [self._ends[first - 1] if first else 0, *ends[:-1]]
        return tuple(
            self._text[start:end].decode() for start, end in zip(starts, ends, strict=True)
        )

    def digest(self) -> bytes:
        """sha256 over the captions; the same on every machine."""
        found = hashlib.sha256(self._text)
        for numbers in (self._ends, self._totals):
            found.update(np.asarray(numbers).astype("<i8").tobytes())
        return found.digest()


class CaptionedFolder:
    """Image files with their captions by index.

    Args:
      images: the files.
      captions: theirs.
    """

    def __init__(self, images: FolderExamples, captions: CaptionTable) -> None:
        self._images, self._captions = images, captions

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> CaptionedExample:
        return {"data": self._images[index]["data"], "captions": self._captions[index]}

    def name(self, index: int) -> str:
        return self._images.name(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]


def _refuse_other_ids(ids: np.ndarray, count: int, length: int) -> None:
    if ids.shape != (count, length) or ids.dtype != np.int32:
        raise InputError(
            f"the tokenizer makes {ids.dtype} {list(ids.shape)} of {count} captions; it must make "
            f"int32 [{count}, L], of one L for all texts"
        )


def _captions(examples: CaptionedExamples) -> Iterator[str]:
    for index in range(len(examples)):
        try:
            yield from examples.captions(index)
        except UnreadableError:
            continue


def _from_metadata(path: str, files: list[bytes]) -> list[tuple[str, ...]]:
    """The captions of every file, as metadata.jsonl says."""
    found: dict[bytes, tuple[str, ...]] = dict.fromkeys(files, ())
    for where, record in json_lines(path):
        try:
            file = _file_name(record.get("file_name"))
            if file not in found:
                raise InputError(
                    f"file_name is {printable(file)!a:.200}, and no image ({LISTED}) of that name "
                    "is in the folder"
                )
            found[file] += texts_of(record.get("text"))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    without = [file for file, texts in found.items() if not texts]
    _refuse_without(without, len(files), f'give each a line in {printable(path)} with its "text"')
    return list(found.values())


def _file_name(value: object) -> bytes:
    """The name of an image relative to the folder, as metadata.jsonl gives it."""
    if not isinstance(value, str) or not value:
        raise InputError("its file_name must be the name of an image in the folder")
    if value.startswith("/") or ".." in value.split("/"):
        raise InputError(f"file_name {value!a:.200} leaves the folder; put the image into it")
    try:
        return os.fsencode(posixpath.normpath(value))
    except UnicodeEncodeError as error:
        raise InputError(f"no file can be called {value!a:.200}") from error


def _beside(root: bytes, files: list[bytes]) -> Iterator[tuple[str, ...]]:
    """The captions of every file, out of the text file beside it."""
    paths = [os.path.join(root, os.path.splitext(file)[0] + SUFFIX) for file in files]
    without = [file for file, path in zip(files, paths, strict=True) if not os.path.isfile(path)]
    remedy = f"write each into a file of the same name with {SUFFIX.decode()}, or all to {METADATA}"
    _refuse_without(without, len(files), remedy)
    return map(_text_file, paths)


def _text_file(path: bytes) -> tuple[str, ...]:
    shown = printable(path)
    content = read_start(os.fsdecode(path), MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise InputError(f"{shown} has more than {MAX_TEXT} bytes, too many for captions")
    try:
        captions = lines_of(content)
    except InputError as error:
        raise InputError(f"cannot read {shown}: {error}") from error
    if not captions:
        raise InputError(f"{shown} is empty; write a caption into it, or remove its image")
    return captions


def _refuse_without(files: list[bytes], count: int, remedy: str) -> None:
    if files:
        raise InputError(
            f"{len(files)} of {count} images have no caption, such as {printable(files[0])}; "
            f"{remedy}"
        )
