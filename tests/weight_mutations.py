"""Damages of weight files: changed bytes, changed pickles, changed records and documents."""

import io
import itertools
import pickletools
import random
import re
import zipfile
from collections.abc import Callable

from weight_attacks import HOSTILE, number, zipped

NUMBERS = (
    -1,
    0,
    1,
    2**15,
    2**31 - 1,
    2**31,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    2**70,
)


def change_json(rng: random.Random, text: bytes, other: bytes) -> bytes:
    """A document with damage, or with another value in the place of one."""
    if rng.random() < 0.5:
        return change_raw(rng, text, other)
    values = list(re.finditer(rb'"[^"]*"|[\d.e-]+|true|null', text))
    place = rng.choice(values)
    odd = (b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b'"\\ud800"', b'"../a"', b'"\xff"', other)
    return text[: place.start()] + rng.choice(odd) + text[place.end() :]


def change_bytes(rng: random.Random, blob: bytes) -> bytes:
    """Flips, sets or zeroes a few bytes, half of them in the headers of a zip file."""
    changed = bytearray(blob)
    headers = [match.start() for match in re.finditer(rb"PK[\x01\x03\x05-\x07]", blob)]
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(blob))
        if headers and rng.random() < 0.5:
            place = min(rng.choice(headers) + rng.randrange(60), len(blob) - 1)
        changed[place] = rng.choice((changed[place] ^ 1 << rng.randrange(8), rng.randrange(256), 0))
    return bytes(changed)


def change_raw(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """A file with damage: changed, cut, repeated or foreign parts."""
    low, high = sorted(rng.randrange(len(blob)) for _ in range(2))
    match rng.randrange(8):
        case 0 | 1 | 2:
            return change_bytes(rng, blob)
        case 3:
            return blob[:low]
        case 4:
            return blob[:low] + blob[high:]
        case 5:
            return blob[:high] + blob[low:]
        case 6:
            return blob[:low] + other[rng.randrange(len(other)) :]
    fill = rng.choice((b"\x00", b"\xff", b"PK\x01\x02", b"PK\x05\x06"))
    return (blob[:low] + fill * (high - low))[:high] + blob[high:]


def opcodes(pickle: bytes) -> list[bytes]:
    """The pickle in pieces of one opcode and its argument."""
    places = [place for _, _, place in pickletools.genops(pickle)] + [len(pickle)]
    return [pickle[a:b] for a, b in itertools.pairwise(places)]


def change_pickle(rng: random.Random, pickle: bytes, other: bytes) -> bytes:
    """A pickle with changed, moved, foreign or hostile opcodes."""
    if rng.random() < 0.15:
        return change_bytes(rng, pickle)
    pieces, foreign = opcodes(pickle), opcodes(other)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(pieces))
        run = slice(place, place + rng.choice((1, 1, 2, 5, 20)))
        start = rng.randrange(len(foreign))
        numeric = [i for i, piece in enumerate(pieces) if piece[:1] in b"KMJ\x8a"]
        match rng.randrange(13):
            case 0:
                del pieces[run]
            case 1:
                pieces[place:place] = pieces[run]
            case 2:
                pieces[run] = foreign[start : start + rng.randrange(1, 30)]
            case 3:
                pieces[place:place] = foreign[start : start + rng.randrange(1, 30)]
            case 4:
                pieces[place] = rng.choice(HOSTILE)
            case 5:
                pieces.insert(place, rng.choice(HOSTILE))
            case 6:
                pieces[place] = pieces[rng.randrange(len(pieces))]
            case 7 | 8 if numeric:  # shapes, strides, offsets, counts
                value = rng.choice((*NUMBERS, rng.randrange(64), rng.randrange(1 << 20)))
                pieces[rng.choice(numeric)] = number(value)
            case _:  # two names, numbers or keys of storages change places
                alike = [i for i, piece in enumerate(pieces) if piece[0] == pieces[place][0]]
                twin = rng.choice(alike)
                pieces[place], pieces[twin] = pieces[twin], pieces[place]
        pieces = pieces or [b"."]
    return b"".join(pieces)


def records_of(blob: bytes) -> dict[str, bytes]:
    """The files of a PyTorch zip file, by name within its one folder."""
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def change_records(rng: random.Random, records: dict[str, bytes], whole: bytes) -> None:
    """Resizes, drops, renames or nests records; the checksums will be right all the same."""
    name = rng.choice(sorted(records))
    match rng.randrange(6):
        case 0:
            records[name] = records[name][: rng.randrange(len(records[name]) + 1)]
        case 1:
            records[name] += bytes(rng.randrange(1, 64))
        case 2:
            del records[name]
        case 3:
            records[
                rng.choice(("data/../data.pkl", "constants.pkl", "code/a.py", "x/data.pkl"))
            ] = b"N."
        case 4:
            records[name] = whole
        case 5:
            records["byteorder"] = rng.choice((b"big", b"", b"middle", b"little\n", bytes(100)))


def change_archive(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """A sound zip file whose pickle, and now and then another record, is not what it was."""
    records = records_of(blob)
    if rng.random() < 0.9:
        pickle = change_pickle(rng, records["data.pkl"], records_of(other)["data.pkl"])
        records["data.pkl"] = pickle
    if rng.random() < 0.2:
        change_records(rng, records, blob)
    return zipped(records, rng.choice((*["archive"] * 20, "a/b", "", "data.pkl")))


Mutation = Callable[[random.Random, bytes, bytes], bytes]
