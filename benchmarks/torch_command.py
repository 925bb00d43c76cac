"""What the commands that measure beside PyTorch share: flags, refusals, and the course of a run."""

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.jax_side import Asked
from flowturbo_jax.commands import entry, output_file
from flowturbo_jax.commands.progress import say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import DTYPES
from flowturbo_jax.schedule import Schedule

COMPILERS = {"cpu": ("CXX", "g++"), "cuda": ("CC", "gcc")}  # what torch.compile calls
Rows = list[dict[str, Any]]


def parser_of(
    program: str, description: str | None, schedules: str, batch_sizes: str, guidance: str
) -> entry.LineParser:
    """A parser of the flags that say how to sample and to measure, with these defaults."""
    parser = entry.LineParser(prog=f"python benchmarks/{program}", description=description)
    add = parser.add_argument
    add("--schedules", default=schedules, help=f"comma-separated, of H, P and R ({schedules})")
    add("--batch-sizes", default=batch_sizes, help=f"comma-separated ({batch_sizes})")
    add("--dtype", default="float32", choices=list(DTYPES), help="of matrix products (float32)")
    add("--guidance", default=guidance, choices=["official", "paired"], help=f"({guidance})")
    add("--guidance-scale", type=float, default=1.5, help="(1.5)")
    add("--decode", action="store_true", help="to images, on PyTorch's side by diffusers")
    add("--rounds", type=int, default=5, help="turns of each side (5)")
    modes = ["default", "max-autotune", "none"]
    add("--compile", choices=modes, help="of PyTorch (max-autotune on a GPU, default on a CPU)")
    add("--out", required=True, help="JSON file of results, replaced if it exists")
    return parser


def check(args: argparse.Namespace) -> tuple[list[Schedule], list[int]]:
    """The schedules and the batch sizes.

    Raises:
      InputError: an argument is wrong, which can be told at once.
    """
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


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def measured(
    args: argparse.Namespace,
    asked: tuple[list[Schedule], list[int]],
    notes: Sequence[str] = (),
    more: Callable[[Rows], dict[str, Any]] = lambda rows: {},
    **given: Any,
) -> Rows:
    """Checks and times all that is asked for, and keeps --out up to date.

    Args:
      args: of `parser_of`, with `size` and `model`.
      asked: of `check`.
      notes: what the card is to say, and the user to be told.
      more: what to write beside the rows.
      **given: of `JaxSide`, beside folder, size and model.

    Returns:
      A row for each schedule and batch size, as `turns.measure` gives them.

    Raises:
      InputError: one of the sides refuses, or they do not agree.
    """
    schedules, batch_sizes = asked
    notes, out = list(notes), output_file.named(args.out)
    with (
        output_file.reserved(out),
        tempfile.TemporaryDirectory() as folder,
        Asked(folder=Path(folder), size=args.size, model=args.model, **given) as library,
    ):
        facts = library("open")
        device = _device(facts["backend"], notes)
        compile_mode = _compile_mode(args.compile, device, notes)
        for note in notes:
            say(note)
        # torch.compile says so of diffusers, whose cached functions give the same each time.
        warnings.filterwarnings("ignore", message="Dynamo detected a call")
        setting = turns.Setting(facts["model"], device, args.dtype, compile_mode, given["decode"])
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
        rows: Rows = []
        for row in turns.measure(library, setting, jobs, args.rounds):
            rows.append(row)
            if row["warnings"]:
                say(f"warning: {'; '.join(row['warnings'])}")
            report = {"card": card, "rows": rows, **more(rows)}
            output_file.replace(out, json.dumps(report, indent=1) + "\n")
    return rows


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
