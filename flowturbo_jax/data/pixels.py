"""Image files turned into training pixels: decoded to RGB, then ADM's centre crop."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, UInt8

from flowturbo_jax.data.source import UnreadableError

if TYPE_CHECKING:
    import PIL.Image

# What is looked for in the bytes; a file's name does not matter. Nothing else, because Pillow knows
# formats that start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
PILLOW = r"PIL\."  # its modules
SILENCE = ("ignore", None, Warning, re.compile(PILLOW), 0)  # as `warnings` stores that filter
REASON = 120  # letters of Pillow's own words in an error
# What Pillow raises, or has raised, for damaged files; anything else is a defect and shows.
DAMAGE = (
    OSError,  # truncated, not an image
    SyntaxError,  # a broken PNG chunk or JPEG marker
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    EOFError,  # no first frame
    struct.error,
    zlib.error,
)


def decode(content: bytes, image_size: int) -> Float32[np.ndarray, "height width 3"]:
    """Decodes an image file into the pixels a model trains on.

        x = byte / 127.5 − 1

    Args:
      content: a whole JPEG, PNG, WebP, BMP or GIF file.
      image_size: side of the square to crop, in pixels; 0 for the image as it is.

    Returns:
      `[image_size, image_size, 3]` float32, RGB pixels in [-1, 1]; `[H, W, 3]` uncropped.

    Raises:
      UnreadableError: it is no such file, damaged, or too large.
    """
    image = open_rgb(content)
    cropped = centre_crop(image, image_size) if image_size else np.asarray(image)
    return cropped.astype(np.float32) / 127.5 - 1.0


def open_rgb(content: bytes) -> "PIL.Image.Image":
    """Decodes an image file into an RGB picture.

    Grey and palette images get three channels, CMYK is converted, 16 bits become 8, transparency is
    dropped (what lies beneath shows), and of an animation the first frame is taken. Colour profiles
    and the camera's orientation are not applied, as in ADM.

    Args:
      content: a whole JPEG, PNG, WebP, BMP or GIF file.

    Raises:
      UnreadableError: it is no such file, damaged, or has more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    return opened(content, rgb)


def opened(content: bytes, use: Callable[["PIL.Image.Image"], Any]) -> Any:
    """Opens an image file for a function, and returns what the function makes of it.

    Pillow's warnings are silenced from the first call on: they are about metadata, without which
    an image is as good. What its warning about large images is about is an error here.

    Args:
      content: a whole JPEG, PNG, WebP, BMP or GIF file.
      use: takes the picture, whose pixels are not loaded yet. What Pillow raises in it is damage.

    Raises:
      UnreadableError: it is no such file, damaged, or has more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    import PIL.Image

    _silence_pillow()
    if not content:
        raise UnreadableError("the file is empty")
    try:
        with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _refuse_large(image.size)
            return use(image)
    except PIL.UnidentifiedImageError as error:
        raise UnreadableError("it is no JPEG, PNG, WebP, BMP or GIF image") from error
    except PIL.Image.DecompressionBombError as error:
        raise UnreadableError(f"it has more than {PIL.Image.MAX_IMAGE_PIXELS} pixels") from error
    except DAMAGE as error:
        words = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise UnreadableError(f"the image is damaged ({words})") from error


def centre_crop(image: "PIL.Image.Image", image_size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Scales an image until its short side fits, and crops the middle square.

    The image is halved by averaging (box filter) while it is at least twice too large, resized
    (bicubic) to a short side of `image_size`, and cropped.

    Args:
      image: an RGB picture.
      image_size: side of the square, in pixels, >= 1.

    Returns:
      `[image_size, image_size, 3]` uint8.

    Raises:
      UnreadableError: the image is so long and narrow that it would be too large once resized.

    Source: `center_crop_arr` in guided-diffusion's `image_datasets.py` (ADM), which DiT and SiT
      train with too; the result is the same to the last bit.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * image_size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Resampling.BOX)
    size = resized_size(image.size, image_size)
    _refuse_large(size)
    pixels = np.asarray(image.resize(size, resample=Resampling.BICUBIC))
    top, left = ((side - image_size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


def resized_size(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """The size that `centre_crop` scales an image to before it crops.

    Args:
      size: width and height of the image, in pixels.
      image_size: side of the square, in pixels, >= 1.

    Returns:
      Width and height; the square's left and top are half of what they exceed it by, rounded down.
    """
    while min(size) >= 2 * image_size:
        size = (size[0] // 2, size[1] // 2)
    scale = image_size / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Turns an opened image into RGB of 8 bits, as `open_rgb` describes."""
    import PIL.Image

    image.load()
    # The transparent colour of a file without an alpha channel. Converting does not need it, but
    # fails on odd ones.
    image.info.pop("transparency", None)
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip at 255
        grey = np.clip(np.asarray(image, np.float32) / 257.0, 0, 255)  # 65535 / 257 = 255
        image = PIL.Image.fromarray(np.round(grey).astype(np.uint8))
    return image.convert("RGB")


def _refuse_large(size: tuple[int, ...]) -> None:
    import PIL.Image

    limit = PIL.Image.MAX_IMAGE_PIXELS  # None where the user took the limit away
    if limit is not None and size[0] * size[1] > limit:
        raise UnreadableError(f"{size[0]} x {size[1]} is more than {limit} pixels")


def _silence_pillow() -> None:
    # Not `warnings.catch_warnings`, which is not safe in threads. Looked at each time, because
    # whoever else uses catch_warnings takes the filter away; added only where it is not the first,
    # because every change makes Python repeat warnings it has shown before.
    if warnings.filters[:1] != [SILENCE]:
        warnings.filterwarnings("ignore", module=PILLOW)
