"""Zip files as PyTorch writes them: named records, stored as they are, each with a checksum."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.tensor import quoted

MAX_DIRECTORY = 16 << 20  # bytes, some 200,000 records
MAX_RECORDS = 100_000
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

    Attributes:
      path: of the file.
      size: of the file, in bytes.
      records: by name.
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
            if name in self.records:
                raise InputError(f"{shown} occurs twice: the file is damaged or made to mislead")
            if info.flag_bits & ENCRYPTED:
                raise InputError(f"{shown} is encrypted; only plain files are read")
            size, place = info.compress_size, info.header_offset
            if not 0 <= place <= self.size - size - LOCAL_HEADER.size:
                raise InputError(f"{shown} lies outside of the file: it is damaged")
            is_stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == size
            self.records[name] = Record(name, place, size, info.CRC, is_stored)
        if sum(record.size for record in self.records.values()) > self.size:
            raise InputError("its records overlap: the file is damaged or made to mislead")

    def _directory(self) -> list[zipfile.ZipInfo]:
        try:
            with open(self.path, "rb") as raw, zipfile.ZipFile(_BoundedReads(raw)) as archive:
                self.size = os.fstat(raw.fileno()).st_size
                entries = archive.infolist()
        except DAMAGED as error:
            raise InputError(
                "it begins as a zip file but has no sound directory at its end: the download was "
                "cut short, or the file is damaged; get it again"
            ) from error
        if len(entries) > MAX_RECORDS:
            raise InputError(f"it lists {len(entries)} records; at most {MAX_RECORDS} are read")
        return entries

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
          InputError: the file is damaged, or cannot be read any more.
        """
        record = self.find(name)
        try:
            with open(self.path, "rb", buffering=0) as file:
                self._seek(file, record)
                if name in self._intact:
                    file.seek(start, os.SEEK_CUR)
                    _fill(file, target, 0)
                    return
                crc = _skip(file, start, 0)
                crc = _fill(file, target, crc)
                crc = _skip(file, record.size - start - len(target), crc)
        except (OSError, EOFError) as error:
            raise InputError(f"its record {quoted(name)} cannot be read: {error}") from error
        if crc != record.crc:
            raise InputError(
                f"its record {quoted(name)} does not have the checksum the file gives: the "
                "download or the disk damaged it; get the file again"
            )
        self._intact.add(name)

    def _seek(self, file: io.FileIO, record: Record) -> None:
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
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return self._file.read(size if size >= 0 else MAX_DIRECTORY)


def _fill(file: io.FileIO, target: memoryview, crc: int) -> int:
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


def _skip(file: io.FileIO, length: int, crc: int) -> int:
    """Reads over bytes that only the checksum needs."""
    scratch = memoryview(bytearray(min(length, CHUNK)))
    while length:
        crc = _fill(file, scratch[: min(length, CHUNK)], crc)
        length -= min(length, CHUNK)
    return crc
