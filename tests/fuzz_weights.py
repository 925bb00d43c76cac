"""Opens thousands of damaged and hostile weight files and checks that none does harm.

    python tests/fuzz_weights.py --count 2000 --seed 0
    python tests/fuzz_weights.py --seed 0 --only 1234   # one file again, with its traceback

Every file must be refused with one line, or be opened and be right. A checksum guards each record
of a PyTorch file, so there right means: as before the damage. A safetensors file has none for its
numbers; changed ones cannot be told, and only names, shapes and dtypes have to hold together.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # works from a checkout that is not installed

import torch_file_writer as writer
from weight_attacks import HOSTILE, MARKER, hostile_archives, hostile_json
from weight_mutations import change_archive, change_json, change_raw

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import open_weights
from flowturbo_jax.weights.json_file import read_json

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
SECONDS = 5  # for one file
SHARD = "plain.pt"
MEMORY = 512 << 20  # bytes beyond those taken at the start
MESSAGE = 1000  # characters
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SAFETENSORS, MALICIOUS = "small.safetensors", "malicious_args.pt"


class TooSlowError(BaseException):
    """Not an Exception, so that no handler takes it for a damaged file."""


class Outcome(NamedTuple):
    """What became of one file: `loaded`, `refused`, or what is wrong."""

    kind: str
    detail: str = ""


class Watch:
    """Notes what the interpreter reports while a file is read: imports, calls, files written."""

    PREFIXES = (
        *("exec", "compile", "import", "marshal.", "pickle.", "code.", "ctypes.", "os.", "pty."),
        *("subprocess.", "socket.", "shutil.", "tempfile.", "glob.", "sys.", "gc.", "winreg."),
    )

    def __init__(self):
        self.active = False
        self.events: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple) -> None:
        if not self.active:
            return
        writes = event == "open" and args[2] & WRITING  # os.open gives no mode, only flags
        if writes or event.startswith(self.PREFIXES):
            self.events.append(f"{event} {args!r:.100}")


def make_seeds(folder: Path) -> dict[str, bytes]:
    """Small files of every form, and the golden ones."""
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(48).astype(np.float32)
    half = rng.standard_normal(12).astype(ml_dtypes.bfloat16)
    plain = {
        "w": flat.reshape(6, 8),
        "b": flat[:6].copy(),
        "n": np.array(7),
        "empty": np.zeros((0, 3), np.float16),
        "mask": np.array([True, False]),
    }
    views = {
        "module.block.weight": writer.Parameter(writer.View(flat, (4, 3), (1, 4), 5)),
        "module.block.bias": writer.View(flat, (4,), (1,), 44, "cuda:0"),
        "module._orig_mod.scale": writer.View(half, (3, 4), (4, 1)),
        "module.wide": writer.View(half, (5, 12), (0, 1)),
    }
    training = {
        "model": writer.Ordered(views, {"": {"version": 1}}),
        "ema": writer.Ordered({**views, "module.block.bias": flat[:4].copy()}),
        "opt": {"state": {0: {"step": np.array(3.0), "exp_avg": flat.copy()}}, "param_groups": []},
        "args": writer.Namespace({"lr": 1e-4, "sizes": (1, 2), "name": "tiny", "device": None}),
    }
    writer.save(folder / "plain.pt", plain)
    writer.save(folder / "training.pt", training)
    writer.save(folder / "protocol4.pt", training, protocol=4)
    save_file({k: v for k, v in plain.items() if k != "n"} | {"half": half}, folder / SAFETENSORS)
    seeds = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return seeds | {path.name: path.read_bytes() for path in sorted(GOLDEN.glob("edge/*.pt"))}


def read(path: Path, which: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in open_weights(path, which).tensors.items()}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    """Whether names, shapes, dtypes and bits are the same."""

    def content(arrays: dict[str, np.ndarray]) -> dict:
        return {name: (a.shape, a.dtype.name, a.tobytes()) for name, a in arrays.items()}

    return content(found) == content(wanted)


def make_documents() -> list[bytes]:
    """The index of a model of one shard, and a configuration."""
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys("wb", SHARD)}
    config = {"_class_name": "VAE", "channels": [128, 256], "eps": 1e-6, "on": True, "act": None}
    return [json.dumps(document).encode() for document in (index, config)]


class Fuzzer:
    """Makes the file of a number, opens it, and judges what happened."""

    def __init__(self, folder: Path, seed: int):
        self.seed = seed
        self.path = folder / "mutant"
        self.document = folder / "mutant.index.json"
        self.seeds = make_seeds(folder)
        self.documents = make_documents()
        self.attacks = [
            *(("pickle", blob) for blob in hostile_archives()),
            *(("json", blob) for blob in hostile_json()),
        ]
        self.watch = Watch()
        # Doing everything once also loads what Python loads at first use.
        self.intact = [
            read(self.write(blob), which)
            for name, blob in self.seeds.items()
            if name != MALICIOUS
            for which in ("ema", "model")
        ]
        for content in self.documents:
            self.document.write_bytes(content)
            read_json(self.document)
        signal.signal(signal.SIGALRM, self.too_slow)

    def too_slow(self, *_):
        raise TooSlowError

    def write(self, blob: bytes) -> Path:
        self.path.write_bytes(blob)
        return self.path

    def mutant(self, number: int) -> tuple[str, bytes, str]:
        """The kind of change, the file, and which weights to ask for."""
        rng = random.Random(f"{self.seed}/{number}")
        names = sorted(self.seeds)
        weights = [1 if name == MALICIOUS else 4 for name in names]  # it is refused in any form
        name, other = rng.choices(names, weights, k=2)
        which = rng.choice(("ema", "model"))
        if number - 2 * len(HOSTILE) in range(len(self.attacks)):
            return *self.attacks[number - 2 * len(HOSTILE)], which
        if number >= 2 * len(HOSTILE) + len(self.attacks) and rng.random() < 0.1:
            return "json", change_json(rng, *rng.choices(self.documents, k=2)), which
        if number < len(HOSTILE) * 2:  # each alone in a file, as a value and as the whole
            pickle = b"\x80\x02}" + HOSTILE[number // 2] + (b"." if number % 2 else b"s.")
            writer.save(self.path, None, **{"data.pkl": pickle})
            return "pickle", self.path.read_bytes(), which
        if name == SAFETENSORS or rng.random() < 0.4:
            changed = change_raw(rng, self.seeds[name], self.seeds[other])
            return ("numbers" if SAFETENSORS in (name, other) else "raw"), changed, which
        other = name if other == SAFETENSORS else other
        return "pickle", change_archive(rng, self.seeds[name], self.seeds[other]), which

    def open(self, number: int) -> Outcome:
        kind, blob, which = self.mutant(number)
        (self.document if kind == "json" else self.path).write_bytes(blob)
        self.watch.events.clear()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self.watch.active = True
        try:
            judge = self.judge_json if kind == "json" else self.judge
            outcome = judge(kind, len(blob), which)
        except InputError as error:
            message = str(error)
            clear = "\n" not in message and message.isprintable() and len(message) < MESSAGE
            outcome = Outcome("refused" if clear else "unclear message", repr(message))
        except (Exception, TooSlowError):  # noqa: BLE001  (whatever it is, it is a finding)
            self.watch.active = False  # formatting reads source files
            outcome = Outcome("raised", traceback.format_exc())
        finally:
            self.watch.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.watch.events:
            return Outcome("did something", "; ".join(self.watch.events))
        return outcome

    def judge(self, kind: str, size: int, which: str) -> Outcome:
        weights = open_weights(self.path, which)
        arrays, total = {}, 0
        for name, tensor in weights.tensors.items():
            array = np.asarray(tensor)
            total += array.nbytes
            if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
                return Outcome(
                    "wrong", f"{name!r} is not of the shape and dtype it is said to have"
                )
            if total > 4 * size + (64 << 20):
                return Outcome("wrong", f"{total} bytes of tensors in a file of {size}")
            if kind == "raw":
                arrays[name] = array
        if kind == "raw" and not any(same(arrays, intact) for intact in self.intact):
            return Outcome("wrong", "the tensors are not those of the file before its damage")
        return Outcome("loaded")

    def judge_json(self, kind: str, size: int, which: str) -> Outcome:
        if type(read_json(self.document)) is not dict:
            return Outcome("wrong", "no object")
        open_weights(self.document, which)
        return Outcome("loaded")


def say(line: str) -> None:
    """Writes at once: the last line counts most when a file ends the interpreter."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one file")
    options = parser.parse_args(argv)
    numbers = range(options.count) if options.only is None else [options.only]
    if MARKER.exists():
        say(f"{MARKER} exists already; remove it")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), options.seed)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        start, tally, findings, slowest = time.monotonic(), {}, 0, (0.0, -1)
        for number in numbers:
            before = time.monotonic()
            kind, detail = fuzzer.open(number)
            slowest = max(slowest, (time.monotonic() - before, number))
            tally[kind] = tally.get(kind, 0) + 1
            if kind not in ("loaded", "refused") or options.only is not None:
                findings += kind not in ("loaded", "refused")
                say(f"file {number}: {kind} {detail}")
            if MARKER.exists():
                say(f"file {number}: it ran a command")
                return 1
        seconds = time.monotonic() - start
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.items()))
    say(
        f"{len(numbers)} files in {seconds:.1f} s, slowest {slowest[0]:.2f} s (file {slowest[1]}): "
        f"{counts}; {findings} findings"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
