"""The pickle machine: plain values as Python writes them, nothing by name, bounded work."""

import argparse
import collections
import pathlib
import pickle
import re
import struct
import time

import numpy as np
import pytest
import weight_attacks

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import pickled_values, restricted_pickle
from flowturbo_jax.weights.pickled_values import Inert, Namespace
from flowturbo_jax.weights.restricted_pickle import load

PROTOCOLS = (2, 3, 4, 5)
SHARED = {"lr": 1e-3}
PLAIN_VALUES = [
    *(None, True, False, 0, 255, 256, -1, 2**31 - 1, -(2**31), 2**40, -(2**63), 2**64 - 1),
    *(0.1, -0.0, float("inf"), "", "é ß", "x" * 300, b"", b"\x00\xff", b"y" * 300),
    *([], [1], list(range(3000)), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": 1}),
    *({i: str(i) for i in range(3000)}, set(), {1, 2}, {None: 1, 2.5: True, False: ()}),
    [SHARED, SHARED, ("betas", [SHARED])],
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_what_python_wrote(protocol):
    for value in PLAIN_VALUES:
        loaded = load(pickle.dumps(value, protocol))
        assert loaded == value
        assert type(loaded) is type(value)
        assert repr(loaded) == repr(value)  # tells True from 1, and -0.0 from 0.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_stay_shared(protocol):
    first, second, _ = load(pickle.dumps([SHARED, SHARED, None], protocol))
    assert first is second


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_known_classes_become_plain_containers(protocol):
    ordered = collections.OrderedDict(b=1, a=2)
    ordered._metadata = {"": {"version": 2}}
    loaded = load(pickle.dumps(ordered, protocol))
    assert type(loaded) is dict
    assert list(loaded.items()) == [("b", 1), ("a", 2)]
    assert load(pickle.dumps(frozenset({1, 2}), protocol)) == {1, 2}

    fields = {"seed": 0, "__dict__": "no attribute of ours", "items": [1]}
    record = load(pickle.dumps(namespace(fields), protocol))
    assert type(record) is Namespace
    assert record.fields == fields
    assert load(pickle.dumps(argparse.Namespace(), protocol)).fields in (None, {})


def namespace(fields: dict) -> argparse.Namespace:
    made = argparse.Namespace()
    vars(made).update(fields)
    return made


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_other_names_are_refused_and_not_run(protocol, tmp_path):
    target = tmp_path / "ran"
    for call in ((open, (str(target), "w")), (eval, (f"open({str(target)!r}, 'w')",))):
        with pytest.raises(InputError, match=rf"asks for '\w+\.{call[0].__name__}'"):
            load(pickle.dumps({"args": Evil(*call)}, protocol))
    assert not target.exists()


@pytest.mark.parametrize("name", ["os\nsystem", "collections\nOrderedDict.fromkeys", "os\\x20x\ny"])
def test_a_name_alone_is_refused_even_uncalled(name):
    with pytest.raises(InputError, match="asks for"):
        load(b"\x80\x02c" + name.encode() + b"\n.")


def test_a_call_runs_only_what_the_caller_allowed():
    made = load(b"\x80\x02cm\nf\nK\x01\x85R.", {"m.f": lambda arguments: ("ours", arguments)})
    assert made == ("ours", (1,))
    assert load(b"\x80\x02cm\nx\n.", {"m.x": 5}) == 5
    with pytest.raises(InputError, match="wants a Global"):
        load(b"\x80\x02cm\nx\n)R.", {"m.x": 5})


def nested(depth: int) -> bytes:
    return b"\x80\x02)" + b"\x85" * (depth - 1) + b"."


def test_nesting_ends_at_the_limit():
    load(nested(pickled_values.MAX_DEPTH))
    for depth in (pickled_values.MAX_DEPTH + 1, 40_000):
        with pytest.raises(InputError, match="nests containers more than 100 deep"):
            load(nested(depth))


def test_nesting_built_from_the_outside_is_seen_too():
    # Each list goes into the one before while it is still empty.
    lists = b"".join(b"]q" + bytes([i]) for i in range(200))
    with pytest.raises(InputError, match="nests containers"):
        load(b"\x80\x02" + lists + b"a" * 199 + b".")


def test_shared_containers_do_not_multiply_the_work():
    doubling = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(90))  # 2**90 paths
    assert isinstance(load(b"\x80\x02]q\x00" + doubling + b"."), list)


def test_a_container_inside_itself_is_refused():
    for opcodes in (b"]q\x00h\x00a", b"}q\x00K\x01h\x00s", b"]q\x00h\x00\x85a"):
        with pytest.raises(InputError, match="contains itself"):
            load(b"\x80\x02" + opcodes + b".")


@pytest.mark.parametrize("key", [b")", b"]", b"}", b"K\x01\x85", b")" + b"\x85" * 20_000, b"\x8f"])
def test_only_plain_values_are_keys_and_members(key):
    for opcodes in (b"}" + key + b"Ns", b"\x8f(" + key + b"\x90", b"(" + key + b"\x91"):
        with pytest.raises(InputError, match="as a key; wanted are strings and numbers"):
            load(b"\x80\x02" + opcodes + b".")


def test_memo_indices_and_lengths_cost_no_memory():
    assert load(b"\x80\x02K\x05q\x00K\x06r\x00\x00\x00\x00h\x00\x87.") == (5, 6, 6)
    for opcodes in (b"Nr\xff\xff\xff\xff", b"Nq\x01", b"Nq\x00q\x02"):
        with pytest.raises(InputError, match="does not number its memo from 0 on"):
            load(b"\x80\x02" + opcodes + b".")
    for opcodes in (
        b"X\xff\xff\xff\xffabc",
        b"\x8d" + struct.pack("<Q", 2**62) + b"abc",
        b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
        b"\x8b\xff\xff\xff\x7f",
    ):
        with pytest.raises(InputError, match="damaged at a"):
            load(b"\x80\x02" + opcodes + b".")


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"\x8a\x09" + b"\xff" * 8 + b"\x7f.", "integer of more than 64 bits"),
        (b"X\x00\x00\x10\x00" + b"x" * (1 << 20) + b".", "a string of 1048576 characters"),
        (b"N" * 100_001 + b".", "more values waiting"),
        (b"(" * 5_000 + b".", "more values waiting"),
        (b"I1\n.", "the opcode b'I'"),
        (b"P1\n.", "the opcode b'P'"),
        (b"S'a'\n.", "the opcode b'S'"),
        (b"0.", "the opcode b'0'"),
        (b"\xff.", r"the opcode b'\\xff'"),
        (b"X\x01\x00\x00\x00\xff.", "damaged at a BINUNICODE opcode"),
        (b"cposix", "damaged at a GLOBAL opcode"),
        (b"c" + b"a" * 5000 + b"\nb\n.", "damaged at a GLOBAL opcode"),
        (b"cposix\n\xff\n.", "damaged at a GLOBAL opcode"),
        (b".", "lacks its operand"),
        (b"N(.", "lacks its operand"),
        (b"K\x01(a.", "lacks its operand"),
        (b"e.", "lacks its mark"),
        (b"}(K\x01u.", "a key has no value"),
        (b"h\x07.", "recalls what it never stored"),
        (b"NNa.", "wants a list"),
        (b"]K\x01K\x02s.", "wants a dict"),
        (b"NR.", "wants a tuple"),
        (b")NR.", "wants a tuple"),
        (b"N)R.", "wants a Global"),
        (b"]}b.", "attributes of a plain value"),
        (b"cargparse\nNamespace\n)\x81}b}b.", "attributes of a plain value"),
        (b"cargparse\nNamespace\nK\x01\x85\x81.", "is made of something"),
        (b"cbuiltins\nset\nK\x01\x85R.", "something else than a list"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "latin-1"),
        (b"X\x01\x00\x00\x00aQ.", "refers to data outside"),
        (b"N", "ends too early"),
    ],
)
def test_damage_is_refused(opcodes, message):
    with pytest.raises(InputError, match=message):
        load(b"\x80\x02" + opcodes)


