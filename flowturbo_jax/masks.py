"""Masks of what is repainted, as arrays: taken from what was painted or drawn, and softened."""

import math
import numbers
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Integer, UInt8

from flowturbo_jax.interfaces import InputError

HALF = 128  # bytes from here on are white, or opaque
ALIKE = 16  # levels by which one colour may vary: by compression, or where a brush fades out
ROUNDING = 1e-9  # of a cell: a polygon that reaches no farther into it does not touch it


def as_masks(masks: Any, images_shape: tuple[int, ...]) -> Bool[np.ndarray, "batch height width"]:
    """Turns masks into one of booleans per image.

    Args:
      masks: true or white = repaint. bool or uint8 (>= 128 is white; where no byte exceeds 1 they
        are taken for false and true), `[H, W]` for all images, `[B, H, W]` or `[B, H, W, 1]`,
        NumPy's or JAX's.
      images_shape: `(B, H, W, C)` of the images.

    Returns:
      `[B, H, W]` bool, a copy.

    Raises:
      InputError: they have another dtype or shape.
    """
    batch, height, width = images_shape[:3]
    try:
        array = np.asarray(masks)
    except (TypeError, ValueError) as error:  # what JAX traces, lists of several lengths
        raise InputError(
            f"masks are a {type(masks).__name__} that is no array of values; give a NumPy array"
        ) from error
    shapes = ((height, width), (batch, height, width), (batch, height, width, 1))
    if array.dtype not in (np.bool_, np.uint8) or array.shape not in shapes:
        raise InputError(
            f"masks are {array.dtype}{list(array.shape)}; wanted is bool or uint8, "
            + ", ".join(str(list(shape)) for shape in shapes[:2])
            + f" or {list(shapes[2])}"
        )
    if array.dtype == np.uint8:
        array = array >= (1 if array.max(initial=0) == 1 else HALF)
    if array.ndim == 4:
        array = array[..., 0]
    return np.array(np.broadcast_to(array, (batch, height, width)))


def weights(
    masks: Bool[np.ndarray, "batch height width"], margin: float = 0, soften: float = 0
) -> Float32[np.ndarray, "batch height width"]:
    """How much of the repainted picture each pixel gets; the rest is the original's.

        weight = clip(1 − (distance − margin) / soften, 0, 1)

    where the distance is Euclidean, from a pixel's centre to that of the nearest masked one.

    Args:
      masks: `[B, H, W]` bool, true = repaint.
      margin: by how many pixels the mask grows, all of them repainted in full; >= 0.
      soften: over how many pixels more the weight falls from 1 to 0; 0 for a hard edge.

    Returns:
      `[B, H, W]` float32 in [0, 1], all 0 where an image's mask is empty.

    Raises:
      InputError: margin or soften is no finite number >= 0.
    """
    from scipy.ndimage import distance_transform_edt

    for name, value in (("margin", margin), ("soften", soften)):
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or value < 0:
            raise InputError(f"{name} is {value!r}; it must be a finite number of pixels, >= 0")
    margin, soften = float(margin), float(soften)
    result = np.zeros(masks.shape, np.float32)
    for weight, mask in zip(result, masks, strict=True):
        if not mask.any():  # the distance to nothing is not infinite there, but arbitrary
            continue
        distance = distance_transform_edt(~mask)
        ramp = np.clip(margin + soften - distance, 0, soften) / (soften or 1)
        weight[:] = np.where(distance <= margin, 1, ramp)
    return result


