"""Pickles without unpickling: a small machine that can build plain values and nothing else.

It takes the opcodes that protocols 2 to 5 write and their argument formats from `pickletools`.
A name in the file never leads to an import or a call: it is looked up in an allow list of our
own functions. Time, memory and nesting are bounded, whatever the file holds.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.kinds import RESAVE
from flowturbo_jax.weights.pickled_values import BESIDE, PLAIN, Inert, Keys, Namespace, check_depth
from flowturbo_jax.weights.tensor import quoted

# A training checkpoint (model, moving average, AdamW's state) was measured to take 230 steps and
# 460 bytes for each of the model's tensors; image models have about 1,000 of them at most.
MAX_BYTES = 16 << 20
MAX_STEPS = 2_000_000  # opcodes, and elements or characters that a REDUCE could copy
SET_STEPS = 4  # an empty set takes four times the memory of an empty list
PERSISTENT_STEPS = 4  # a storage is looked up, and compared with what was said of it before
MAX_STACK = 100_000
MAX_MARKS = 1_000
MAX_STRING = 1 << 18
MAX_NAME = 1 << 10
INTEGERS = range(-(1 << 63), 1 << 64)  # wider ones can be made to share one hash by the thousand


class Global(NamedTuple):
    """An allowed name on the stack, with the function of ours that it stands for."""

    name: str
    make: Callable[[tuple], Any]


def load(
    data: bytes | bytearray,
    allowed: Mapping[str, Any] = MappingProxyType({}),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Builds the value that a pickle describes.

    Args:
      data: the pickle, protocol 2 to 5.
      allowed: what dotted names stand for, in addition to `PLAIN` and `BESIDE`: a function of the
        argument tuple, or the value itself. It is to raise InputError for arguments it does not
        know.
      persistent: makes a value of a persistent id; without it such ids are refused.

    Returns:
      A tree of dicts, lists, tuples, sets, plain values, `Namespace`s, `Inert`s, and what
      `allowed` and `persistent` returned; without cycles, at most `MAX_DEPTH` deep. The same
      container may occur many times in it: a walk over all paths could take for ever.

    Raises:
      InputError: the pickle is damaged, too large, or names something that is not allowed.
    """
    if len(data) > MAX_BYTES:
        raise InputError(f"its pickle takes {len(data)} bytes; at most {MAX_BYTES} are read")
    if data and data[:1] != b"\x80":
        raise InputError(f"its pickle is of protocol 0 or 1, not 2 to 5; save it anew: {RESAVE}")
    machine = _Machine({**PLAIN, **BESIDE, **allowed}, persistent)
    value = machine.run(io.BytesIO(data))
    check_depth(value)
    return value


