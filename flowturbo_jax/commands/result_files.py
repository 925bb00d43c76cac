"""What sample.py leaves: a picture of all, images by themselves, and the numbers."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax import images
from flowturbo_jax.interfaces import InputError

Panels = Sequence[tuple[Sequence[str], np.ndarray]]


def write(
    folder: Path,
    name: str,
    report: Mapping[str, Any],
    panels: Panels,
    *,
    columns: int,
    least: int,
    alone: Sequence[tuple[np.ndarray, Mapping[str, Any]]] | None = None,
    noise: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes the pictures, then the numbers, each whole or not at all.

    `NAME.png` shows all panels, `NAME_0.png`, ... are images by themselves, `NAME.npz` holds noise,
    `NAME.json` the report. Images by themselves that an earlier run of the same name has left, and
    listed in its report, are removed where this one has fewer.

    Args:
      folder: where; made if there is none.
      name: of the files.
      report: what the JSON is to hold beside the names of files; `schedules` has the cards.
      panels: title lines and images of each, see `images.side_by_side`.
      columns: of each panel.
      least: pixels of the side that an image has at least in the picture.
      alone: images `[H, W, C]` uint8 with their protocol cards; None for none.
      noise: `[N, H, W, C]`, or None.

    Returns:
      The report with `picture`, and where there are any `results` and `noise`: names of files.

    Raises:
      InputError: the folder cannot be written to.
    """
    picture, zoom = folder / f"{name}.png", max(1, least // panels[-1][1].shape[1])
    cards = json.dumps([row["card"] for row in report["schedules"]])
    files = [folder / f"{name}_{i}.png" for i in range(len(alone or ()))]
    results = {} if alone is None else {"results": [*map(str, files)]}
    report = {"picture": str(picture), **results, **report}
    draft = folder / f".{name}.json"
    try:
        drawn = images.side_by_side(panels, columns=columns, zoom=zoom)
        images.save_png(picture, drawn, {"protocol_cards": cards})
        for file, (image, card) in zip(files, alone or (), strict=True):
            colour = np.broadcast_to(image, (*image.shape[:2], 3))
            images.save_png(file, colour, {"protocol_card": json.dumps(card)})
        if noise is not None:
            report["noise"] = str(folder / f"{name}.npz")
            images.save_npz(report["noise"], noise)
        for file in _left(folder, name, {file.name for file in files}):
            file.unlink(missing_ok=True)
        draft.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(draft, folder / f"{name}.json")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}; change config.out") from error
    return report


def listed(files: Sequence[str], most: int = 12) -> str:
    """The names of files in a line; of many the first and the last."""
    if len(files) <= most:
        return ", ".join(files)
    return f"{files[0]} ... {files[-1]} ({len(files)} images)"


def _left(folder: Path, name: str, kept: set[str]) -> list[Path]:
    """Images by themselves that an earlier run of that name has listed, and this one does not."""
    try:
        report = json.loads((folder / f"{name}.json").read_text())
        names = {Path(file).name for file in report["results"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # there was none, or it is no report
    pattern = re.compile(rf"{re.escape(name)}_(0|[1-9]\d*)\.png", re.ASCII)
    return [folder / file for file in sorted(names - kept) if pattern.fullmatch(file)]