def painted(
    colours: UInt8[np.ndarray, "height width 3"],
    values: Integer[np.ndarray, "height width"],
    alpha: UInt8[np.ndarray, "height width"] | None,
) -> Bool[np.ndarray, "height width"]:
    """What a mask marks that somebody painted, or a segmentation tool wrote, as a picture.

    White is marked: values of at least half, or of two values only the brighter, whichever they
    are. Where parts are transparent (alpha < 128), they are not marked, and the rest is if it is of
    one colour, as in a layer that was drawn on; else it is a mask in black and white of its own.

    Args:
      colours: `[H, W, 3]` uint8, RGB.
      values: `[H, W]`, the same in grey, uint8 or uint16.
      alpha: `[H, W]` uint8, or None where all is opaque.

    Returns:
      `[H, W]` bool.

    Raises:
      InputError: beside transparent parts there are several colours: a picture, or a drawing whose
        colours could mean anything.
    """
    if alpha is None or (alpha >= HALF).all():
        return _white(values)
    opaque = alpha >= HALF
    drawn = colours[opaque]
    if not len(drawn) or np.ptp(drawn, axis=0).max() <= ALIKE:
        return opaque
    if np.ptp(drawn, axis=1).max() > ALIKE:
        raise InputError(
            "its opaque part has several colours, and is no mask; draw what is to be repainted "
            "in one colour, or white on black"
        )
    marked = np.zeros_like(opaque)
    marked[opaque] = _white(values[opaque])
    return marked


def polygon(
    corners: Float[np.ndarray, "corners 2"], height: int, width: int
) -> Bool[np.ndarray, "height width"]:
    """Marks every cell of a grid that a polygon covers a part of, however small.

    Where the outline crosses itself, all that it goes round is inside (winding number not 0).

    Args:
      corners: `[N, 2]` float, x and y in cells from the grid's upper left corner; they may lie
        outside the grid.
      height: rows of the grid.
      width: columns of the grid.

    Returns:
      `[height, width]` bool: the outline passes through the cell, or its centre is inside.
    """
    # Both count along each row, from where they change: a running sum has them for each cell.
    winding = np.zeros((height, width + 1), np.int64)
    crossings = np.zeros((height, width + 1), np.int64)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        _wind(winding, start, end)
        _cross(crossings, start, end)
    inside, crossed = (np.cumsum(count, axis=1)[:, :width] for count in (winding, crossings))
    return (inside != 0) | (crossed > 0)


def _white(values: Integer[np.ndarray, "*pixels"]) -> Bool[np.ndarray, "*pixels"]:
    low, high = values.min(), values.max()
    if low < high and ((values == low) | (values == high)).all():
        return values == high
    return values >= np.iinfo(values.dtype).max / 2


def _wind(
    winding: Int[np.ndarray, "height columns"],
    start: Float[np.ndarray, "2"],
    end: Float[np.ndarray, "2"],
) -> None:
    """Adds what an edge adds to the winding number of the cells whose centre is right of it."""
    (x0, y0), (x1, y1) = start, end
    centres = np.arange(len(winding)) + 0.5
    down, up = (y0 <= centres) & (centres < y1), (y1 <= centres) & (centres < y0)
    rows = np.flatnonzero(down | up)
    x = x0 + (centres[rows] - y0) / (y1 - y0 or 1) * (x1 - x0)
    columns = np.clip(np.ceil(x - 0.5), 0, winding.shape[1] - 1).astype(int)
    winding[rows, columns] += np.where(down[rows], 1, -1)


def _cross(
    crossings: Int[np.ndarray, "height columns"],
    start: Float[np.ndarray, "2"],
    end: Float[np.ndarray, "2"],
) -> None:
    """Counts an edge in every cell it passes through; one along a cell's border does not."""
    (x0, y0), (x1, y1) = start, end
    top, bottom = min(y0, y1), max(y0, y1)
    rows = np.arange(len(crossings))
    rows = rows[(top < rows + 1 - ROUNDING) & (bottom > rows + ROUNDING)]
    y = np.clip([rows, rows + 1], top, bottom)  # where the edge enters and leaves each row
    x = x0 + (y - y0) / (y1 - y0) * (x1 - x0) if top < bottom else np.full(y.shape, x0)
    if top == bottom:
        x[1] = x1
    last = crossings.shape[1] - 1
    first = np.clip(np.floor(x.min(axis=0) + ROUNDING), 0, last).astype(int)
    end_column = np.clip(np.ceil(x.max(axis=0) - ROUNDING), 0, last).astype(int)
    passes = first < end_column
    crossings[rows[passes], first[passes]] += 1
    crossings[rows[passes], end_column[passes]] -= 1