class _Machine:
    """The stack, the marks on it, and the memo."""

    def __init__(self, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None):
        self.keys = keys = Keys()
        self.allowed = {**allowed, "builtins.set": keys.set_of, "builtins.frozenset": keys.set_of}
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack; what lies below the last is out of reach
        self.memo: list[Any] = []  # a dict's keys would be numbers that the file chooses
        self.steps = 0

    def run(self, stream: io.BytesIO) -> Any:
        while True:
            self.spend(1)
            name, argument = _next_opcode(stream)
            if name == "STOP":
                return self.pop()
            ACTIONS[name](self, argument)
            if len(self.stack) > MAX_STACK or len(self.marks) > MAX_MARKS:
                raise InputError("its pickle keeps more values waiting than weights need")

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise InputError(f"its pickle takes more than {MAX_STEPS} steps to read")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_set(self) -> None:
        self.spend(SET_STEPS)
        self.push(set())

    def top(self, kind: type | None = None) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise InputError("its pickle is damaged: a pickle opcode lacks its operand")
        if kind is not None and type(self.stack[-1]) is not kind:
            raise InputError(f"its pickle is damaged: a pickle opcode wants a {kind.__name__}")
        return self.stack[-1]

    def pop(self, kind: type | None = None) -> Any:
        value = self.top(kind)
        self.stack.pop()
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise InputError("its pickle is damaged: a pickle opcode lacks its mark")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def pop_many(self, count: int) -> tuple:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def number(self, value: int) -> None:
        if value not in INTEGERS:
            raise InputError("its pickle holds an integer of more than 64 bits")
        self.push(value)

    def text(self, value: str | bytes) -> None:
        if len(value) > MAX_STRING:
            raise InputError(f"its pickle holds a string of {len(value)} characters")
        self.push(value)

    def remember(self, index: int) -> None:
        if index > len(self.memo):
            raise InputError("its pickle is damaged: it does not number its memo from 0 on")
        self.memo[index : index + 1] = [self.top()]

    def recall(self, index: int) -> None:
        if index >= len(self.memo):
            raise InputError("its pickle is damaged: it recalls what it never stored")
        self.push(self.memo[index])

    def set_items(self, items: list[Any]) -> None:
        if type(self.top()) is Inert:
            return
        target = self.top(dict)
        if len(items) % 2:
            raise InputError("its pickle is damaged: a key has no value")
        for name, value in zip(items[::2], items[1::2], strict=True):
            target[self.keys.key(name)] = value

    def name(self, module: str, name: str) -> None:
        module = {"__builtin__": "builtins"}.get(module, module)  # as protocol 2 spells it
        dotted = f"{module}.{name}"
        if dotted not in self.allowed:
            raise InputError(
                f"its pickle asks for {quoted(dotted)}, which weights are not made of and which "
                "was not run; get a file that holds the state dict alone"
            )
        meaning = self.allowed[dotted]
        self.push(Global(dotted, meaning) if callable(meaning) else meaning)

    def call(self) -> None:
        arguments, function = self.pop(tuple), self.pop(Global)
        self.spend(len(arguments))
        for argument in arguments:
            if isinstance(argument, (str, bytes, list, tuple, dict)):
                self.spend(len(argument))
        self.push(function.make(arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is Namespace and target.fields is None and type(state) is dict:
            target.fields = state
        elif type(target) not in (dict, Inert):  # a dict has attributes, such as _metadata
            raise InputError("its pickle is damaged: it sets attributes of a plain value")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise InputError("its pickle refers to data outside of it")
        self.spend(PERSISTENT_STEPS)
        self.push(self.persistent(self.pop()))


def _next_opcode(stream: io.BytesIO) -> tuple[str, Any]:
    """The next opcode's name and argument; the argument of one unknown is not even read."""
    code = stream.read(1)
    if not code:
        raise InputError("its pickle ends too early: the file is cut short")
    if code not in OPCODES:
        raise InputError(f"its pickle holds the opcode {code!r}, which is not read")
    name, read = OPCODES[code]
    try:
        return name, read(stream) if read else None
    except ValueError:
        raise InputError(f"its pickle is damaged at a {name} opcode") from None


def _protocol(number: int) -> None:
    if number not in range(2, 6):
        raise InputError(f"its pickle is of protocol {number}; 2 to 5 are read")


def _append(machine: _Machine, items: list[Any]) -> None:
    machine.top(list).extend(items)


def _add(machine: _Machine, items: list[Any]) -> None:
    machine.top(set).update(map(machine.keys.member, items))


def _global_of_stack(machine: _Machine) -> None:
    name, module = machine.pop(str), machine.pop(str)
    machine.name(module, name)


def _two_lines(stream: io.BytesIO) -> tuple[str, str]:
    """The argument of GLOBAL; the reader of `pickletools` would interpret backslashes."""
    lines = [stream.readline(MAX_NAME) for _ in range(2)]
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("a name that does not end")
    module, name = (line[:-1].decode() for line in lines)
    return module, name


ACTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, number: _protocol(number),
    "FRAME": lambda machine, length: None,
    "STOP": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), _Machine.number),
    "BINFLOAT": _Machine.push,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.text),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _Machine.text),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push_set(),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(machine.pop_many(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop_many(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop_many(3)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "FROZENSET": lambda machine, _: machine.push(machine.keys.set_of((machine.pop_to_mark(),))),
    "APPEND": lambda machine, _: _append(machine, list(machine.pop_many(1))),
    "APPENDS": lambda machine, _: _append(machine, machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: _add(machine, machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(list(machine.pop_many(2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": lambda machine, names: machine.name(*names),
    "STACK_GLOBAL": lambda machine, _: _global_of_stack(machine),
    "BINPERSID": lambda machine, _: machine.persistent_id(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}
READERS = {"GLOBAL": _two_lines}
OPCODES = {
    opcode.code.encode("latin-1"): (
        opcode.name,
        READERS.get(opcode.name, opcode.arg.reader if opcode.arg else None),
    )
    for opcode in pickletools.opcodes
    if opcode.name in ACTIONS
}
