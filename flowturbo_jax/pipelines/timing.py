"""Wall times of calls: one until its result is on the host, and many that follow each other."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

LEAST_REPEATS = 3  # of a call that takes longer than all of its time
BURST_SECONDS = 0.1  # enqueueing one call takes some 0.0001 s
MOST_IN_BURST = 64
LEAST_SECONDS, MOST_CALLS = 0.3, 5  # of `timed`


class Task(NamedTuple):
    """What is measured.

    Attributes:
      call: returns a pytree of arrays on the device, and does not wait for them.
      until_on_host: each call by itself, from its begin until its result is on the host; or many
        calls, all made before the first of them is done. What the host does for one of those
        happens while the device does another, so it is what the device takes, unless the host takes
        longer.
    """

    call: Callable[[], Any]
    until_on_host: bool


class Times(NamedTuple):
    """What one call took.

    Attributes:
      median: of the repeats, wall time in s.
      least: of the repeats, wall time in s.
      repeats: how many there were.
    """

    median: float
    least: float
    repeats: int


class Stopwatch:
    """Measures how long calls take, each after one that is not counted, which compiles.

    Args:
      repeats: of a measurement, at most.
      seconds: for a measurement, about: of slow calls there are fewer repeats, but three.
      clock: gives the time in s.
    """

    def __init__(
        self,
        repeats: int = 10,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._repeats, self._seconds, self._clock = repeats, seconds, clock

    def latency(self, call: Callable[[], Any]) -> Times:
        """The time of a call until its result is on the host."""
        return self.in_turn(Task(call, until_on_host=True))[0]

    def back_to_back(self, call: Callable[[], Any]) -> Times:
        """The time of a call among many that are made before the first of them is done."""
        return self.in_turn(Task(call, until_on_host=False))[0]

    def in_turn(self, *tasks: Task) -> list[Times]:
        """The times of several tasks, again and again one after another, so that they compare.

        What else the machine does for a while makes all of them slower, and not one.

        Args:
          *tasks: what is measured.
        """
        runs, counts, seconds = [], [], []
        for task in tasks:
            run, count, first = self._tried(task)
            runs.append(run)
            counts.append(count)
            seconds.append([first])
        affordable = len(tasks) * self._seconds / max(sum(map(sum, seconds)), 1e-9)
        repeats = min(max(LEAST_REPEATS, int(affordable)), self._repeats)
        for _ in range(repeats - 1):
            for run, measured in zip(runs, seconds, strict=True):
                measured.append(self._of(run))
        return [
            Times(float(np.median(measured)) / count, min(measured) / count, repeats)
            for measured, count in zip(seconds, counts, strict=True)
        ]

    def _tried(self, task: Task) -> tuple[Callable[[], None], int, float]:
        """How a task is run, how many calls that is, and how long it took for a first time."""
        run, wait = task.call, jax.device_get if task.until_on_host else jax.block_until_ready
        wait(run())
        one = self._of(lambda: wait(run()))
        count = int(np.clip(BURST_SECONDS / max(one, 1e-9), 1, MOST_IN_BURST))
        if task.until_on_host or count == 1:
            return lambda: wait(run()), 1, one

        def burst() -> None:
            for _ in range(count):
                result = run()  # the one before is let go, or their results would fill the memory
            wait(result)  # a device does one after another

        return burst, count, self._of(burst)

    def _of(self, run: Callable[[], Any]) -> float:
        begin = self._clock()
        run()
        return self._clock() - begin


def timed(call: Callable[[], Any]) -> tuple[np.ndarray, float]:
    """The result of a call that is compiled already, on the host, and its wall time in s.

    One call that takes long is believed; of quick ones a few are made, for their median.
    """
    seconds: list[float] = []
    while not seconds or (sum(seconds) < LEAST_SECONDS and len(seconds) < MOST_CALLS):
        begin = time.perf_counter()
        result = np.asarray(call())
        seconds.append(time.perf_counter() - begin)
    return result, float(np.median(seconds))
