"""How fast schedules of a model are on this device, and where the time goes."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from flowturbo_jax import throughput
from flowturbo_jax.model_description import Description
from flowturbo_jax.pipelines import ablation, ceiling, evaluation, time_split
from flowturbo_jax.pipelines.batch_call import BatchCall, Compiled
from flowturbo_jax.pipelines.ceiling import Ceiling
from flowturbo_jax.pipelines.cold_start import Request, Start
from flowturbo_jax.pipelines.costs import network_costs
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.time_split import NETWORKS, Split
from flowturbo_jax.pipelines.timing import Stopwatch
from flowturbo_jax.schedule import Schedule

# What a row says itself, of what evaluation.protocol_card says; and what has no meaning here.
OF_A_ROW = (
    "schedule",
    "steps",
    "predictor_evaluations",
    "refiner_evaluations",
    "guidance",
    "guidance_scale",
    "guidance_interval",
    "guided_channels",
    "batch_size",
)
NOT_HERE = ("seed", "samples", "label_sampling")


def measure(
    pipe: Generation,
    plans: Sequence[Plan],
    batch_sizes: Sequence[int],
    stopwatch: Stopwatch,
    *,
    ablate: bool = False,
    say: Callable[[str], Any] = logging.info,
) -> dict[str, Any]:
    """Measures every plan at every batch size, on the first device.

    Args:
      pipe: the model. Where programs are kept for later processes, calls make theirs once more.
      plans: how to sample; the first is what speed-ups are over.
      batch_sizes: images of a call.
      stopwatch: of the measurements.
      ablate: also by what is compiled together.
      say: is told, in a line, what is measured next.

    Returns:
      What can be written as JSON: `card`, all that the numbers depend on; `ceiling`; `rows`; and
      `ablation`, empty unless it is asked for.

    Raises:
      InputError: the ablation of a plan whose guidance has an interval is asked for.
    """
    dtype, rows, splits, compared = pipe.model.predictor.dtype, [], [], []
    say("matrix products")
    first = ceiling.measure(dtype, stopwatch)
    for batch_size in batch_sizes:
        baseline = None
        for plan in plans:
            say(f"{plan.schedule}, batch {batch_size}")
            row, split = measure_row(BatchCall(pipe, plan, batch_size), stopwatch, baseline)
            baseline = baseline or row["ms_per_batch"]
            rows.append(row)
            splits.append(split)
        for plan in plans if ablate else ():
            say(f"{plan.schedule}, batch {batch_size}, compiled in pieces")
            compared.append(_ablated(pipe, plan, batch_size, stopwatch))
    say("matrix products again")
    found = ceiling.best(first, ceiling.measure(dtype, stopwatch))
    for row, split in zip(rows, splits, strict=True):
        row["utilisation"] = utilisation(split, found.flop_per_second)
    return {
        "card": card(pipe, plans[0]),
        "ceiling": _ceiling(found, pipe),
        "rows": rows,
        "ablation": compared,
    }


def measure_row(
    call: BatchCall, stopwatch: Stopwatch, baseline: float | None
) -> tuple[dict[str, Any], Split]:
    """What a plan takes at a batch size, and that part by part.

    Args:
      call: the batch.
      stopwatch: of the measurements.
      baseline: ms of a batch that the speed-up is over; its own if None.
    """
    compiled, before = call.compile_anew(), device_peak()
    jax.block_until_ready(call())
    memory, source = peak_memory(before, device_peak(), compiled)
    split = time_split.split(call, stopwatch)
    size, ms = call.batch_size, 1e3 * split.latency.median
    described = _described(call.pipe, call.plan, size)
    row = {
        **{name: described[name] for name in OF_A_ROW},
        "gmac": paper_gmac(call.pipe.model.description, call.plan.schedule),
        "ms_per_batch": ms,
        "ms_per_image": ms / size,
        "images_per_second": size / split.device.median,
        "speed_up": (baseline or ms) / ms,
        "repeats": split.latency.repeats,
        "split_ms_per_batch": {name: 1e3 * s for name, s in split.seconds.items()},
        "flop": split.flop,
        "memory_bytes": memory,
        "memory_source": source,
        "trace_seconds": compiled.trace_seconds,
        "compile_seconds": compiled.compile_seconds,
    }
    return row, split


def utilisation(split: Split, ceiling: float) -> dict[str, float | None]:
    """Operations per second as a fraction of the ceiling.

    Args:
      split: of the batch.
      ceiling: operations per second.

    Returns:
      Of the `whole` program, of its `networks`, and of `decode`; None of what does not multiply.
    """
    work, seconds = split.multiply_adds, split.seconds

    def of(*names: str) -> float | None:
        flop, time = 2 * sum(work.get(n, 0) for n in names), sum(seconds[n] for n in names)
        return flop / time / ceiling if flop else None

    whole = split.flop / split.device.median / ceiling
    return {"whole": whole, "networks": of(*NETWORKS), "decode": of("decode")}


def paper_gmac(description: Description, schedule: Schedule) -> float:
    """Billions of multiply-adds of an image as the paper counts them: networks, one branch.

    Source: FlowTurbo table 1, "GFLOPs", which has one refiner evaluation for an R step; it makes
    two, which are what counts here.
    """
    costs = {cost.what: cost.multiply_adds for cost in network_costs(description)}
    total = schedule.predictor_evaluations * costs["predictor"]
    return (total + schedule.refiner_evaluations * costs.get("refiner", 0)) / 1e9


def device_peak() -> int | None:
    """The most memory that this process has held on the device so far; None where it is unknown."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def peak_memory(before: int | None, after: int | None, compiled: Compiled) -> tuple[Any, str]:
    """The most memory a program held, in bytes, and who says so.

    The device's number is of the whole process, so it is a program's only where it has just grown.
    """
    if after is not None and after > (before or 0):
        return after, "device"
    return compiled.memory_bytes, "compiler"


