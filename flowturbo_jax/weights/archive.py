"""Zip files as PyTorch writes them: named records, stored as they are, each with a checksum."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import open_unnamed, stamp_of
from flowturbo_jax.weights.tensor import quoted

MAX_DIRECTORY = 8 << 20  # bytes, some 100,000 records
MAX_RECORDS = 100_000
MAX_NAME = 1 << 10  # characters; a file name and "/data/1234" are shorter
ENTRY = b"PK\x01\x02"  # begins each entry of the directory; APPNOTE.TXT 4.3.12
CHUNK = 1 << 20
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra; APPNOTE.TXT 4.3.7
ENCRYPTED = 0x1 | 0x40  # general purpose bits 0 and 6; APPNOTE.TXT 4.4.4
# All that zipfile raises for a damaged directory.
DAMAGED = (
    zipfile.BadZipFile,
    RuntimeError,  # which NotImplementedError is, too
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
)


class Record(NamedTuple):
    """Where one record lies."""

    name: str
    header_offset: int
    size: int
    crc: int
    is_stored: bool  # and not compressed


class Archive:
    """The records of a zip file. The file is open during each read only.

    A file whose checksums are all 0 was written without any, as PyTorch can be told to
    (`torch.serialization.set_crc32_options(False)`); its damage cannot be noticed.

    Attributes:
      path: of the file.
      stamp: of the file when its directory was read; later reads refuse another one.
      records: by name.
      has_checksums: whether there are any.
    """

    def __init__(self, path: Path):
        """Reads the directory of the file.

        Raises:
          InputError: the directory is damaged, or made to mislead; the message does not name
            the file.
        """
        self.path = path
        self.records: dict[str, Record] = {}
        self._intact: set[str] = set()
        for info in self._directory():
            name, shown = info.orig_filename, f"its record {quoted(info.orig_filename)}"
            if len(name) > MAX_NAME:
                raise InputError(f"{shown} has a name of {len(name)} characters: it is damaged")
            if name in self.records:
                raise InputError(f"{shown} occurs twice: the file is damaged or made to mislead")
            if info.flag_bits & ENCRYPTED:
                raise InputError(f"{shown} is encrypted; only plain files are read")
            size, place = info.compress_size, info.header_offset
            if not 0 <= place <= self.stamp.size - size - LOCAL_HEADER.size:
                raise InputError(f"{shown} lies outside of the file: it is damaged")
            is_stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == size
            self.records[name] = Record(name, place, size, info.CRC, is_stored)
        if sum(record.size for record in self.records.values()) > self.stamp.size:
            raise InputError("its records overlap: the file is damaged or made to mislead")
        self.has_checksums = any(record.crc for record in self.records.values())

    def _directory(self) -> list[zipfile.ZipInfo]:
        with open_unnamed(self.path) as file:
            self.stamp = stamp_of(file)
            try:
                with zipfile.ZipFile(_BoundedReads(file)) as archive:
                    return archive.infolist()
            except InputError:
                raise
            except DAMAGED as error:
                raise InputError(
                    "it begins as a zip file but has no sound directory at its end: the download "
                    "was cut short, or the file is damaged; get it again"
                ) from error

    def find(self, name: str) -> Record:
        """The record of that name, if it can be read.

        Raises:
          InputError: there is none, or it is compressed.
        """
        if name not in self.records:
            raise InputError(f"its record {quoted(name)} is missing: the file is incomplete")
        if not self.records[name].is_stored:
            raise InputError(
                f"its record {quoted(name)} is compressed; PyTorch stores weights uncompressed"
            )
        return self.records[name]

    def read(self, name: str, limit: int) -> bytes:
        """The whole content of a small record.

        Raises:
          InputError: it is larger than `limit`, compressed, missing or damaged.
        """
        size = self.find(name).size
        if size > limit:
            raise InputError(f"its record {quoted(name)} has {size} bytes; at most {limit} fit")
        content = bytearray(size)
        self.read_into(memoryview(content), name, 0)
        return bytes(content)

    def read_into(self, target: memoryview, name: str, start: int) -> None:
        """Fills `target` with the bytes of a record from `start` on.

        The first read of a record goes through all of it, for the checksum; later ones do not.

        Raises:
          InputError: the file is damaged, changed since it was opened, or cannot be read.
        """
        record = self.find(name)
        try:
            with open_unnamed(self.path, self.stamp) as file:
                self._seek(file, record)
                if name in self._intact or not self.has_checksums:
                    file.seek(start, os.SEEK_CUR)
                    _fill(file, target, 0)
                    return
                crc = _skip(file, start, 0)
                crc = _fill(file, target, crc)
                crc = _skip(file, record.size - start - len(target), crc)
        except (OSError, EOFError) as error:
            raise InputError(f"its record {quoted(name)} cannot be read ({error})") from error
        if crc != record.crc:
            raise InputError(
                f"its record {quoted(name)} does not have the checksum the file gives: the "
                "download or the disk damaged it; get the file again"
            )
        self._intact.add(name)

    def _seek(self, file: io.BufferedReader, record: Record) -> None:
        """Goes to the first byte of a record, which its local header precedes."""
        file.seek(record.header_offset)
        header = file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise EOFError("no record begins where the directory says")
        _, name_length, extra_length = LOCAL_HEADER.unpack(header)
        file.seek(name_length + extra_length, os.SEEK_CUR)


class _BoundedReads:
    """A file for zipfile, which reads a whole directory at once, however long it says it is."""

    def __init__(self, file: io.BufferedReader):
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise InputError(f"its directory has {size} bytes; at most {MAX_DIRECTORY} are read")
        content = self._file.read(size if size >= 0 else MAX_DIRECTORY)
        if (count := content.count(ENTRY)) > MAX_RECORDS:  # before zipfile makes objects of them
            raise InputError(f"it lists {count} records; at most {MAX_RECORDS} are read")
        return content


def _fill(file: io.BufferedReader, target: memoryview, crc: int) -> int:
    """Reads until `target` is full; returns the checksum continued from `crc`."""
    position = 0
    while position < len(target):
        chunk = target[position : position + CHUNK]
        count = file.readinto(chunk)
        if not count:
            raise EOFError("the file ends before it")
        crc = zlib.crc32(chunk[:count], crc)
        position += count
    return crc


def _skip(file: io.BufferedReader, length: int, crc: int) -> int:
    """Reads over bytes that only the checksum needs."""
    scratch = memoryview(bytearray(min(length, CHUNK)))
    while length:
        crc = _fill(file, scratch[: min(length, CHUNK)], crc)
        length -= min(length, CHUNK)
    return crc
