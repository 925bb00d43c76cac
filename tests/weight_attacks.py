"""Attacks on readers of weight files: hostile opcodes, and whole files made to mislead."""

import functools
import io
import struct
from pathlib import Path

import numpy as np
from torch_file_writer import Pickler, Raw, View, write_zip

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
    parts = (body[i : i + 5_000] for i in range(0, len(body), 5_000))
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


def hostile_archives() -> list[bytes]:
    """Sound zip files whose description multiplies what little they hold."""
    flat = np.zeros(100_000, np.float32)
    pickler = Pickler()
    name, tensor = pickler.value("w"), pickler.value(View(flat, flat.shape, (1,)))
    names = b"".join(text(f"w{i}") + b"h\x00" for i in range(20_000))
    memoised = b"\x80\x02}(" + name + tensor + b"q\x00" + names + b"u."
    storage = Raw(pickler.name("torch", "FloatStorage"))
    described = pickler.value(("storage", storage, "0", "cpu", flat.size))
    renamed = b"\x80\x02](" + described + b"q\x00Q" + b"h\x00Q" * 60_000 + b"e."
    scattered = {f"w{i}": View(flat, (2,), (flat.size - 1,)) for i in range(5_000)}
    records = [
        ({"data.pkl": memoised}, "a"),
        ({"data.pkl": renamed}, "a"),
        ({"data.pkl": renamed}, "a" * 60_000),
        ({"data.pkl": pickler.dump(scattered)}, "a"),
        ({"data.pkl": b"\x80\x02N."} | {f"data/{i}": b"" for i in range(1, 20_000)}, "a"),
    ]
    return [zipped({"data/0": flat.tobytes(), **each}, prefix) for each, prefix in records]


def zipped(records: dict[str, bytes], prefix: str) -> bytes:
    buffer = io.BytesIO()
    write_zip(buffer, records, prefix)
    return buffer.getvalue()


def hostile_json() -> list[bytes]:
    long = b"a" * 1_000_000
    return [
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b"[" + b"{}," * 1_300_000 + b"{}]",
        b'{"weight_map":{"a":"' + long + b'!"}}',
        b'{"weight_map":{"' + long + b'":"plain.pt"}}',
        b'{"weight_map":{"\\ud800":"plain.pt"}}',
        b'{"weight_map":{"\\u001b[2J":"\\ud800"}}',
        b'{"weight_map":{"a":"../../etc/passwd","b":null}}',
        b'{"weight_map":{' + b",".join(b'"%d":"%d.pt"' % (i, i) for i in range(90_000)) + b"}}",
        b'{"weight_map":[["a","plain.pt"]],"a":' + b"9" * 100_000 + b"}",
        b'{"weight_map":NaN,"a":1e999}',
    ]
