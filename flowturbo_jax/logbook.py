"""Where training writes its numbers: JSON lines, TensorBoard and standard output."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flowturbo_jax.interfaces import InputError


class Logbook:
    """Writes scalars and pictures of a run to `metrics.jsonl` and TensorBoard files.

    Args:
      directory: the run's folder; created if missing.
      first_step: lines of this step and later, left by a run that was cut off after its last
        checkpoint, are dropped, so that no step stands in the file twice.
    """

    def __init__(self, directory: Path, first_step: int = 0):
        # Here, because only training needs it; without the thread of tensorboardX's SummaryWriter,
        # which dies when the disk is full, and leaves training waiting for it.
        from tensorboardX.event_file_writer import EventsWriter

        self._path = directory / "metrics.jsonl"
        with self._disk_errors():
            (directory / "tensorboard").mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                lines = self._path.read_bytes().splitlines()
                kept = [line for line in lines if _step(line) < first_step]
                draft = directory / ".metrics.jsonl"
                draft.write_bytes(b"".join(line + b"\n" for line in kept))
                os.replace(draft, self._path)
            # Unbuffered: what could not be written must not be tried again when it is closed.
            self._file = self._path.open("ab", buffering=0)
            events = str(directory / "tensorboard" / "events")
            self._board = EventsWriter(events, f".{os.getpid()}")
            if first_step:  # TensorBoard drops what an interrupted run wrote of later steps
                self._event(first_step, session_log={"status": "START"})

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        with contextlib.suppress(OSError):  # the disk is full, which has been said
            self._board.close()

    def scalars(
        self,
        step: int,
        values: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
        note: str = "",
    ) -> None:
        """Records named numbers of one step.

        Args:
          step: which.
          values: recorded everywhere.
          details: recorded, but not shown.
          note: shown, but not recorded.

        Raises:
          InputError: the disk is full or cannot be written to.
        """
        from tensorboardX import summary

        values = {name: float(value) for name, value in values.items()}
        details = {name: float(value) for name, value in (details or {}).items()}
        with self._disk_errors():
            self._file.write(json.dumps({"step": step, **values, **details}).encode() + b"\n")
            for name, value in {**values, **details}.items():
                self._event(step, summary=summary.scalar(name, value))
            self._board.flush()
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        with contextlib.suppress(OSError):  # nobody reads: no reason to lose a run
            tqdm.write(f"step {step}  {text}  {note}".rstrip())

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Records a picture `[H, W, 3]` uint8 in TensorBoard.

        Raises:
          InputError: the disk is full or cannot be written to.
        """
        from tensorboardX import summary

        with self._disk_errors():
            self._event(step, summary=summary.image(name, picture, dataformats="HWC"))
            self._board.flush()

    def _event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto import event_pb2

        self._board.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write {error.filename or self._path}: {error.strerror}; checkpoints are "
                "kept, and the same command continues once this is mended"
            ) from error


def _step(line: bytes) -> float:
    """The step of a line; a line that was cut in the middle counts as too late to keep."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
