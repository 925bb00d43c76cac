r"""Measures text-to-image sampling beside the same loop over diffusers' U-Net in PyTorch.

  python benchmarks/torch_unet.py --dtype bfloat16 --out runs/torch_sd.json
  python benchmarks/torch_unet.py --small --out runs/torch_small.json     # to try it out, anywhere
  python benchmarks/torch_unet.py --model models/2rf --decode --batch-sizes 1,8 --dtype bfloat16 \
      --out runs/torch_2rf.json

Same weights (exported to diffusers' names and loaded strictly), noise, guidance and steps. Both
sides are given the same random text states, so that no text encoder is measured. First both sample
the same noise, and nothing is timed unless the final latents agree; then they take turns, the
library in a process of its own. ms/image is the median over the rounds, until results are on the
host and compilation left out. The second table is the time that FlowTurbo's schedules save, on each
side, beside the Heun steps they replace in the paper, whose numbers stand in the last column. Needs
pip install torch diffusers. What PyTorch runs is benchmarks/unet_peer.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]  # works from a checkout that is not installed

from benchmarks import torch_command, turns  # noqa: E402
from benchmarks.jax_side import SMALL  # noqa: E402
from flowturbo_jax.commands import entry, output_file  # noqa: E402
from flowturbo_jax.interfaces import InputError  # noqa: E402
from flowturbo_jax.models.unet_config import SIZES  # noqa: E402

SIZE = "SD 1.x U-Net"
# FlowTurbo's schedule, the Heun steps it is held against, and the percentage of their time that the
# paper says it saves. Source: FlowTurbo (arXiv 2409.18128), text to image: ms/image of InstaFlow.
PAIRS = (("H1P2R2", "H4", 34.5), ("H1P4R2", "H5", 29.8), ("H1P6R3", "H8", 38.5))
SCHEDULES = "H4,H5,H8,H1P2R2,H1P4R2,H1P6R3"

UNEQUAL = (
    "diffusers computes the text's keys and values in every evaluation, the library once for all"
)


def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures, and prints tables in Markdown."""
    args = _parser().parse_args(argv[1:])
    if sum(given not in (None, False) for given in (args.size, args.model, args.small)) > 1:
        raise InputError("give one of --size, --model and --small")
    if args.size is not None and args.size not in SIZES:
        raise InputError(f"unknown size {args.size!r}; known are {', '.join(SIZES)}")
    if args.model is None:
        args.size = SMALL if args.small else args.size or SIZE
    asked = torch_command.check(args)
    output_file.named(args.out)
    if missing := [name for name in ("torch", "diffusers") if not torch_command.installed(name)]:
        raise InputError(
            "this measures diffusers in PyTorch, which is not installed: pip install "
            + " ".join(missing)
        )
    how = {"more": _saved, "decode": args.decode, "family": "unet", "notes": [UNEQUAL]}
    rows = torch_command.measured(args, asked, **how)
    sys.stdout.write(turns.table(rows) + "\n")
    if found := acceleration(rows):
        sys.stdout.write(f"\n{acceleration_table(found)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = torch_command.parser_of("torch_unet.py", __doc__, SCHEDULES, "8", "paired")
    add = parser.add_argument
    add("--size", help=f"random weights of a size, for 512 x 512 pixels ({SIZE})")
    add("--model", help="a model directory in place of --size")
    add("--small", action="store_true", help="a tiny U-Net in place of --size, to try this out")
    return parser


def acceleration(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the paper's schedules save, where they and what they are held against are measured.

    Args:
      rows: as `turns.measure` gives them.

    Returns:
      For each pair and batch size the percentage of the time that is saved, on each side.
    """
    ms = {(row["batch_size"], row["schedule"]): row["ms_per_image"] for row in rows}
    found = []
    for batch_size in dict.fromkeys(row["batch_size"] for row in rows):
        for schedule, heun, paper in PAIRS:
            quick, slow = ms.get((batch_size, schedule)), ms.get((batch_size, heun))
            if quick and slow:
                saved = {side: 100 * (1 - quick[side] / slow[side]) for side in quick}
                pair = {"schedule": schedule, "beside": heun, "batch_size": batch_size}
                found.append({**pair, "saved_percent": {**saved, "paper": paper}})
    return found


def _saved(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"acceleration": acceleration(rows)}


def acceleration_table(found: Sequence[dict[str, Any]]) -> str:
    """The percentages in Markdown."""
    lines = [
        "| time saved | batch | JAX | PyTorch | the paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for pair in found:
        saved = pair["saved_percent"]
        lines.append(
            f"| {pair['schedule']} beside {pair['beside']} | {pair['batch_size']} "
            f"| {saved['jax']:.1f} % | {saved['pytorch']:.1f} % | {saved['paper']:.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)
