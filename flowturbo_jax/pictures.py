"""Pictures and masks that a user brings to edit, as files: upright, and fitted to the model.

Data to train on is opened by `data.pixels`, which drops orientation and transparency as ADM does.
"""

import math
import os
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Integer, UInt8

from flowturbo_jax import masks
from flowturbo_jax.data import pixels
from flowturbo_jax.data.folder import MAX_FILE
from flowturbo_jax.data.source import UnreadableError
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import open_unnamed

if TYPE_CHECKING:
    import PIL.Image

ORIENTATION = 0x0112  # EXIF's tag
DEPTH = 24  # where a PNG file says how many bits its values have
FULL = {2: 85, 4: 17}  # what Pillow multiplies values of so many bits by, for white to be 255
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
DRAWN = ("box:", "polygon:")  # what a mask that is no file begins with
FAR = 1e9  # pixels; no picture reaches there
FLAT = 1e-12  # of its length squared: a polygon of a smaller area is a line
SHOWN = 200  # letters of a name, or of a mask, in an error


class Picture(NamedTuple):
    """A picture as the model takes it.

    Attributes:
      pixels: `[H, W, C]` uint8, the middle square, scaled to the model's size.
      size: width and height of the whole picture, upright, before it was fitted, in pixels.
    """

    pixels: UInt8[np.ndarray, "height width channels"]
    size: tuple[int, int]


class _Layers(NamedTuple):
    """An image file's content, upright: an RGB picture, `[h, w]` values of 16 bits, and alpha."""

    colour: "PIL.Image.Image"
    deep: Integer[np.ndarray, "height width"] | None  # None where the file has no grey of 16 bits
    alpha: UInt8[np.ndarray, "height width"] | None  # None where nothing can be transparent


