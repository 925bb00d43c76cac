"""Damages and attacks on weight files: changed bytes, changed pickles, hostile opcodes."""

import functools
import io
import itertools
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from torch_file_writer import write_zip

MARKER = Path("/tmp/pwned_flowturbo")  # what an attack that ran would have left
FORBIDDEN = (
    "os system",
    "posix system",
    "subprocess Popen",
    "builtins eval",
    "builtins exec",
    "builtins getattr",
    "builtins __import__",
    "__builtin__ open",
    "functools partial",
    "operator attrgetter",
    "importlib import_module",
    "torch.storage _load_from_bytes",
    "torch._utils _rebuild_from_type_v2",
    "torch load",
    "numpy load",
    "numpy.core.multiarray fromfile",
    "collections namedtuple",
    "pathlib Path",
    "flowturbo_jax.weights.files open_weights",
    "torch FloatStorage.__init__",
    "argparse Namespace.__init__",
    "collections OrderedDict.__class__",
    "os\\x20system x",
)
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
DEEP = 100_000


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def attack(name: str) -> bytes:
    """Opcodes that would make an unpickler call a function to create the marker."""
    call = text(f"touch {MARKER}") + b"\x85R"
    return f"c{name.replace(' ', chr(10))}\n".encode() + call


def attack_from_stack(name: str) -> bytes:
    module, function = name.split(" ", 1)
    return text(module) + text(function) + b"\x93" + text(f"touch {MARKER}") + b"\x85R"


def colliding_keys() -> bytes:
    """A dict of integers that all have one hash."""
    return b"}(" + b"".join(number(k * (2**61 - 1)) + b"N" for k in range(1, 45_000)) + b"u"


@functools.cache
def clustered(bits: int = 18, run: int = 150_000, count: int = 30_000) -> list[int]:
    """Numbers that each try tens of thousands of places before a dict has room for them.

    The first ones fill places in the order in which a dict of 2**bits places tries them
    (CPython, Objects/dictobject.c: 5 i + perturb + 1); the others meet that run and follow it.
    """
    mask = (1 << bits) - 1
    taken, order = np.zeros(mask + 1, bool), [1]
    while len(order) < run:
        order.append((5 * order[-1] + 1) & mask)
    taken[order] = True
    keys = places = perturb = np.arange(1 << bits, 1 << (bits + 5))
    places = places & mask
    while len(keys) and perturb.any():
        inside = taken[places]
        keys, perturb, places = keys[inside], perturb[inside] >> 5, places[inside]
        places = (5 * places + perturb + 1) & mask
    return [*order, *keys[:count].tolist()]


def clustered_keys() -> bytes:
    body = [number(key) + b"N" for key in clustered()]
    parts = (body[i : i + 40_000] for i in range(0, len(body), 40_000))
    chunks = (b"(" + b"".join(part) + b"u" for part in parts)
    return b"}" + b"".join(chunks)


def clustered_memo() -> bytes:
    return b"N" + b"".join(b"r" + struct.pack("<I", key) for key in clustered())


HOSTILE: tuple[bytes, ...] = (
    b"(" * DEEP,
    b"]" * DEEP + b"a" * (DEEP - 1),
    b")" + b"\x85" * DEEP,
    b"}" + b")" + b"\x85" * DEEP + b"Ns",  # a nested tuple as a key
    b"\x8f(" + b")" + b"\x85" * DEEP + b"\x90",  # and as a member of a set
    b"}" + b"K\x00}" * DEEP + b"s" * DEEP,
    b"".join(b"]r" + struct.pack("<I", i + 500) for i in range(DEEP // 5)) + b"a" * (DEEP // 5 - 1),
    b"]q\x00h\x00a",  # contains itself
    b"](K\x01e" + b"q\x00h\x00h\x00\x86" * 70,  # two to the power of 70 paths
    b"Nr\xff\xff\xff\xff0",
    b"Nr\xff\xff\xff\x7f",
    b"j\xff\xff\xff\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8b\x00\x00\x00\x80",
    b"\x8a\xff" + b"\x7f" * 255,
    b"\x8d" + struct.pack("<Q", 2**63 - 1),
    b"\x8d" + struct.pack("<Q", 2**40) + b"abc",
    b"\x8e" + struct.pack("<Q", 2**63),
    b"\x96" + struct.pack("<Q", 2**40),
    b"\x95" + struct.pack("<Q", 2**64 - 1),
    b"X\xff\xff\xff\xff",
    b"X\x02\x00\x00\x00\xff\xfe",
    b"X\x03\x00\x00\x00\xed\xa0\x80",  # half a surrogate pair
    text("x" * 300_000),
    text("_orig_mod." * 20_000) + b"Ns",
    b"S'\\z\\q'\n",
    b"V\\ud800\n",
    b"I" + b"9" * 5000 + b"\n",
    b"L" + b"9" * 5000 + b"L\n",
    b"F1e999\n",
    b"P0\n",
    b"iposix\nsystem\n",
    b"(cposix\nsystem\nX\x02\x00\x00\x00lso",
    b"\x82\x01",
    b"\x84\x01\x00\x00\x00",
    b"\x97\x98",
    b"\x80\x06",
    b"0",
    b"2",
    b"NQ",
    b")Q",
    b"}b",
    b"NNb",
    b"R",
    b"\x81",
    b"ccollections\nOrderedDict\n)R" * 20_000,
    b"c__builtin__\nset\nq\x00](" + b"K\x01" * 9_000 + b"eq\x01" + b"h\x00h\x01\x85R0" * 5_000,
    b"cargparse\nNamespace\n)\x81}b}b",
    b"\x8f" * 400_000,
    b"}" * 90_000,
    colliding_keys(),
    clustered_keys(),
    clustered_memo(),
    *(attack(name) for name in FORBIDDEN),
    *(attack_from_stack(name) for name in FORBIDDEN),
)


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
    buffer = io.BytesIO()
    write_zip(buffer, records, rng.choice((*["archive"] * 20, "a/b", "", "data.pkl")))
    return buffer.getvalue()


Mutation = Callable[[random.Random, bytes, bytes], bytes]
