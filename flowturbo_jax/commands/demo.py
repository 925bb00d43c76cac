"""Opens a page in the browser to try a model: generate, edit and inpaint.

  demo                                          the shipped digits model
  demo models/sit-xl-2-256 --dtype bfloat16 --plots runs/tune_xl,runs/stability_xl

The page is for this machine alone (127.0.0.1) and asks no other for anything. One request computes
at a time, the others wait. --plots shows what tune and stability drew. Ctrl-C ends it.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flowturbo_jax.commands.entry import ROOT, LineParser, one_line
from flowturbo_jax.commands.progress import say
from flowturbo_jax.demo import page, server
from flowturbo_jax.demo.handlers import BASELINE, Studio
from flowturbo_jax.demo.page import Plot
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import any_model
from flowturbo_jax.pipelines.class_to_image import ClassToImage

SHIPPED = "digits"
PLOTS = {"tune": "Speed and quality of schedules", "stability": "Stability of the velocity"}


def main(argv: Sequence[str]) -> None:
    """Reads the command line, loads the model, and serves the page until Ctrl-C."""
    args = _parser().parse_args(argv[1:])
    plots = _plots(args)
    any_model.refuse_text(args.model_dir, "demo")
    with server.reserve(args.port) as place, tempfile.TemporaryDirectory() as folder:
        server.silence(folder)
        pipe = ClassToImage.load(args.model_dir, args.dtype, say=say)
        studio = Studio(pipe, Path(args.model_dir).name or args.model_dir, args.baseline)
        blocks = page.build(studio, plots)
        print(f"http://{server.HOST}:{place.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        server.serve(blocks, place)


def _parser() -> LineParser:
    parser = LineParser(prog="python -m flowturbo_jax demo", description=__doc__)
    add = parser.add_argument
    add("model_dir", nargs="?", default=SHIPPED, help="model directory, or a shipped model's name")
    add("--port", type=int, default=7860, help="of the page, 0 for any free one (7860)")
    add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
    add("--baseline", default=BASELINE, help=f"schedule to compare with ({BASELINE})")
    add("--plots", default="", help="folders where tune and stability wrote, comma-separated")
    return parser


def _plots(args: argparse.Namespace) -> list[Plot]:
    """The plots of the folders that were named; for the shipped model those of docs/, if there."""
    if not args.plots and args.model_dir == SHIPPED:
        files = [(title, ROOT / f"docs/images/{name}_digits.png") for name, title in PLOTS.items()]
        return [Plot(title, file) for title, file in files if file.is_file()]
    found = []
    for folder in filter(None, (text.strip() for text in args.plots.split(","))):
        files = [(title, Path(folder) / f"{name}.png") for name, title in PLOTS.items()]
        there = [Plot(title, file) for title, file in files if file.is_file()]
        if not there:
            raise InputError(
                f"--plots: {one_line(folder)} has no tune.png or stability.png; name the --out of "
                "tune or stability"
            )
        found += there
    return found
