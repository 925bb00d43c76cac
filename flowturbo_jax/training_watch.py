"""What training watches at every step: its input, its numbers, and requests to stop.

Each process learns of the others' troubles from the step itself: its batch carries signals, whose
mean over all devices comes back among the step's numbers. So all of them stop at the same step.
"""

import contextlib
import json
import math
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from flowturbo_jax import data, parallel
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.train_config import TrainConfig

STOP, FAILED = 0, 1  # columns of a batch's signals
LISTED = 32  # indices in a message


class Feed:
    """This process's part of every batch, read ahead by threads.

    Args:
      config: the recipe.
      source: its data.
      first_step: the step whose batch comes first.

    Attributes:
      failure: why there is no more data; None while there is.
      unreadable: what could not be read so far, in this process.
    """

    def __init__(self, config: TrainConfig, source: data.DataSource, first_step: int):
        self._part = parallel.part()
        self._stream = data.stream(
            source,
            config.batch_size,
            config.seed,
            config.horizontal_flip,
            self._part,
            first_step,
            config.data_threads,
        )
        size = config.batch_size // self._part[1]
        self._blank = {
            "data": np.zeros((size, *source.shape), np.float32),
            "label": np.zeros((size, *source.label[0]), source.label[1]),
        }
        self._last: data.Batch | None = None
        self.failure: Exception | None = None
        self.unreadable = data.Unreadable(source, config.unreadable_limit)

    def next(self, stop: threading.Event) -> data.Batch:
        """The next batch, and in `signals` `[B, 2]` whether this process wants to stop, or has to.

        Raises:
          InputError: the data cannot be read, and no other process would wait for this one.
        """
        try:
            batch = next(self._stream)
            for line in self.unreadable.note(batch.pop("unreadable")):
                tqdm.write(line)
            self._last = with_index(batch, self._part)
        except (InputError, OSError, RuntimeError, ValueError, MemoryError) as error:
            if self._part[1] == 1:
                raise
            self.failure = error  # the others learn of it from the step that is made all the same
            if self._last is None:
                self._last = with_index(self._blank, self._part)
        signals = np.zeros((len(self._last["index"]), 2), np.float32)
        signals[:, STOP], signals[:, FAILED] = stop.is_set(), self.failure is not None
        return {**self._last, "signals": signals}


def with_index(batch: data.Batch, part: tuple[int, int], first: int = 0) -> data.Batch:
    """The batch with the place of each of its rows in the whole batch, which begins at `first`."""
    rows = np.arange(len(batch["data"]), dtype=np.int32)
    return {**batch, "index": first + part[0] + part[1] * rows}


class Watch:
    """Looks at the numbers of every step, one step late, so that the devices never wait for it.

    Args:
      config: the recipe.
      source: its data.
      feed: where the batches come from.
      workdir: gets `diverged.json` if the numbers are no numbers any more.
      kept: says which checkpoint is there to go on from.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: data.DataSource,
        feed: Feed,
        workdir: Path,
        kept: Callable[[], str],
    ):
        self._config, self._source, self._feed = config, source, feed
        self._workdir, self._kept = workdir, kept
        self._unseen: deque[tuple[int, dict[str, jax.Array]]] = deque()

    def see(self, step: int, metrics: dict[str, jax.Array], at_once: bool) -> bool:
        """Takes a step's metrics, and looks at those of the step before.

        Args:
          step: steps made, this one included.
          metrics: of `training_step.make_step`.
          at_once: look at this step's as well, which waits for it.

        Returns:
          Whether a process wants to stop; if so, all steps so far have been looked at.

        Raises:
          InputError: the numbers of a step are not finite, or a process has no more data.
        """
        self._unseen.append((step, metrics))
        stop = False
        while len(self._unseen) > (0 if at_once or stop else 1):
            stop |= self._look(*self._unseen.popleft())
        return stop

    def _look(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        signals = np.asarray(metrics["signals"])
        if signals[FAILED] > 0:  # the same step in all processes, so that none waits for another
            other = InputError("another process cannot read its data; its message says why")
            raise self._feed.failure or other
        values = {name: float(value) for name, value in metrics.items() if name != "signals"}
        if not all(math.isfinite(value) for value in values.values()):
            raise InputError(self._diverged(step, values))
        return bool(signals[STOP] > 0)

    def _diverged(self, step: int, values: dict[str, float]) -> str:
        """What is known of a step that ended in no numbers, for the message; more in a file."""
        config = self._config
        indices = data.order(self._source, config.batch_size, config.seed, step - 1).tolist()
        wrong = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        listed = ", ".join(map(str, indices[:LISTED])) + (", ..." if len(indices) > LISTED else "")
        if parallel.is_first():
            names = [self._source.examples.name(index) for index in indices]
            found = {"step": step, "values": wrong, "indices": indices, "examples": names}
            with contextlib.suppress(OSError):  # the message has most of it
                (self._workdir / "diverged.json").write_text(json.dumps(found, indent=1))
        return (
            f"training diverged: {', '.join(f'{k} is {v}' for k, v in wrong.items())} at step "
            f"{step}, whose batch is examples {listed} of {self._source.name} (all in "
            f"{self._workdir / 'diverged.json'}); {self._kept()}; begin in another workdir "
            "with a lower learning_rate or with gradient_clip"
        )