def open_picture(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> Picture:
    """Opens a picture to edit.

    It is turned upright as its EXIF data say, transparency is filled with white, 16 bits become 8,
    and colours become RGB, or grey (ITU-R 601) where the model's images are. The middle square is
    then cut and scaled by `data.pixels.centre_crop`; a picture of the model's size keeps its
    bytes. Colour profiles are not applied, and of an animation the first frame is taken.

    Args:
      path: a PNG, JPEG, WebP, BMP or GIF file, known by what it holds and not by its name.
      shape: `(H, W, C)` of the model's images, H = W, C = 1 or 3.

    Raises:
      InputError: it is no such file, cannot be read, is damaged or too large; or the model's
        images are not square, or of other channels.
    """
    side, channels = _side(shape), shape[2]
    try:
        layers = _read(path)
        colour = layers.colour
        if layers.alpha is not None:
            colour = _over_white(colour, layers.alpha)
        fitted = pixels.centre_crop(colour, side)
    except (InputError, UnreadableError, OSError) as error:
        raise InputError(_cannot_read(path, error)) from error
    return Picture(_grey(fitted)[..., None] if channels == 1 else fitted, colour.size)


def open_mask(
    text: str | os.PathLike[str], picture_size: tuple[int, int], shape: tuple[int, int, int]
) -> Bool[np.ndarray, "height width"]:
    """Opens a mask: what of a picture is to be repainted.

    The mask is cut and scaled with its picture: a pixel of the result is masked where any part of
    what it covers is. All of it may be masked, which leaves nothing of the picture.

    In a mask from a file, white (a grey value of at least half) is repainted. Where the file has
    two values only, whichever they are, the brighter is. Where parts are transparent (alpha below
    half), they are kept, and the rest is repainted if it is of one colour, as in a layer that was
    drawn on; else it must be black, white and grey, and is a mask of its own.

    Args:
      text: a file, as of `open_picture`, of the picture's size; or "box:LEFT,TOP,RIGHT,BOTTOM"; or
        "polygon:X,Y X,Y X,Y ...", three corners or more. Numbers count pixels of the whole upright
        picture from its upper left corner, may have fractions, and may reach outside.
      picture_size: `size` of the picture.
      shape: `(H, W, C)` of the model's images, H = W.

    Returns:
      `[H, W]` bool, true = repaint.

    Raises:
      InputError: the text or the file is no such mask, or nothing would be repainted.
    """
    side, text = _side(shape), os.fspath(text)
    if text.startswith(DRAWN):
        try:
            corners = _corners(text, picture_size)
        except InputError as error:
            raise InputError(f"mask {_shown(text)}: {error}") from error
        resized = np.array(pixels.resized_size(picture_size, side))
        fitted = masks.polygon(
            corners * (resized / np.array(picture_size)) - (resized - side) // 2, side, side
        )
    else:
        fitted = _fit(_read_mask(text, picture_size), side)
    if not fitted.any():
        raise InputError(
            f"mask {_shown(text)}: nothing to repaint: it marks nothing in the middle square of "
            "the picture, which is all that the model sees; crop the picture around it first"
        )
    return fitted


def _side(shape: tuple[int, int, int]) -> int:
    height, width, channels = shape
    if height != width or channels not in (1, 3):
        raise InputError(
            f"this model's images are [{height}, {width}, {channels}]; pictures are fitted only "
            "to square images of 1 or 3 channels"
        )
    return height


def _read(path: str | os.PathLike[str]) -> _Layers:
    with open_unnamed(os.path.expanduser(os.fspath(path))) as file:
        if os.fstat(file.fileno()).st_size > MAX_FILE:
            raise UnreadableError(f"it has more than {MAX_FILE} bytes, too many for an image")
        content = file.read()
    return pixels.opened(content, lambda image: _layers(image, content))


def _cannot_read(path: str | os.PathLike[str], error: Exception) -> str:
    remedy = "; give a whole PNG, JPEG or WebP file" if isinstance(error, UnreadableError) else ""
    return f"cannot read {_shown(os.fspath(path))}: {error}{remedy}"


def _shown(text: str) -> str:
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return text if text.isprintable() else ascii(text)


def _layers(image: "PIL.Image.Image", content: bytes) -> _Layers:
    image.load()
    depth = content[DEPTH] if image.format == "PNG" else 8
    image = _upright(image)
    alpha = _alpha(image, depth)
    deep = np.asarray(image) if image.mode.startswith("I") else None
    return _Layers(pixels.rgb(image), deep, alpha)


def _upright(image: "PIL.Image.Image") -> "PIL.Image.Image":
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(ORIENTATION)
    except pixels.DAMAGE:  # the metadata's; the pixels are sound
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _alpha(image: "PIL.Image.Image", depth: int) -> UInt8[np.ndarray, "height width"] | None:
    """Alpha of a loaded image: its channel, or that of the colour it declares transparent."""
    if image.mode in ("LA", "RGBA"):
        return np.asarray(image.getchannel("A"))
    key = image.info.get("transparency")
    if key is None or isinstance(key, str):  # a PNG's text may be called so too
        return None
    values = np.asarray(image)
    if image.mode == "P":
        table = np.full(256, 255, np.uint8)
        if isinstance(key, bytes):
            table[: len(key)] = np.frombuffer(key, np.uint8)[:256]
        else:
            table[key] = 0
        return table[values]
    key = np.array(key)
    if values.dtype == np.uint8:  # Pillow has scaled the pixels to 8 bits, but not the key
        key = key >> 8 if depth == 16 else key * FULL.get(depth, 1)
    same = values == key.astype(values.dtype)
    return np.where(same.all(axis=-1) if same.ndim == 3 else same, 0, 255).astype(np.uint8)


def _over_white(
    colour: "PIL.Image.Image", alpha: UInt8[np.ndarray, "height width"]
) -> "PIL.Image.Image":
    import PIL.Image

    white = PIL.Image.new("RGB", colour.size, "white")
    white.paste(colour, mask=PIL.Image.fromarray(alpha))
    return white


def _grey(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width"]:
    import PIL.Image

    return np.asarray(PIL.Image.fromarray(image).convert("L"))


def _read_mask(path: str, picture_size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Which pixels of the whole picture a file marks."""
    try:
        layers = _read(path)
    except (InputError, UnreadableError, OSError) as error:
        raise InputError(_cannot_read(path, error)) from error
    size = layers.colour.size
    if size != tuple(picture_size):
        raise InputError(
            f"mask {_shown(path)} is {size[0]} x {size[1]} pixels, the picture is "
            f"{picture_size[0]} x {picture_size[1]}; a mask has its picture's size"
        )
    colour = np.asarray(layers.colour)
    values = _grey(colour) if layers.deep is None else layers.deep
    try:
        marked = masks.painted(colour, values, layers.alpha)
    except InputError as error:
        raise InputError(f"mask {_shown(path)}: {error}") from error
    if not marked.any():
        raise InputError(
            f"mask {_shown(path)}: nothing to repaint: it has no white; paint white what is to "
            "be repainted, and the rest black"
        )
    return marked


def _fit(mask: Bool[np.ndarray, "rows columns"], side: int) -> Bool[np.ndarray, "height width"]:
    """Cuts and scales a mask as `pixels.centre_crop` does its picture."""
    height, width = mask.shape
    columns, rows = pixels.resized_size((width, height), side)

    def spans(length: int, resized: int) -> list[tuple[int, int]]:
        first = (resized - side) // 2
        edges = [(i * length, (i + 1) * length) for i in range(first, first + side)]
        return [(start // resized, -(-end // resized)) for start, end in edges]  # end: rounded up

    kept = np.stack([mask[start:end].any(axis=0) for start, end in spans(height, rows)])
    kept = [kept[:, start:end].any(axis=1) for start, end in spans(width, columns)]
    return np.stack(kept, axis=1)


def _corners(text: str, size: tuple[int, int]) -> Float64[np.ndarray, "corners 2"]:
    """The corners of a box or polygon, in pixels of the whole picture."""
    kind, _, argument = text.partition(":")
    numbers = [_number(word) for word in re.split(r"\s*[,;]\s*|\s+", argument.strip())]
    if kind == "box":
        if len(numbers) != 4:
            raise InputError(f"wanted are LEFT,TOP,RIGHT,BOTTOM, got {len(numbers)} number(s)")
        left, top, right, bottom = numbers
        if left >= right or top >= bottom:
            raise InputError("it has no area; RIGHT must exceed LEFT, and BOTTOM exceed TOP")
        numbers = [left, top, right, top, right, bottom, left, bottom]
    if len(numbers) < 6 or len(numbers) % 2:
        raise InputError(f"wanted are X,Y of three corners or more, got {len(numbers)} number(s)")
    corners = np.array(numbers).reshape(-1, 2)
    (x, y) = edges = corners.T - corners[:1].T
    far = edges[:, np.argmax(x**2 + y**2)]
    if np.abs(x * far[1] - y * far[0]).max() <= FLAT * (far @ far):
        raise InputError("it has no area: its corners lie on one line")
    if (corners.max(axis=0) <= 0).any() or (corners.min(axis=0) >= size).any():
        raise InputError(f"it lies outside the picture, which is {size[0]} x {size[1]} pixels")
    return corners


def _number(word: str) -> float:
    number = float(word) if NUMBER.fullmatch(word) else math.nan
    if not abs(number) <= FAR:
        raise InputError(f"{word[:20]!r} is no number of pixels")
    return number
