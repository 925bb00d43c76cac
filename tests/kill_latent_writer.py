"""Kills a process that writes a cache of latents at each of its steps; prints how many there were.

    python tests/kill_latent_writer.py FOLDER

A process of its own, since it forks hundreds of times, which JAX's threads would not survive.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_latents

from flowturbo_jax.data import latent_cache, latent_writer


def save_quickly(directory, params):
    """Stands for Orbax, whose threads do not survive a fork."""
    directory.mkdir()
    (directory / "weights").write_bytes(b"weights")


class Steps:
    """Counts steps, and kills the process at one of them."""

    def __init__(self, last=None):
        self.count, self.last = 0, last

    def around(self, function):
        def call(*args, **kwargs):
            self.step()
            result = function(*args, **kwargs)
            self.step()
            return result

        return call

    def step(self):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def write(directory: Path, steps: Steps) -> None:
    """Writes a cache, counting whatever changes the disk."""
    kept = {}
    for owner, name in (
        (latent_writer, "save_params"),
        (latent_writer, "_sync"),
        (os, "replace"),
        (Path, "write_text"),
        (Path, "unlink"),
        (shutil, "rmtree"),
        (latent_writer.ShardDraft, "add"),
        (latent_writer.ShardDraft, "close"),
    ):
        kept[owner, name] = getattr(owner, name)
        setattr(owner, name, steps.around(kept[owner, name]))
    try:
        tiny_latents.write(directory, unreadable=(6,))
    finally:
        for (owner, name), function in kept.items():
            setattr(owner, name, function)


def kill(directory: Path, last: int) -> bool:
    """Writes in a process that dies at step `last`; whether it came so far."""
    child = os.fork()
    if child == 0:
        write(directory, Steps(last))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def finished(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard that bears its final name."""
    shards = sorted(directory.glob("latents-*"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


def main(folder: Path) -> int:
    latent_writer.save_params = save_quickly
    steps = Steps()
    write(folder / "whole", steps)
    wanted = tiny_latents.contents(folder / "whole")
    for last in range(1, steps.count + 1):
        directory = folder / "killed"
        assert kill(directory, last)
        before = finished(directory)
        for name in before:
            assert (directory / name).read_bytes() == wanted[name], (last, name)
        if last % 2:  # and while it goes on, a second time
            kill(directory, 1 + last % 7)
        write(directory, Steps())
        after = finished(directory)
        assert {name: after[name] for name in before} == before, last
        assert tiny_latents.contents(directory) == wanted, last
        assert not latent_cache.vae_damage(directory), last
        shutil.rmtree(directory)
    return steps.count


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
