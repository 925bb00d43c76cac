"""Images in folders, one folder per class."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping

import numpy as np

from flowturbo_jax.class_names import readable_names
from flowturbo_jax.data import pixels
from flowturbo_jax.data.source import (
    DataSource,
    Example,
    UnreadableError,
    refuse_failing_machine,
)
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import open_unnamed

# Names are bytes in here, as the disk has them: a third of the memory of Python's strings, and
# those that are no text are no special case.
SUFFIXES = (b".png", b".jpg", b".jpeg", b".webp", b".bmp")
LISTED = b", ".join(SUFFIXES).decode()
MAX_FILE = 1_000_000_000  # bytes; larger ones are no images, whatever their names
SPLITS = frozenset((b"train", b"val", b"valid", b"validation", b"test"))
MISSING = -1  # as the size of a file that a link names but that does not exist


def open_folder(argument: str, image_size: int) -> DataSource:
    """Opens a folder of images, in which every sub-folder is a class.

    Label 0 is the first sub-folder by name. Folders within a class belong to it, links are
    followed. Names that begin with a dot, and files without the suffix of an image, are passed
    over.

    Args:
      argument: the folder; what follows "folder:" in a name.
      image_size: side of the square that is cropped from the middle, by `pixels.centre_crop`.

    Returns:
      Images `[image_size, image_size, 3]`. The classes are called as their folders are, or by
      ImageNet's names if these are its 1000 WordNet ids. The fingerprint is a sha256 over the
      names of the folders and files below this one, the files' sizes in bytes, and the crop, not
      over what the files hold.

    Raises:
      InputError: no image_size, no such folder, images beside the sub-folders, sub-folders that
        are splits, a class without images, or a folder that cannot be listed.
    """
    name = f"folder:{argument}"
    if image_size < 1:
        raise InputError(f"{name} may hold images of any size: give image_size, such as 256.")
    root = os.fsencode(os.path.expanduser(argument))
    folders = _classes(root)
    digest = hashlib.sha256(f"folder, centre crop {image_size}\0".encode())
    files = {}
    for folder in folders:
        found = sorted(image_files(root, folder))
        files[folder] = b"".join(file + b"\0" for file, _ in found)
        digest.update(folder + b"\0%d\0" % len(found))
        digest.update(b"".join(b"%s\0%d\0" % pair for pair in found))
    _refuse_empty(root, files)
    class_names = readable_names([folder.decode() for folder in folders])
    examples = FolderExamples(root, files, image_size)
    shape = (image_size, image_size, 3)
    return DataSource(name, examples, shape, class_names, digest.hexdigest())


def open_images(argument: str, image_size: int) -> DataSource:
    """Opens all images below a folder, whatever their sub-folders, without labels.

    This is what statistics are taken from; to train, open "folder:" with a sub-folder per class.

    Args:
      argument: the folder; what follows "images:" in a name.
      image_size: side of the square that is cropped from the middle, by `pixels.centre_crop`; 0
        takes the images as they are, which then must all have the size of the first.

    Returns:
      Images `[H, W, 3]`, label 0 all. The fingerprint is as that of `open_folder`.

    Raises:
      InputError: no such folder, it holds no images, the first cannot be read, or, when an example
        is read, it has another size.
    """
    name, root = f"images:{argument}", os.fsencode(os.path.expanduser(argument))
    if not root:
        raise InputError("'images:' needs the name of a folder, such as images:samples.")
    found = sorted(image_files(root, b""))
    if not found:
        raise InputError(f"{printable(root)} holds no images ({LISTED})")
    digest = hashlib.sha256(f"images, centre crop {image_size}\0".encode())
    digest.update(b"".join(b"%s\0%d\0" % pair for pair in found))
    examples = FolderExamples(root, {b"": b"".join(file + b"\0" for file, _ in found)}, image_size)
    try:
        shape = examples[0]["data"].shape
    except UnreadableError as error:
        raise InputError(f"{examples.name(0)} cannot be read: {error}") from error
    examples.shape = None if image_size else shape
    return DataSource(name, examples, shape, ("image",), digest.hexdigest())


class FolderExamples:
    """Image files by index; ImageNet's 1.3 million names take 42 MB.

    Args:
      root: the folder.
      files: for each sub-folder the files in it, by names relative to it, each ending in a zero
        byte.
      image_size: side of the square that is cropped from each image; 0 to crop nothing.

    Attributes:
      shape: what every image must have as it is; None for any.
    """

    shape: tuple[int, ...] | None = None

    def __init__(self, root: bytes, files: Mapping[bytes, bytes], image_size: int) -> None:
        self._root, self._folders, self._image_size = root, list(files), image_size
        self._names = b"".join(files.values())
        self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)
        # How many examples there are up to and including a class.
        self._totals = np.cumsum([names.count(0) for names in files.values()])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Example:
        label, path = self._find(index)
        data = pixels.decode(_read(path), self._image_size)
        if self.shape is not None and data.shape != self.shape:
            raise InputError(
                f"{printable(path)} is {data.shape[1]} x {data.shape[0]}, but the first image is "
                f"{self.shape[1]} x {self.shape[0]}; crop all to one size with --image-size"
            )
        return {"data": data, "label": np.asarray(label, np.int32)}

    def name(self, index: int) -> str:
        return printable(self._find(index)[1])

    def _find(self, index: int) -> tuple[int, bytes]:
        """The label and the path of an example."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        label = int(np.searchsorted(self._totals, index, side="right"))
        start = self._ends[index - 1] + 1 if index else 0
        file = self._names[start : self._ends[index]]
        return label, os.path.join(self._root, self._folders[label], file)


