"""Large pictures through a convolutional network in small memory: overlapping tiles, blended."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Maps = Float[Array, "batch height width channels"]
Scaled = Float[Array, "batch scaled_height scaled_width new_channels"]


def tiled(
    function: Callable[[Maps], Scaled], x: Maps, tile: int, overlap: int, cell: tuple[int, int]
) -> Scaled:
    """Applies a function that scales both sides of a picture, tile by tile where that is needed.

    Each tile is computed by itself, one picture at a time, so memory is that of one tile. Where
    tiles overlap, their results fade into each other. What the function computes over a whole
    picture (group norm, attention) it computes over a tile here: the result is an approximation.

    Args:
      function: `[B, h i, w i, C] -> [B, h o, w o, C']` float of the same dtype.
      x: `[B, H i, W i, C]`; up to `tile` cells on both sides it goes through the function whole.
      tile: largest side of a tile, in cells.
      overlap: how far neighbouring tiles overlap at least, in cells, below `tile`.
      cell: (i, o), the side of a cell in pixels of x and of the result.

    Returns:
      `[B, H o, W o, C']`.
    """
    inside, outside = cell
    height, width = x.shape[1] // inside, x.shape[2] // inside
    if height <= tile and width <= tile:
        return function(x)
    rows, tile_height = tile_starts(height, tile, overlap)
    columns, tile_width = tile_starts(width, tile, overlap)
    corners = np.array(list(itertools.product(rows, columns)), np.int32)
    weight = np.outer(
        fade(tile_height * outside, overlap * outside),
        fade(tile_width * outside, overlap * outside),
    )[:, :, None].astype(x.dtype)
    total = np.zeros((height * outside, width * outside, 1), x.dtype)
    for top, left in corners * outside:
        total[top : top + weight.shape[0], left : left + weight.shape[1]] += weight

    def one_picture(picture: Float[Array, "height width channels"]):
        size = (tile_height * inside, tile_width * inside, picture.shape[-1])

        def add_tile(canvas, corner):
            row, column = corner
            zero = jnp.zeros_like(row)
            part = jax.lax.dynamic_slice(picture, (row * inside, column * inside, zero), size)
            made = function(part[None])[0] * weight
            corner = (row * outside, column * outside, zero)
            there = jax.lax.dynamic_slice(canvas, corner, made.shape)
            return jax.lax.dynamic_update_slice(canvas, there + made, corner), None

        made = jax.eval_shape(function, jax.ShapeDtypeStruct((1, *size), x.dtype))
        empty = jnp.zeros((*total.shape[:2], made.shape[-1]), x.dtype)
        canvas, _ = jax.lax.scan(add_tile, empty, jnp.asarray(corners))
        return canvas / total

    return jax.lax.map(one_picture, x)


def tile_starts(length: int, tile: int, overlap: int) -> tuple[list[int], int]:
    """Where the tiles along one side start, and how long they are.

    As few tiles as cover the side, of equal length, spread evenly.

    Args:
      length: of the side.
      tile: largest length of a tile.
      overlap: of neighbours, at least.

    Returns:
      The starts, and the length of every tile.
    """
    if length <= tile:
        return [0], length
    count = -(-(length - overlap) // (tile - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    return [i * (length - size) // (count - 1) for i in range(count)], size


def fade(length: int, overlap: int) -> np.ndarray:
    """Weights along a tile's side, `[length]`: 1 inside, falling over the overlap to above 0."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    return np.minimum(1.0, distance / max(overlap, 0.5))
