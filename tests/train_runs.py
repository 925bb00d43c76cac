"""Starts the real train.py in processes of its own, as users do."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from flowturbo_jax.run_checkpoints import Checkpoints

ROOT = Path(__file__).parent.parent
COMPILED = os.environ["FLOWTURBO_CACHE"] + "-xla"
CONFIG = """
from flowturbo_jax.train_config import TrainConfig

def get_config():
    return TrainConfig(**{values!r}).to_config_dict()
"""


def write_recipe(folder: Path, **fields: Any) -> Path:
    """A config file of the tiny recipe; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.py"
    file.write_text(CONFIG.format(values=tiny.recipe(**fields).to_dict()))
    return file


def start(
    recipe: Path, workdir: Path, *flags: str, devices: int = 1, compiled: str = COMPILED
) -> subprocess.Popen:
    """Starts train.py on so many virtual CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # Compiled once, so that tests spend their time on what they are about.
        "JAX_COMPILATION_CACHE_DIR": f"{compiled}/{devices}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "train.py", f"--config={recipe}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for a process; gives its exit code, output and errors."""
    out, errors = process.communicate(timeout=240)
    return process.returncode, out, errors


def run(recipe: Path, workdir: Path, *flags: str, devices: int = 1) -> tuple[int, str, str]:
    return finish(start(recipe, workdir, *flags, devices=devices))


def process_flags(count: int) -> list[list[str]]:
    """The flags of each of several processes that are to find each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    same = [f"--coordinator_address={address}", f"--num_processes={count}"]
    return [[*same, f"--process_id={index}"] for index in range(count)]


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The recorded numbers, without those of speed, which differ from run to run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def final_state(workdir: Path, like: Any) -> Any:
    """The state of the newest checkpoint; `like` is any state of the recipe."""
    return Checkpoints(workdir / "checkpoints").state(like)


def assert_same_bits(a: Any, b: Any) -> None:
    import jax

    def check(x, y):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(check, a, b)