def _classes(root: bytes) -> list[bytes]:
    """The sub-folders by name."""
    if not root:
        raise InputError("'folder:' needs the name of a folder, such as folder:images/train.")
    folders = []
    for entry in _scan(root):
        if _is_folder(entry):
            folders.append(entry.name)
        elif _is_image(entry.name):
            raise InputError(
                f"{printable(root)} holds images itself, such as {printable(entry.name)}; "
                "move them into sub-folders, one for each class"
            )
    if not folders:
        raise InputError(f"{printable(root)} has no sub-folders; it needs one for each class")
    if len(folders) > 1 and SPLITS.issuperset(folders):
        one = next((name for name in folders if name == b"train"), folders[0])
        raise InputError(
            f"the sub-folders of {printable(root)} are splits and no classes; "
            f"open one of them, such as folder:{printable(os.path.join(root, one))}"
        )
    for folder in folders:
        try:
            folder.decode()
        except UnicodeDecodeError as error:
            shown = printable(os.path.join(root, folder))
            raise InputError(f"the name of {shown} is not UTF-8 text; rename it") from error
    return sorted(folders)


def _refuse_empty(root: bytes, files: Mapping[bytes, bytes]) -> None:
    empty = [folder for folder, names in files.items() if not names]
    if len(empty) == len(files):
        raise InputError(f"no sub-folder of {printable(root)} holds images ({LISTED})")
    if empty:
        shown = printable(os.path.join(root, empty[0]))
        raise InputError(f"{shown} holds no images ({LISTED}); add some, or remove the folder")


def image_files(root: bytes, folder: bytes) -> Iterator[tuple[bytes, int]]:
    """The name, relative to a sub-folder or to the root, and the size of every image file below."""
    above = frozenset({_identity(root)} if folder else ())
    pending = [(os.path.join(root, folder) if folder else root, b"", above)]
    while pending:
        path, prefix, above = pending.pop()
        identity = _identity(path)
        if identity in above:  # a link to a folder that it lies in
            continue
        for entry in _scan(path):
            if _is_folder(entry):
                pending.append((entry.path, prefix + entry.name + b"/", above | {identity}))
            elif _is_image(entry.name):
                yield prefix + entry.name, _size(entry)


def _identity(folder: bytes) -> tuple[int, int]:
    """What tells a folder from every other, whatever links lead to it."""
    with _refused(folder):
        found = os.stat(folder)
    return found.st_dev, found.st_ino


def _scan(folder: bytes) -> Iterator["os.DirEntry[bytes]"]:
    """What a folder holds, but for hidden names."""
    with _refused(folder), os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith(b"."))


@contextlib.contextmanager
def _refused(folder: bytes) -> Iterator[None]:
    """Says what is wrong with a folder that cannot be listed."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"there is no folder {printable(folder)}; check the name") from error
    except NotADirectoryError as error:
        raise InputError(
            f"{printable(folder)} is a file; give the folder that has a sub-folder for each class"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot list {printable(folder)}: {error.strerror}; check who may read it"
        ) from error
    except ValueError as error:  # a zero byte
        raise InputError(f"no folder can be called {printable(folder)}") from error


def _is_folder(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def _is_image(name: bytes) -> bool:
    return name.lower().endswith(SUFFIXES)


def _size(entry: "os.DirEntry[bytes]") -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing; reading will say so
        return MISSING


def _read(path: bytes) -> bytes:
    try:
        with open_unnamed(os.fsdecode(path)) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE:
                raise UnreadableError(f"it has more than {MAX_FILE} bytes, too many for an image")
            return file.read()
    except (InputError, OSError) as error:
        refuse_failing_machine(printable(path), error)
        raise UnreadableError(str(error)) from error


def printable(path: bytes | str) -> str:
    """The path as text that can be printed on one line."""
    text = os.fsdecode(path)
    return text if text.isprintable() else ascii(text)