def test_other_protocols_are_refused():
    for protocol in (0, 1, 6):
        with pytest.raises(InputError, match=f"protocol {protocol}"):
            load(b"\x80" + bytes([protocol]) + b"N.")


def test_a_large_description_is_refused_unread():
    with pytest.raises(InputError, match="at most 16777216 are read"):
        load(bytes(restricted_pickle.MAX_BYTES + 1))


def test_too_many_numbers_are_not_hashed(monkeypatch):
    limit = 1000
    monkeypatch.setattr(pickled_values, "MAX_COUNTED_KEYS", limit)
    body = b"(" + b"".join(b"M%cXN" % (i % 251) for i in range(2 * limit)) + b"u"
    load(b"\x80\x02}" + body[: 1 + 4 * limit] + b"u.")
    load(pickle.dumps({str(i): i for i in range(2 * limit)}, 2))
    members = b"(" + b"K\x01" * limit + b"\x90"
    for opcodes in (
        b"}" + body,
        b"}" + body[: 1 + 4 * limit] + b"uG?\xf0\x00\x00\x00\x00\x00\x00Ns",
        b"\x8f" + members + b"(K\x02\x90",
        b"\x8f" + members + b"](cbuiltins\nset\n](K\x02e\x85Re\x86",
        b"\x8f" + members + b"(K\x02\x91\x86",
    ):
        with pytest.raises(InputError, match="over 1000 numbers as keys or members of sets"):
            load(b"\x80\x02" + opcodes + b".")


