"""`python -m flowturbo_jax COMMAND`: dispatches to the modules in commands/."""

import importlib
from collections.abc import Sequence

from flowturbo_jax.commands import entry
from flowturbo_jax.interfaces import InputError

COMMANDS = {
    "convert": "turn published weights into a model directory; describe or export one",
    "encode": "turn a data set of images into cached latents to train on; verify them",
    "evaluate": "measure schedules of a model directory, or compare measurements",
    "stability": "measure how steady a model's velocity is, and where refining is safe",
    "tune": "find the best schedules of a model on this device",
    "solve": "learn a solver of few evaluations for a model",
    "benchmark": "measure how fast schedules are on this device, and where the time goes",
    "demo": "open a page in the browser to generate, edit and inpaint",
    "statistics": "take the statistics of real images that evaluate compares with",
}


def main(argv: Sequence[str]) -> None:
    """Runs the command that argv names."""
    if len(argv) < 2 or argv[1] in ("-h", "--help"):
        print("python -m flowturbo_jax COMMAND [--help]\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:12s}{purpose}")
        return
    if argv[1] not in COMMANDS:
        raise InputError(f"unknown command {argv[1]!r}; known are {', '.join(COMMANDS)}")
    importlib.import_module(f"flowturbo_jax.commands.{argv[1]}").main(argv[1:])


if __name__ == "__main__":
    entry.run(main)
