"""What long commands show while they work: a bar with the time to go, and lines above it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from flowturbo_jax.commands.entry import one_line


def say(line: str) -> None:
    """Prints a line above the progress bar."""
    tqdm.write(one_line(line), file=sys.stderr)


@contextlib.contextmanager
def images_done(description: str = "", unit: str = "image") -> Iterator[Callable[[int, int], Any]]:
    """What shows how much is done, `(done, total)`; its rate is of what was done since it began.

    Args:
      description: in front of the bar.
      unit: what is counted.
    """
    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, initial=done, unit=unit, desc=description))
        bars[0].update(done - bars[0].n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


@contextlib.contextmanager
def bars(unit: str = "step") -> Iterator[Callable[[str, int, int], Any]]:
    """What shows one piece of work after another, `(what, done, total)`, each with a bar.

    Args:
      unit: what is counted.
    """
    with contextlib.ExitStack() as stack:
        current: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in current:
                stack.close()
                current.clear()
                current[what] = stack.enter_context(images_done(what, unit))
            current[what](done, total)

        yield show