def test_keys_that_are_slow_to_insert_are_refused_soon():
    for opcodes in (weight_attacks.clustered_keys(), weight_attacks.clustered_memo()):
        start = time.monotonic()
        with pytest.raises(InputError, match=r"over 10000 numbers|from 0 on"):
            load(b"\x80\x02" + opcodes + b".")
        assert (
            time.monotonic() - start < 4
        )  # 0.1 s without type checks; all of the keys take 8 s more


BESIDE = [
    (collections.Counter([1, 2, 2]), "collections.Counter"),
    (collections.defaultdict(list, a=[1]), "collections.defaultdict"),
    (pathlib.PurePosixPath("/a/b"), r"pathlib\.(_local\.)?PurePosixPath"),
    (1j, "builtins.complex"),
    (bytearray(b"abc"), "builtins.bytearray"),
    (np.float64(0.5), "numpy._core.multiarray.scalar"),
    (np.dtype("int64"), "numpy.dtype"),
    (np.arange(3), "numpy._core.multiarray._reconstruct"),
]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_objects_beside_the_weights_become_their_name(protocol):
    for value, name in BESIDE:
        loaded = load(pickle.dumps({"before": 1, "it": value, "after": [2]}, protocol))
        assert (loaded["before"], loaded["after"]) == (1, [2])
        assert type(loaded["it"]) is Inert
        assert re.fullmatch(name, loaded["it"].name)
    older = pickle.dumps(np.float64(0.5), 2).replace(b"numpy._core.", b"numpy.core.")
    assert load(older).name == "numpy.core.multiarray.scalar"


def test_names_that_are_only_arguments_are_not_called():
    for name in ("builtins\nlist", "numpy\nndarray"):
        assert type(load(f"\x80\x02c{name}\n.".encode("latin-1"))) is Inert
        with pytest.raises(InputError, match="wants a Global"):
            load(f"\x80\x02c{name}\n)R.".encode("latin-1"))


def test_protocols_without_a_header_are_named():
    for protocol in (0, 1):
        with pytest.raises(InputError, match=r"of protocol 0 or 1, not 2 to 5.*torch\.save\("):
            load(pickle.dumps({"a": 1}, protocol))


def test_work_is_bounded(monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MAX_STEPS", 5_000)
    load(b"\x80\x02]" + b"Na" * 2_000 + b".")
    members = b"](" + b"K\x01" * 500 + b"eq\x01"
    for opcodes in (
        b"]" + b"Na" * 2_600,
        b"](" + b"\x8f" * 1_100 + b"e",  # a set takes more memory than its opcode lets expect
        b"cbuiltins\nset\nq\x00" + members + b"](" + b"h\x00h\x01\x85R" * 20 + b"e",  # copies
    ):
        with pytest.raises(InputError, match="more than 5000 steps"):
            load(b"\x80\x02" + opcodes + b".")