def card(pipe: Generation, plan: Plan) -> dict[str, Any]:
    """What all rows depend on: model, dtype, device, versions."""
    described = _described(pipe, plan, 1)
    kept = {name: described[name] for name in described if name not in OF_A_ROW + NOT_HERE}
    size = getattr(pipe.model.description.predictor, "size_name", None)
    return {
        "network": size or pipe.model.description.family,
        "image_shape": list(pipe.model.description.image_shape),
        **kept,
        "devices": 1,
        "processor_cores": os.cpu_count(),
    }


def cold_start_report(request: Request, starts: tuple[Start, Start]) -> dict[str, Any]:
    """What `cold_start.measure` found, as JSON can hold it.

    Args:
      request: what was sampled.
      starts: the first process and the second.
    """
    cold, warm = starts
    return {
        "schedule": request.schedule,
        "batch_size": request.batch_size,
        "cold": {**cold._asdict(), "call_seconds": cold.call_seconds},
        "warm": {**warm._asdict(), "call_seconds": warm.call_seconds},
        "warm_over_cold": warm.call_seconds / cold.call_seconds,
    }


def _described(pipe: Generation, plan: Plan, batch_size: int) -> dict[str, Any]:
    return evaluation.protocol_card(
        pipe, plan, seed=0, samples=batch_size, batch_size=batch_size, judges=None
    )


def _ceiling(found: Ceiling, pipe: Generation) -> dict[str, Any]:
    dtype = np.dtype(pipe.model.predictor.dtype).name
    return {
        "flop_per_second": found.flop_per_second,
        "by_size": {str(size): rate for size, rate in found.by_size.items()},
        "data_sheet": throughput.peak(jax.devices()[0].device_kind, dtype),
    }


def _ablated(
    pipe: Generation, plan: Plan, batch_size: int, stopwatch: Stopwatch
) -> Mapping[str, Any]:
    times = ablation.measure(pipe, plan, batch_size, stopwatch)
    ms = {way: 1e3 * found.median / batch_size for way, found in times.items()}
    return {"schedule": str(plan.schedule), "batch_size": batch_size, "ms_per_image": ms}
