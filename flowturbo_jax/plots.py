"""Pictures of measurements: one style, drawn without a display, the same bytes every time.

    with plots.style():
        figure, (left, right) = plots.panels(2)
        left.plot(t, error, color=plots.BLUE)
    plots.save(figure, Path("runs/error"))  # runs/error.png and runs/error.svg

matplotlib is imported where something is drawn, not before.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowturbo_jax import images
from flowturbo_jax.interfaces import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#{:02x}{:02x}{:02x}".format(*images.INK)
QUIET_INK = "#{:02x}{:02x}{:02x}".format(*images.QUIET_INK)
# Told apart by eyes of every kind. Source: Okabe and Ito 2008, "Color Universal Design".
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE)
BAND = 0.18  # opacity of a spread around its mean
PANEL = (4.6, 3.5)  # width and height in inches
DOTS_PER_INCH = 150
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.edgecolor": QUIET_INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": QUIET_INK,
    "ytick.color": QUIET_INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": DOTS_PER_INCH,
    "figure.constrained_layout.w_pad": 0.12,  # inches
    "svg.fonttype": "path",  # looks the same where the font is not installed
    "svg.hashsalt": "flowturbo_jax",  # or the names inside an SVG would be drawn by chance
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it, what is drawn looks like every other picture of this library."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc or a notebook has set
        matplotlib.rcParams.update(STYLE)
        yield


def panels(count: int = 1) -> tuple["Figure", np.ndarray]:
    """An empty figure and its panels, side by side; belongs inside `style()`.

    Args:
      count: how many panels, of 4.6 x 3.5 inches each.

    Returns:
      The figure, and an array `[count]` of its axes.
    """
    from matplotlib.figure import Figure

    width, height = PANEL
    figure = Figure(figsize=(count * width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def save(figure: "Figure", stem: Path) -> tuple[Path, Path]:
    """Writes a figure as PNG and as SVG, each whole or not at all.

    Equal figures give equal bytes: neither file says when it was made.

    Args:
      figure: drawn inside `style()`.
      stem: the path of both files without .png and .svg; missing folders are made.

    Returns:
      The paths of the PNG and of the SVG.

    Raises:
      InputError: they cannot be written.
    """
    nothing: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
    }
    written = [stem.with_name(f"{stem.name}.{kind}") for kind in nothing]
    drafts = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in written]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with style():
            for draft, (kind, metadata) in zip(drafts, nothing.items(), strict=True):
                figure.savefig(draft, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
        for draft, path in zip(drafts, written, strict=True):
            os.replace(draft, path)
    except OSError as error:
        raise InputError(
            f"cannot write {stem}.png and .svg: {error.strerror or error}; choose another place"
        ) from error
    finally:
        for draft in drafts:
            with contextlib.suppress(OSError):  # such as a folder that is a file
                draft.unlink()
    return written[0], written[1]
