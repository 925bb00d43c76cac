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
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # works from a checkout that is not installed

from benchmarks import torch_command, turns  # noqa: E402
from flowturbo_jax.commands import entry, output_file  # noqa: E402
from flowturbo_jax.interfaces import InputError  # noqa: E402
from flowturbo_jax.models import SiTConfig  # noqa: E402


def main(argv: Sequence[str]) -> None:
    """Reads the command line, measures, and prints a table in Markdown."""
    args = _parser().parse_args(argv[1:])
    if (args.size is None) == (args.model is None):
        raise InputError("give either --size or --model")
    if args.size is not None:  # only known ones
        SiTConfig.named(args.size, input_size=32, in_channels=4, num_classes=1000)
    asked = torch_command.check(args)
    output_file.named(args.out)
    if not torch_command.installed("torch"):
        raise InputError("this measures PyTorch, which is not installed: pip install torch")
    notes, decode = [], args.decode
    if decode and not torch_command.installed("diffusers"):
        decode = False
        notes.append("both sides sample latents and do not decode: diffusers is not installed")
    rows = torch_command.measured(args, asked, notes, decode=decode)
    sys.stdout.write(turns.table(rows) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = torch_command.parser_of("torch_sit.py", __doc__, "H1P5R3", "4", "official")
    add = parser.add_argument
    add("--size", help="random weights of a size, such as SiT-B/2, for 256 x 256 pixels")
    add("--model", help="a model directory, or the name of a shipped model, in place of --size")
    return parser


if __name__ == "__main__":
    entry.run(main)
