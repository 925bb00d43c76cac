"""Two sides sample the same noise: they must agree, and then take turns against the clock."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.jax_side import Asked
from flowturbo_jax.commands.progress import say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.schedule import Schedule

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "torch")
# Relative l2 distance of final latents that is still agreement. In float32 the two differ by the
# order of their sums; bfloat16 rounds by 4e-3 in every layer, and the two round in other places,
# which is why the same weights and noise must agree in float32 first.
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}
LEVELS = {"float32": 0.1, "bfloat16": 5.0}  # likewise of images, on average; 5 of 255 are 2 %
SPREAD = 1.25  # of the rounds of one side, slowest over fastest: above it the machine was busy
TURN_SECONDS = 1.0  # a turn is the calls that take about so long, at least one
WARM_CALLS = {"cpu": 1, "cuda": 3}  # after the check's; CUDA graphs are recorded in the first


class Setting(NamedTuple):
    """What is the same for all that one command measures.

    Attributes:
      model: what `JaxSide.open` says of it, for the PyTorch side.
      device: "cpu" or "cuda".
      dtype: of the matrix products, "float32" or "bfloat16".
      compile_mode: of torch.compile, or "none".
      decode: whether images are made, or latents.
    """

    model: dict[str, Any]
    device: str
    dtype: str
    compile_mode: str
    decode: bool


class Job(NamedTuple):
    """What is sampled.

    Attributes:
      how: arguments of the library's `sample_latents`.
      steps: a letter for each step.
      times: the flow times between which they go.
      guidance: mode and scale that `how` comes to.
      noise: `[B, H, W, C]` float32.
      labels: `[B]` int32; of a model of texts their states, as `JaxSide.start` gives them.
    """

    how: dict[str, Any]
    steps: str
    times: np.ndarray
    guidance: tuple[str, float]
    noise: np.ndarray
    labels: np.ndarray


def job(library: Asked, schedule: Schedule, batch_size: int, guidance: dict[str, Any]) -> Job:
    """A job of images 0, 1, ... of seed 0, each of another class or text.

    Raises:
      InputError: the model cannot be sampled so.
    """
    how = {"schedule": str(schedule), **guidance}
    resolved = library("guidance", how)
    steps = "".join(run.block * run.steps for run in schedule.runs)
    noise, labels = library("start", batch_size)
    return Job(how, steps, schedule.times(), resolved, noise, labels)


def measure(
    library: Asked, setting: Setting, jobs: Sequence[Job], rounds: int
) -> Iterator[dict[str, Any]]:
    """Checks and times one job after the other.

    Args:
      library: the JAX side.
      setting: of both sides.
      jobs: what to sample.
      rounds: turns of each side.

    Returns:
      For each job its protocol, agreement and times, ready for JSON.

    Raises:
      InputError: the two sides do not agree.
    """
    exact = [{} for _ in jobs]
    if setting.dtype != "float32":
        peer = _peer(setting, "float32", "none")
        exact = [{"float32": agreement(library, peer, job, "float32", _plan(job))} for job in jobs]
        del peer
    peer = _peer(setting, setting.dtype, setting.compile_mode)
    for job, found in zip(jobs, exact, strict=True):
        yield _measured(library, peer, setting, job, rounds, found)


def agreement(library: Asked, peer: Any, job: Job, dtype: str, plan: Any) -> dict[str, float]:
    """How far the final latents of both sides are apart.

    Raises:
      InputError: too far.
    """
    theirs = peer.latents(job.noise, job.labels, plan)
    found = distance(library("latents", dtype, job.how, job.noise, job.labels), theirs)
    say(
        f"{job.how['schedule']}, batch {len(job.labels)}, {dtype}: final latents differ by "
        f"{found['relative_l2']:.1e} (relative l2), at most {found['max_abs']:.1e}"
    )
    if not found["relative_l2"] <= AGREEMENT[dtype]:  # nor if it is not a number
        raise InputError(
            f"the two sides disagree: the final latents of {job.how['schedule']} in {dtype} are "
            f"{found['relative_l2']:.1e} apart (relative l2), and {AGREEMENT[dtype]:g} is allowed; "
            "nothing is timed"
        )
    return found


def image_agreement(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> dict[str, float]:
    """How many of 256 levels images are apart.

    Raises:
      InputError: too many.
    """
    difference = np.abs(ours.astype(np.int32) - theirs)
    found = {"max_levels": int(difference.max()), "mean_levels": float(difference.mean())}
    say(f"images in {dtype} differ by {found['mean_levels']:.3f} levels of 255 on average")
    if found["mean_levels"] > LEVELS[dtype]:
        raise InputError(
            f"the two sides disagree: images in {dtype} are {found['mean_levels']:.3f} levels "
            f"apart on average, and {LEVELS[dtype]:g} is allowed; nothing is timed"
        )
    return found


def distance(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """The largest difference, and the norm of the difference over that of `theirs`."""
    difference = ours.astype(np.float64) - theirs
    return {
        "max_abs": float(np.abs(difference).max()),
        "relative_l2": float(np.linalg.norm(difference) / np.linalg.norm(theirs)),
    }


def _peer(setting: Setting, dtype: str, compile_mode: str) -> Any:
    """The PyTorch side of a model's family."""
    if setting.model["family"] == "unet":
        from benchmarks.unet_peer import UNetPeer as Kind
    else:
        from benchmarks.torch_peer import Peer as Kind

    return Kind(setting.model, setting.device, dtype, compile_mode)


