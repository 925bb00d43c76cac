"""Where the time of a batch goes: each part of the sampler as a program of its own.

The parts are what the whole program is made of, in the shapes and numbers that it has. As a whole
it may be faster than its parts together, since the compiler joins them, or slower: what is left of
its time is reported as the rest, which can be negative.
"""

from typing import NamedTuple

from flowturbo_jax.guidance import inside
from flowturbo_jax.pipelines import part_programs
from flowturbo_jax.pipelines.batch_call import BatchCall
from flowturbo_jax.pipelines.part_programs import Rows
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.timing import Stopwatch, Task, Times
from flowturbo_jax.schedule import REFINERS, Schedule

# In the order in which they are shown. Host is what a call by itself takes longer than one among
# others: checks, dispatch, the one waiting for the other, and images on their way back.
PARTS = (
    "predictor",
    "refiner",
    "conditioning",
    "guidance_and_steps",
    "decode",
    "host",
    "rest",
)
NETWORKS = ("predictor", "refiner")


class Split(NamedTuple):
    """What a batch takes, and its parts.

    Attributes:
      latency: from the call until its images are on the host.
      device: of a call among many, back to back.
      seconds: of each of PARTS, medians; they add up to the latency.
      multiply_adds: of the parts that multiply matrices.
    """

    latency: Times
    device: Times
    seconds: dict[str, float]
    multiply_adds: dict[str, int]

    @property
    def flop(self) -> int:
        """Floating point operations of the whole program, a multiply-add being two."""
        return 2 * sum(self.multiply_adds.values())


def split(call: BatchCall, stopwatch: Stopwatch) -> Split:
    """Measures a batch and its parts.

    Args:
      call: the batch.
      stopwatch: of the measurements.
    """
    parts = part_programs.parts(call, rows(call.plan))
    latency, device, *apart = stopwatch.in_turn(
        Task(call, until_on_host=True),
        Task(call, until_on_host=False),
        *(Task(part.call, until_on_host=False) for part in parts),
    )
    seconds = dict.fromkeys(PARTS, 0.0)
    work: dict[str, int] = {}
    for part, times in zip(parts, apart, strict=True):
        seconds[part.name] += times.median
        work[part.name] = work.get(part.name, 0) + part.multiply_adds
    seconds["host"] = max(latency.median - device.median, 0.0)
    seconds["rest"] = latency.median - sum(seconds.values())
    return Split(latency, device, seconds, {name: count for name, count in work.items() if count})


def evaluations(schedule: Schedule) -> dict[str, list[int]]:
    """The indices on the time grid at which each network is evaluated, in order."""
    predictor = [0] if schedule.runs[0].block == "P" else []  # it evaluates its own start
    refiner: list[int] = []
    for run, first, last in schedule.intervals():
        for i in range(first, last):
            if run.block in REFINERS:
                refiner += [i] if run.block == "Rs" else [i, i + 1]
            else:
                predictor += {"H": [i, i + 1], "P": [i + 1]}.get(run.block, [i])
    return {"predictor": predictor, "refiner": refiner}


def rows(plan: Plan) -> list[Rows]:
    """The evaluations of each network, apart by whether they have the rows of both branches."""
    times, found = plan.times, []

    def guided(i: int) -> bool:
        if plan.guidance == "none":
            return False
        return plan.interval is None or bool(inside(times[i], plan.interval))

    for network, indices in evaluations(plan.schedule).items():
        for branches, wanted in ((2, True), (1, False)):
            kept = tuple(i for i in indices if guided(i) == wanted)
            if kept:
                found.append(Rows(network, branches, kept))
    return found
