"""Where training writes its numbers: JSON lines, TensorBoard and standard output."""

import json
import os
from collections.abc import Mapping
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
        from tensorboardX import SummaryWriter  # here, because only training needs it

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _step(line) < first_step]
            draft = directory / ".metrics.jsonl"
            draft.write_text("".join(f"{line}\n" for line in kept))
            os.replace(draft, self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step or None)

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
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
        values = {name: float(value) for name, value in values.items()}
        details = {name: float(value) for name, value in (details or {}).items()}
        try:
            self._file.write(json.dumps({"step": step, **values, **details}) + "\n")
            self._file.flush()
            for name, value in {**values, **details}.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise InputError(
                f"cannot write {self._path}: {error.strerror}; checkpoints are kept; make room, "
                "and the same command continues"
            ) from error
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"step {step}  {text}  {note}".rstrip())

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Records a picture `[H, W, 3]` uint8 in TensorBoard."""
        self._board.add_image(name, picture, step, dataformats="HWC")


def _step(line: str) -> float:
    """The step of a line; a line that was cut in the middle counts as too late to keep."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
