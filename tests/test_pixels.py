"""Decoding image files to RGB and ADM's crop; damaged files are unreadable, nothing worse."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from flowturbo_jax.data import UnreadableError, pixels


def noise(width, height, channels=3):
    generator = np.random.default_rng([width, height, channels])
    return generator.integers(0, 256, (height, width, channels), np.uint8).squeeze()


def encode(image, file_format="PNG", **options):
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode_bytes(content, size):
    """The decoded pixels as bytes again."""
    decoded = pixels.decode(content, size)
    assert (decoded.shape, decoded.dtype) == ((size, size, 3), np.float32)
    assert -1.0 <= decoded.min() <= decoded.max() <= 1.0
    return np.round((decoded + 1) * 127.5).astype(np.uint8)


def adm_center_crop(pil_image, image_size):
    """As guided-diffusion's image_datasets.py writes it."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(
            tuple(x // 2 for x in pil_image.size), resample=PIL.Image.Resampling.BOX
        )
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(
        tuple(round(x * scale) for x in pil_image.size), resample=PIL.Image.Resampling.BICUBIC
    )
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


SIDES = [(16, 16), (17, 16), (31, 33), (64, 64), (65, 130), (201, 75), (75, 201), (129, 127)]


@pytest.mark.parametrize(("width", "height"), [*SIDES, (5, 9), (9, 4), (1, 1), (1, 7)])
def test_crop_matches_adm(width, height):
    image = PIL.Image.fromarray(noise(width, height).reshape(height, width, 3))
    for size in (1, 8, 15, 16):
        expected = adm_center_crop(image, size)
        np.testing.assert_array_equal(pixels.centre_crop(image, size), expected)
        np.testing.assert_array_equal(decode_bytes(encode(image), size), expected)
        exact = expected.astype(np.float32) / 127.5 - 1
        np.testing.assert_array_equal(pixels.decode(encode(image), size), exact)


def test_an_image_of_the_wanted_size_is_not_touched():
    image = noise(12, 12)
    np.testing.assert_array_equal(decode_bytes(encode(image), 12), image)


def test_the_middle_is_kept_with_the_odd_pixel_below_and_right():
    wide, tall = noise(17, 12), noise(12, 17)
    np.testing.assert_array_equal(decode_bytes(encode(wide), 12), wide[:, 2:14])
    np.testing.assert_array_equal(decode_bytes(encode(tall), 12), tall[2:14])


def test_pixels_span_minus_one_to_one():
    black_and_white = np.repeat([[[0] * 3, [255] * 3]], 2, axis=0).astype(np.uint8)
    decoded = pixels.decode(encode(black_and_white), 2)
    np.testing.assert_array_equal(decoded[0], [[-1.0] * 3, [1.0] * 3])


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_keep_every_byte(file_format):
    image = noise(9, 9)
    options = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(decode_bytes(encode(image, file_format, **options), 9), image)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_decoded_as_pillow_does(progressive):
    content = encode(noise(40, 40), "JPEG", quality=90, progressive=progressive)
    with PIL.Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(decode_bytes(content, 40), np.asarray(image))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP"])
def test_grey_gets_three_channels(file_format):
    ramp = np.repeat(np.arange(0, 256, 16, dtype=np.uint8)[:, None], 16, axis=1)
    decoded = decode_bytes(encode(ramp, file_format), 16)
    # Flat rows survive JPEG up to its rounding.
    np.testing.assert_allclose(decoded, np.repeat(ramp[..., None], 3, 2), atol=2)


def test_black_and_white_is_zero_and_255():
    mask = noise(8, 8, 1) > 127
    decoded = decode_bytes(encode(PIL.Image.fromarray(mask)), 8)
    np.testing.assert_array_equal(decoded, np.repeat(mask[..., None] * np.uint8(255), 3, 2))


def test_sixteen_bits_of_grey_keep_their_eight_highest():
    grey = noise(8, 8, 1)
    decoded = decode_bytes(encode(grey.astype(np.uint16) * 257), 8)
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, 2))


def test_sixteen_bits_of_colour_keep_their_eight_highest():
    image = noise(6, 6)
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in image)
    header = struct.pack(">IIBBBBB", 6, 6, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )
    np.testing.assert_array_equal(decode_bytes(content, 6), image)


def test_transparency_is_dropped():
    image = noise(8, 8, 4)
    np.testing.assert_array_equal(decode_bytes(encode(image), 8), image[..., :3])
    lossless = encode(image, "WEBP", lossless=True, exact=True)
    np.testing.assert_array_equal(decode_bytes(lossless, 8), image[..., :3])
    grey_and_alpha = PIL.Image.fromarray(image[..., :2], "LA")
    grey = np.repeat(image[..., :1], 3, 2)
    np.testing.assert_array_equal(decode_bytes(encode(grey_and_alpha), 8), grey)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(40, 104))])
@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette_images_show_their_colours(file_format, transparency):
    if file_format == "GIF" and isinstance(transparency, bytes):
        transparency = 63
    palette = noise(8, 8)  # 64 colours
    image = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(decode_bytes(encode(image, file_format, **options), 8), palette)


@pytest.mark.parametrize("transparency", [(1, 2, 3), (65535, 65535, 65535)])
def test_a_transparent_colour_changes_nothing(transparency):
    image = noise(8, 8)
    content = encode(image, transparency=transparency)
    np.testing.assert_array_equal(decode_bytes(content, 8), image)
    grey = encode(noise(8, 8, 1), transparency=transparency[0])
    np.testing.assert_array_equal(decode_bytes(grey, 8), np.repeat(noise(8, 8, 1)[..., None], 3, 2))


