"""Pixels: between [-1, 1] and bytes, tiled into grids, drawn side by side, written as PNG."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from flowturbo_jax.interfaces import ImageBytes, Images, InputError

if TYPE_CHECKING:
    import PIL.Image
    import PIL.ImageFont

WHITE = 255
INK = (31, 35, 40)  # title text, near black
QUIET_INK = (89, 99, 110)  # the smaller lines under a title
BOLD = 0.02  # stroke around the title's letters, in font sizes: the built-in font has one weight


def to_uint8(images: Images | Float[np.ndarray, "batch height width channels"]) -> ImageBytes:
    """Turns pixels in [-1, 1] into bytes; pure, so jit and vmap work on it.

        byte = round(clip(127.5 (x + 1), 0, 255))

    Args:
      images: `[B, H, W, C]` float, pixels in [-1, 1]; values outside saturate.

    Returns:
      `[B, H, W, C]` uint8, -1 as 0 and 1 as 255.
    """
    # float32 first: bfloat16 has 8 bits of mantissa, too few to round 256 levels right.
    x = jnp.asarray(images).astype(jnp.float32)
    return jnp.round(jnp.clip((x + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def from_uint8(images: ImageBytes | UInt8[np.ndarray, "batch height width channels"]) -> Images:
    """Turns bytes into pixels in [-1, 1], the reverse of `to_uint8`; pure.

        x = byte / 127.5 - 1

    Args:
      images: `[B, H, W, C]` uint8.

    Returns:
      `[B, H, W, C]` float32, pixels in [-1, 1].
    """
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def composite(
    below: ImageBytes, above: ImageBytes, weights: Float[Array, "batch height width 1"]
) -> ImageBytes:
    """One picture over another, by weight: 0 gives exactly the one below, 1 exactly that above.

    Args:
      below: `[B, H, W, C]` uint8.
      above: the same.
      weights: `[B, H, W, 1]` float32 in [0, 1]; pure.
    """
    low, high = (image.astype(jnp.float32) for image in (below, above))
    return jnp.round(low + weights * (high - low)).astype(jnp.uint8)


def grid(
    images: jax.Array | np.ndarray, columns: int, zoom: int = 1, gap: int = 2
) -> UInt8[np.ndarray, "height width 3"]:
    """Tiles images into one picture, row by row, on white.

    Args:
      images: `[N, H, W, C]` uint8, C = 1 (grey) or 3 (RGB).
      columns: images per row; a grid of fewer images is only as wide as they are.
      zoom: side of the square that one pixel becomes (nearest neighbour).
      gap: white pixels between neighbours, not zoomed.

    Returns:
      `[H', W', 3]` uint8.

    Raises:
      InputError: the images are not such an array, or columns, zoom or gap is too small.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise InputError(f"a grid shows uint8 images, got {images.dtype}: convert with to_uint8.")
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.size == 0:
        raise InputError(f"a grid shows [N, H, W, 1 or 3] images, N >= 1, got {images.shape}.")
    if columns < 1 or zoom < 1 or gap < 0:
        raise InputError(
            "a grid needs columns >= 1, zoom >= 1 and gap >= 0, "
            f"got columns={columns}, zoom={zoom}, gap={gap}."
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    tiles = np.broadcast_to(images, (*images.shape[:3], 3)).repeat(zoom, axis=1).repeat(zoom, 2)
    fill = ((0, rows * columns - len(images)), (0, gap), (0, gap), (0, 0))
    tiles = np.pad(tiles, fill, constant_values=WHITE)
    canvas = rearrange(tiles, "(row column) h w c -> (row h) (column w) c", row=rows)
    return canvas[: canvas.shape[0] - gap, : canvas.shape[1] - gap]


def side_by_side(
    panels: Sequence[tuple[Sequence[str], jax.Array | np.ndarray]], columns: int, zoom: int = 1
) -> "PIL.Image.Image":
    """Draws several grids next to each other, each under its own title.

    Text grows with the widest grid, so that it stays readable when a page scales the picture
    down. A title wider than its grid widens the panel.

    Args:
      panels: for each panel its text lines, title first (e.g. `["Heun H8", "16 evaluations,
        1.93 ms/image"]`), and its images, `[N, H, W, C]` uint8, C = 1 or 3.
      columns: images per row in every grid.
      zoom: side of the square that one pixel becomes.

    Returns:
      An RGB picture on white.

    Raises:
      InputError: there is no panel, or `grid` refuses a panel's images, columns or zoom.
    """
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    if not panels:
        raise InputError("side_by_side needs at least one panel of (title lines, images).")
    grids = [grid(images, columns, zoom, gap=max(2, 2 * zoom // 3)) for _, images in panels]
    size = max(16, round(max(g.shape[1] for g in grids) / 18))
    title, detail = PIL.ImageFont.load_default(size), PIL.ImageFont.load_default(0.78 * size)
    margin, line_height = round(0.9 * size), round(1.3 * size)

    header = max(len(lines) for lines, _ in panels) * line_height
    top = margin + header + (size // 2 if header else 0)
    widths = [
        max(g.shape[1], *_text_widths(lines, title, detail), 0)
        for g, (lines, _) in zip(grids, panels, strict=True)
    ]
    height = top + max(g.shape[0] for g in grids) + margin
    width = sum(widths) + 2 * margin * len(panels)  # a margin at either edge, two in between
    picture = PIL.Image.new("RGB", (width, height), (WHITE,) * 3)
    draw = PIL.ImageDraw.Draw(picture)
    left = margin
    for tiles, (lines, _), panel_width in zip(grids, panels, widths, strict=True):
        for i, line in enumerate(lines):
            font, ink, bold = (detail, QUIET_INK, 0.0) if i else (title, INK, BOLD * size)
            # "ls": left end of the baseline, so that lines of two sizes keep an even rhythm.
            baseline = (left, margin + i * line_height + size)
            draw.text(baseline, line, fill=ink, font=font, anchor="ls", stroke_width=bold)
        picture.paste(PIL.Image.fromarray(tiles), (left, top))
        left += panel_width + 2 * margin
    return picture


def save_png(
    path: str | os.PathLike[str],
    image: "PIL.Image.Image | jax.Array | np.ndarray",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a PNG in one step: a reader finds the old file or the whole new one.

    Args:
      path: ends in `.png`; missing parent directories are created.
      image: a picture of `side_by_side`, or `[H, W, 3]` uint8 of `grid`.
      metadata: text chunks to store in the file, e.g. the settings that made the picture.

    Raises:
      InputError: the path does not end in .png, or the array is not `[H, W, 3]` uint8.
    """
    import PIL.Image
    import PIL.PngImagePlugin

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"pictures are written as PNG: end the name in .png, got {path.name!r}.")
    if not isinstance(image, PIL.Image.Image):
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise InputError(
                f"save_png writes [H, W, 3] uint8, got {image.shape} {image.dtype}: "
                "make one picture of several images with grid."
            )
        image = PIL.Image.fromarray(image)
    chunks = PIL.PngImagePlugin.PngInfo()
    for key, text in (metadata or {}).items():
        chunks.add_text(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(unfinished, format="PNG", pnginfo=chunks)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_npz(path: str | os.PathLike[str], images: np.ndarray) -> None:
    """Writes images as ADM's evaluator reads them, whole or not at all.

    Args:
      path: ends in `.npz`; missing parent directories are created.
      images: `[N, H, W, C]` uint8, which may lie on disk; stored as `arr_0`.

    Raises:
      InputError: the path does not end in .npz, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"arrays are written as .npz: end the name so, got {path.name!r}.")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(file, arr_0=images)
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):  # where there is no folder either
            unfinished.unlink()


def _text_widths(
    lines: Sequence[str],
    title: "PIL.ImageFont.FreeTypeFont",
    detail: "PIL.ImageFont.FreeTypeFont",
) -> list[int]:
    """The width of each line in pixels, the title's bold stroke included."""
    fonts = [title, *[detail] * (len(lines) - 1)]
    stroke = round(2 * BOLD * title.size)
    return [int(np.ceil(f.getlength(t))) + stroke for f, t in zip(fonts, lines, strict=False)]
