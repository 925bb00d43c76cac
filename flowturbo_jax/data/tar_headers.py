"""What lies where in an uncompressed tar file, found without reading the contents."""

import itertools
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from flowturbo_jax.interfaces import InputError

# Bytes of one member's headers. Some have long names and attributes; those of hostile files would
# fill the memory, or keep tarfile busy for hours.
MAX_HEADERS = 16 << 10
BLOCK = 1 << 20  # bytes read at once
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
CUT = "it was cut; copy or make it again"
DAMAGED = "it is damaged; copy or make it again"
# What tarfile raises, or has raised, for damaged files.
DAMAGE = (tarfile.TarError, ValueError, TypeError, IndexError, OverflowError, RecursionError)


def members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file in its order, with `offset_data` and `size` within the file.

    Args:
      file: open at its start. Only headers are read from it.

    Raises:
      InputError: it is compressed, no tar file, cut (also between two members), or damaged.
    """
    file_size = os.fstat(file.fileno()).st_size
    if file.read(8).startswith(COMPRESSED):
        raise InputError("it is compressed, and cannot be read in any order; decompress it")
    file.seek(0)
    headers = _Headers(file)
    try:
        archive = tarfile.TarFile(
            fileobj=headers, mode="r", encoding="utf-8", errors="surrogateescape"
        )
        while (member := _next(archive, headers)) is not None:
            end = member.offset_data + member.size
            if member.size < 0 or archive.offset < member.offset_data:
                raise InputError(DAMAGED)
            if end > file_size and member.isreg():
                raise InputError(CUT)
            yield member
    except EOFError as error:
        raise InputError(CUT) from error
    except DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError("it is no tar file" if headers.reads < 2 else DAMAGED) from error
    _refuse_no_end(file, archive.offset)


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file whose bytes lie in the tar file as they are: no link, no hole."""
    return member.isreg() and not member.issparse()


def _next(archive: tarfile.TarFile, headers: "_Headers") -> tarfile.TarInfo | None:
    headers.left = MAX_HEADERS
    member = archive.next()
    archive.members.clear()  # which would hold a kilobyte for each
    return member


def _refuse_no_end(file: BinaryIO, offset: int) -> None:
    """Refuses a tar file whose members are not followed by zeros only, of which tarfile is silent.

    Without zeros the file ends between two members; anything else there is a damaged header, or the
    rest of the members behind one.
    """
    file.seek(offset)
    blocks = iter(lambda: file.read(BLOCK), b"")
    first = next(blocks, b"")
    if len(first) < tarfile.BLOCKSIZE:
        raise InputError(CUT)
    if any(block.strip(b"\0") for block in itertools.chain([first], blocks)):
        raise InputError(DAMAGED)


class _Headers:
    """A file from which tarfile may read headers, but no more of them than one member can need.

    Args:
      file: the tar file.

    Attributes:
      left: bytes that may be read for the next member.
      reads: how often something was read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left, self.reads = file, MAX_HEADERS, 0

    def read(self, size: int) -> bytes:
        self.reads += 1
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError("headers are too long")
        content = self._file.read(size)
        if len(content) < size:
            raise EOFError
        return content

    def seek(self, offset: int) -> None:
        self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()