def test_cmyk_comes_out_in_its_colours():
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "white": (255, 255, 255)}
    for colour in colours.values():
        plain = PIL.Image.new("RGB", (16, 16), colour).convert("CMYK")
        decoded = decode_bytes(encode(plain, "JPEG", quality=95), 16)
        np.testing.assert_allclose(decoded, np.broadcast_to(colour, decoded.shape), atol=3)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(file_format):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    decoded = decode_bytes(content, 8)
    np.testing.assert_array_equal(decoded, np.broadcast_to([255, 0, 0], decoded.shape))


def test_the_file_is_known_by_its_bytes_alone():
    # ImageNet holds a PNG called .JPEG.
    contents = [encode(noise(8, 8), kind) for kind in ("PNG", "BMP", "JPEG", "WEBP", "GIF")]
    assert all(pixels.decode(content, 8).shape == (8, 8, 3) for content in contents)


SMALL = {
    "jpeg": encode(noise(9, 7), "JPEG"),
    "progressive": encode(noise(9, 7), "JPEG", progressive=True),
    "png": encode(noise(9, 7)),
    "palette": encode(PIL.Image.fromarray(noise(9, 7)).quantize(8), transparency=b"\0\1"),
    "webp": encode(noise(9, 7), "WEBP"),
    "lossless": encode(noise(9, 7, 4), "WEBP", lossless=True),
    "bmp": encode(noise(9, 7), "BMP"),
    "gif": encode(noise(9, 7), "GIF"),
}


def decode_or_reason(content):
    """The pixels, or why there are none."""
    try:
        return pixels.decode(content, 4)
    except UnreadableError as error:
        return str(error)


@pytest.mark.parametrize("kind", SMALL)
def test_a_file_cut_anywhere_is_unreadable_or_whole(kind):
    content = SMALL[kind]
    whole = pixels.decode(content, 4)
    results = [decode_or_reason(content[:length]) for length in range(len(content))]
    reasons = [result for result in results if isinstance(result, str)]
    assert all(reason.isprintable() and len(reason) < 160 for reason in reasons)
    # The checksums and end marks after the pixels are not missed: 24 bytes in a PNG.
    assert len(reasons) >= len(content) - 24
    for result in results:
        assert isinstance(result, str) or (result == whole).all()


@pytest.mark.parametrize("kind", SMALL)
def test_damaged_bytes_are_unreadable_or_decode(kind):
    generator = np.random.default_rng(7)
    for _ in range(100):
        content = np.frombuffer(SMALL[kind], np.uint8).copy()
        places = generator.integers(0, len(content), 4)
        content[places] = generator.integers(0, 256, 4)
        result = decode_or_reason(content.tobytes())
        assert result.isprintable() if isinstance(result, str) else result.shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\0" * 100, "it is no JPEG, PNG, WebP, BMP or GIF image"),
        (b"hello", "it is no JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no JPEG"),  # runs Ghostscript
        (SMALL["jpeg"][:200], "the image is damaged|it is no JPEG"),
        (SMALL["png"][:100], "the image is damaged"),
    ],
)
def test_what_is_no_image_is_unreadable_and_says_so(content, message):
    with pytest.raises(UnreadableError, match=message):
        pixels.decode(content, 8)


@pytest.mark.parametrize(("width", "height"), [(11, 10), (30, 10)])
def test_images_above_pillows_limit_are_unreadable(monkeypatch, width, height):
    # Pillow warns from the limit on and refuses from twice the limit on.
    content = encode(noise(width, height))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableError, match="more than 100 pixels"):
        pixels.decode(content, 8)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert pixels.decode(content, 8).shape == (8, 8, 3)


def test_a_sliver_that_would_become_huge_is_unreadable(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10_000)
    assert pixels.decode(encode(noise(3, 4)), 64).shape == (64, 64, 3)
    with pytest.raises(UnreadableError, match="64 x 5824 is more than 10000 pixels"):
        pixels.decode(encode(noise(1, 91).reshape(91, 1, 3)), 64)


def with_corrupt_exif():
    """A JPEG whose EXIF data promise more than there is; without them Pillow reads no density."""
    field = struct.pack("<HHLL", 0x010E, 2, 4000, 1_000)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + field + b"\0\0\0\0"
    content = encode(noise(8, 8), "JPEG")
    jfif = 4 + struct.unpack(">H", content[4:6])[0]
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[jfif:]


def test_pillows_warnings_do_not_get_out():
    content = with_corrupt_exif()
    # Two versions of Pillow, two wordings.
    with pytest.warns(UserWarning, match="EXIF|Truncated"), PIL.Image.open(io.BytesIO(content)):
        pass
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        assert pixels.decode(content, 8).shape == (8, 8, 3)
        warnings.simplefilter("always")  # as a caller may, in between
        assert pixels.decode(content, 8).shape == (8, 8, 3)
    assert caught == []


def test_other_warnings_still_get_out():
    pixels.decode(SMALL["png"], 4)
    with pytest.warns(UserWarning, match="of the caller"):
        warnings.warn("of the caller", UserWarning, stacklevel=1)


def test_several_threads_decode_the_same():
    expected = {kind: pixels.decode(content, 8) for kind, content in SMALL.items()}
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            decoded = pool.map(lambda content: pixels.decode(content, 8), SMALL.values())
            for kind, result in zip(SMALL, decoded, strict=True):
                np.testing.assert_array_equal(result, expected[kind])