def _plan(job: Job) -> Any:
    from benchmarks.torch_peer import Plan

    return Plan(job.steps, job.times, *job.guidance)


def _measured(
    library: Asked, peer: Any, setting: Setting, job: Job, rounds: int, found: dict[str, Any]
) -> dict[str, Any]:
    count, what = len(job.labels), "images" if setting.decode else "latents"
    given = (setting.dtype, job.how, job.noise, job.labels)
    plan = _plan(job)

    def jax_seconds(calls: int) -> float:
        return library("seconds", what, calls, *given)

    def torch_seconds(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            getattr(peer, what)(job.noise, job.labels, plan)
        return (time.perf_counter() - begin) / calls

    sides = {"jax": jax_seconds, "pytorch": torch_seconds}
    found = {**found, setting.dtype: agreement(library, peer, job, setting.dtype, plan)}
    levels = None
    if setting.decode:
        images = library("images", *given), peer.images(job.noise, job.labels, plan)
        levels = image_agreement(*images, setting.dtype)
    warm = max(seconds(WARM_CALLS[setting.device]) for seconds in sides.values())
    calls = max(1, round(TURN_SECONDS / warm))
    times = take_turns(sides, calls, rounds)
    ms = {name: [1e3 * value / count for value in values] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in ms.items()}
    ratios = [jax / torch for jax, torch in zip(ms["jax"], ms["pytorch"], strict=True)]
    mode, scale = job.guidance
    return {
        "schedule": job.how["schedule"],
        "batch_size": count,
        "guidance": mode,
        "guidance_scale": scale,
        "agreement": found,
        "image_agreement": levels,
        "ms_per_image": medians,
        "ratio": medians["jax"] / medians["pytorch"],
        "ratio_range": [min(ratios), max(ratios)],
        "ratio_of_fastest": min(ms["jax"]) / min(ms["pytorch"]),
        "calls_per_turn": calls,
        "rounds_ms_per_image": ms,
        "warnings": [
            f"the rounds of {name} differ by {max(values) / min(values):.1f} times: other work was "
            "going on, which may slow the two sides by different factors; measure again"
            for name, values in ms.items()
            if max(values) > SPREAD * min(values)
        ],
    }


def take_turns(
    sides: dict[str, Callable[[int], float]], calls: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of each side in each round; every other round goes backwards.

    Args:
      sides: what makes a number of calls and returns the seconds of one.
      calls: in a turn.
      rounds: turns of each side.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            times[name].append(sides[name](calls))
    return times


def card(setting: Setting) -> dict[str, Any]:
    """What the numbers depend on, beside the model and what is sampled."""
    import torch

    gpu = setting.device == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    diffusers = setting.decode or setting.model["family"] == "unet"
    libraries = [*LIBRARIES, *(["diffusers"] if diffusers else [])]
    return {
        "sampled": "images" if setting.decode else "latents",
        "dtype": setting.dtype,
        "tf32": False,  # on neither side
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "cores": cores,
        "threads": {"jax": cores, "pytorch": torch.get_num_threads()},
        "torch_compile": setting.compile_mode,
        "torch_cuda_graphs": gpu and setting.compile_mode == "max-autotune",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    names = []
    if (file := Path("/proc/cpuinfo")).is_file():
        lines = [line.partition(":") for line in file.read_text().splitlines()]
        names = [value.strip() for name, _, value in lines if name.strip() == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| schedule | batch | JAX ms/image | PyTorch | JAX / PyTorch | latents differ by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["ratio_range"]
        agreed = list(row["agreement"].values())[-1]
        lines.append(
            f"| {row['schedule']} | {row['batch_size']} | {row['ms_per_image']['jax']:.1f} "
            f"| {row['ms_per_image']['pytorch']:.1f} | {row['ratio']:.3f} ({low:.3f}..{high:.3f}) "
            f"| {agreed['relative_l2']:.1e}, at most {agreed['max_abs']:.1e} |"
        )
    return "\n".join(lines)
