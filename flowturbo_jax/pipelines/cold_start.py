"""The first images of a fresh process: with nothing kept, and with what such a process left.

Each is a process of its own, since this one has begun. Start them before this one uses its device:
a GPU has no memory left for two.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import program_cache
from flowturbo_jax.pipelines.batch_call import BatchCall
from flowturbo_jax.pipelines.subject import Subject

# The clock starts before the first import that takes time.
CHILD = (
    "import time; begin = time.perf_counter(); "
    "from flowturbo_jax.pipelines import cold_start; cold_start.answer(begin)"
)
STAGES = ("import", "device", "load", "program", "run")
# Set by users to share JAX's own cache, which would not be empty.
JAX_CACHE = "JAX_COMPILATION_CACHE_DIR"


class Request(NamedTuple):
    """What a fresh process samples; all of it can be written as JSON.

    Attributes:
      subject: the model.
      dtype: of its networks, "float32" or "bfloat16".
      batch_size: number of images.
      schedule: text.
      guidance_scale: the model's default if None, as are guidance and interval.
      guidance: mode.
      guidance_interval: text, such as "0.1:0.8".
      quantization: of the networks, "int8" or "fp8"; None for none.
    """

    subject: Subject
    dtype: str
    batch_size: int
    schedule: str
    guidance_scale: float | None = None
    guidance: str | None = None
    guidance_interval: str | None = None
    quantization: str | None = None


class Start(NamedTuple):
    """How one process started.

    Attributes:
      seconds: wall time of each of STAGES: importing the library; the device's runtime; reading
        weights; making or loading the program; running it until the images are on the host.
      compiled: programs that the compiler made.
      loaded: programs that were loaded instead.
    """

    seconds: dict[str, float]
    compiled: int
    loaded: int

    @property
    def call_seconds(self) -> float:
        """From the call to its images, in s: what compiling, or loading, makes longer."""
        return self.seconds["program"] + self.seconds["run"]


def measure(request: Request) -> tuple[Start, Start]:
    """Starts two processes, one after the other, on one folder of kept programs, empty at first.

    Raises:
      InputError: a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        return start(request, Path(folder)), start(request, Path(folder))


def start(request: Request, folder: Path) -> Start:
    """Starts one process that keeps its programs in a folder.

    Raises:
      InputError: it failed.
    """
    home = str(Path(__file__).parents[2])  # wherever this process found the library
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: text for name, text in os.environ.items() if name != JAX_CACHE}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), program_cache.VARIABLE: str(folder)}
    asked = json.dumps({**request._asdict(), "subject": request.subject._asdict()})
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=asked,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
    if done.returncode:
        raise InputError(f"a fresh process failed: {said}; --no-cold-start leaves it out")
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def answer(begin: float) -> None:
    """What a fresh process does: reads a request from stdin, samples, and writes how that went.

    Args:
      begin: when it began, by `time.perf_counter`.
    """
    counted = {"/jax/compilation_cache/cache_misses": 0, "/jax/compilation_cache/cache_hits": 0}

    def count(event: str, **_: Any) -> None:
        if event in counted:
            counted[event] += 1

    jax.monitoring.register_event_listener(count)
    asked = json.loads(sys.stdin.read())
    request = Request(**{**asked, "subject": Subject(**asked["subject"])})
    program_cache.enable()
    times = [begin, time.perf_counter()]
    jax.devices()
    times.append(time.perf_counter())
    pipe = request.subject.load(request.dtype, request.quantization)
    jax.block_until_ready(pipe.params)
    times.append(time.perf_counter())
    plan = pipe.plan(
        request.schedule, request.guidance_scale, request.guidance, request.guidance_interval
    )
    call = BatchCall(pipe, plan, request.batch_size)
    call.compile()
    times.append(time.perf_counter())
    np.asarray(call())
    times.append(time.perf_counter())
    seconds = dict(zip(STAGES, np.diff(times).tolist(), strict=True))
    misses, hits = counted.values()
    sys.stdout.write(f"\n{json.dumps(Start(seconds, misses, hits)._asdict())}\n")
