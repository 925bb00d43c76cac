r"""Measures the library's sampler beside the same sampler in PyTorch: same weights, noise and run.

  python benchmarks/torch_sit.py --size SiT-B/2 --schedules H1P5R3 --batch-sizes 4 \
      --out runs/torch_b.json
  python benchmarks/torch_sit.py --model models/sit-xl-2-256 --batch-sizes 1,8 --dtype bfloat16 \
      --decode --out runs/torch_xl.json

First both sample the same noise, and nothing is timed unless the final latents agree. Then they
take turns, the library in a process of its own, so that only one of them works at a time and a busy
minute of the machine meets both. ms/image is the median over the rounds, until results are on the
host and compilation left out; the ratio is that of the medians. Needs PyTorch, and diffusers for
--decode: pip install torch diffusers. What PyTorch runs is benchmarks/torch_peer.py.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]  # works from a checkout that is not installed

from benchmarks import turns  # noqa: E402
from benchmarks.jax_side import Asked  # noqa: E402
from flowturbo_jax.commands import entry, output_file  # noqa: E402
from flowturbo_jax.commands.progress import say  # noqa: E402
from flowturbo_jax.interfaces import InputError  # noqa: E402
from flowturbo_jax.model_directory import DTYPES  # noqa: E402
from flowturbo_jax.models import SiTConfig  # noqa: E402
from flowturbo_jax.schedule import Schedule  # noqa: E402

COMPILERS = {"cpu": ("CXX", "g++"), "cuda": ("CC", "gcc")}  # what torch.compile calls


def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures, and prints a table in Markdown."""
    args = _parser().parse_args(argv[1:])
    schedules, batch_sizes = _check(args)
    out = output_file.named(args.out)
    if importlib.util.find_spec("torch") is None:
        raise InputError("this measures PyTorch, which is not installed: pip install torch")
    notes = []
    decode = args.decode
    if decode and importlib.util.find_spec("diffusers") is None:
        decode = False
        notes.append("both sides sample latents and do not decode: diffusers is not installed")
    with (
        output_file.reserved(out),
        tempfile.TemporaryDirectory() as folder,
        Asked(folder=Path(folder), size=args.size, model=args.model, decode=decode) as library,
    ):
        facts = library("open")
        device = _device(facts["backend"], notes)
        compile_mode = _compile_mode(args.compile, device, notes)
        for note in notes:
            say(note)
        # torch.compile says so of diffusers, whose cached functions give the same each time.
        warnings.filterwarnings("ignore", message="Dynamo detected a call")
        setting = turns.Setting(facts["model"], device, args.dtype, compile_mode, decode)
        card = {
            "model": f"{args.size}, random weights" if args.size else Path(args.model).name,
            "weights_sha256": facts["sha256"],
            **turns.card(setting),
            "rounds": args.rounds,
            "notes": notes,
        }
        guidance = {"guidance": args.guidance, "guidance_scale": args.guidance_scale}
        jobs = [
            turns.job(library, schedule, batch_size, guidance)
            for batch_size in batch_sizes
            for schedule in schedules
        ]
        rows: list[dict[str, Any]] = []
        for row in turns.measure(library, setting, jobs, args.rounds):
            rows.append(row)
            if row["warnings"]:
                say(f"warning: {'; '.join(row['warnings'])}")
            output_file.replace(out, json.dumps({"card": card, "rows": rows}, indent=1) + "\n")
    sys.stdout.write(turns.table(rows) + "\n")


def _parser() -> entry.LineParser:
    parser = entry.LineParser(prog="python benchmarks/torch_sit.py", description=__doc__)
    add = parser.add_argument
    add("--size", help="random weights of a size, such as SiT-B/2, for 256 x 256 pixels")
    add("--model", help="a model directory, or the name of a shipped model, in place of --size")
    add("--schedules", default="H1P5R3", help="comma-separated, of H, P and R steps (H1P5R3)")
    add("--batch-sizes", default="4", help="comma-separated (4)")
    add("--dtype", default="float32", choices=list(DTYPES), help="of matrix products (float32)")
    add("--guidance", default="official", choices=["official", "paired"], help="(official)")
    add("--guidance-scale", type=float, default=1.5, help="(1.5)")
    add("--decode", action="store_true", help="to images, on PyTorch's side by diffusers")
    add("--rounds", type=int, default=5, help="turns of each side (5)")
    modes = ["default", "max-autotune", "none"]
    add("--compile", choices=modes, help="of PyTorch (max-autotune on a GPU, default on a CPU)")
    add("--out", required=True, help="JSON file of results, replaced if it exists")
    return parser


def _check(args: argparse.Namespace) -> tuple[list[Schedule], list[int]]:
    """The schedules and the batch sizes, after refusing what can be refused at once."""
    if (args.size is None) == (args.model is None):
        raise InputError("give either --size or --model")
    if args.size is not None:  # only known ones
        SiTConfig.named(args.size, input_size=32, in_channels=4, num_classes=1000)
    schedules = [Schedule.parse(text) for text in args.schedules.split(",")]
    for schedule in schedules:
        if others := schedule.blocks - set("HPR"):
            raise InputError(
                f"schedule {schedule} has {min(others)} steps; PyTorch's side has H, P and R"
            )
    try:
        batch_sizes = [int(text) for text in args.batch_sizes.split(",")]
    except ValueError as error:
        raise InputError(
            f"--batch-sizes is {args.batch_sizes!r}; give numbers such as 1,8"
        ) from error
    for flag, values in (("--batch-sizes", batch_sizes), ("--rounds", [args.rounds])):
        if wrong := [value for value in values if not 1 <= value <= 10_000]:
            raise InputError(f"{flag} has {wrong[0]}; it must be 1 to 10000")
    return schedules, batch_sizes


def _device(backend: str, notes: list[str]) -> str:
    """PyTorch's name of the device that JAX runs on."""
    import torch

    if backend == "cpu":
        if torch.cuda.is_available():
            notes.append("both are measured on the CPU: JAX has no GPU here, PyTorch has one")
        return "cpu"
    if backend != "gpu":
        raise InputError(f"JAX runs on a {backend}, where PyTorch does not; set JAX_PLATFORMS=cpu")
    if not torch.cuda.is_available():
        raise InputError(
            "JAX has a GPU and this PyTorch none: install one with CUDA, or set JAX_PLATFORMS=cpu"
        )
    return "cuda"


def _compile_mode(asked: str | None, device: str, notes: list[str]) -> str:
    """The mode of torch.compile; on a CPU max-autotune is not faster, and compiles longer."""
    variable, usual = COMPILERS[device]
    compiler = os.environ.get(variable, usual)
    if asked != "none" and shutil.which(compiler) is None:
        notes.append(f"PyTorch runs uncompiled: torch.compile needs {compiler}, which is missing")
        return "none"
    return asked or ("default" if device == "cpu" else "max-autotune")


if __name__ == "__main__":
    entry.run(main)
