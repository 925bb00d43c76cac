"""What the page shows as HTML: images as they are, their captions, and one line of what happened.

Images are written into the page itself, so that no file of a visitor lies on the server.
"""

import base64
import io
import math
from html import escape
from pathlib import Path

import numpy as np

from flowturbo_jax import images
from flowturbo_jax.demo.handlers import Made, Picture, Pictures
from flowturbo_jax.interfaces import InputError

SIDE = 768  # pixels that a picture is enlarged to, by whole factors
MOST_PLOT_BYTES = 4 * 2**20


def png(pixels: np.ndarray) -> str:
    """`[H, W, 1 or 3]` uint8 as the address of an image that is the image."""
    import PIL.Image

    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
    return _address(file.getvalue())


def figure(pictures: Pictures | Picture, title: str, details: str, alt: str) -> str:
    """Images in a square grid, each pixel enlarged to a square, under a title and a line."""
    pictures = pictures[None] if pictures.ndim == 3 else pictures
    columns = math.ceil(math.sqrt(len(pictures)))
    zoom = max(1, SIDE // (columns * pictures.shape[2]))
    tiles = images.grid(pictures, columns, zoom, gap=max(2, SIDE // 96))
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>{escape(details)}</span></figcaption>"
        f'<img src="{png(tiles)}" alt="{escape(alt)}" data-zoom="{zoom}"></figure>'
    )


def made(result: Made, alt: str) -> str:
    """A figure of what was sampled, with its evaluations and its time."""
    schedule = result.plan.schedule
    refiner = f" + {schedule.refiner_evaluations} refiner" if schedule.needs_refiner else ""
    return figure(
        result.images,
        f"{schedule.method} {schedule}",
        f"{schedule.predictor_evaluations} evaluations{refiner}, {result.ms_per_image:.2f} "
        "ms/image",
        f"{alt}, by {schedule}",
    )


def side_by_side(*figures: str) -> str:
    """Figures next to each other."""
    return f'<div class="side-by-side">{"".join(figures)}</div>'


def line(text: str, problem: bool = False) -> str:
    """One line under a button: what happened, or what is wrong."""
    role = 'role="alert" class="line problem"' if problem else 'role="status" class="line"'
    return f"<p {role}>{escape(text)}</p>"


def plot(path: Path, title: str) -> str:
    """A plot from a PNG file, under its title.

    Raises:
      InputError: it cannot be read, or is too large to be a plot.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= MOST_PLOT_BYTES else b""
    except OSError as error:
        raise InputError(f"cannot read the plot {path}: {error.strerror}") from error
    if not content.startswith(b"\x89PNG"):
        raise InputError(f"{path} is no PNG of up to {MOST_PLOT_BYTES // 2**20} MiB; make it anew")
    return (
        f'<figure class="plot"><figcaption><b>{escape(title)}</b></figcaption>'
        f'<div><img src="{_address(content)}" alt="{escape(title)}"></div></figure>'
    )


def _address(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
