"""Users' pictures and masks as files: upright, over white, fitted together, refused in a line."""

import io
import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from PIL.ImageOps import exif_transpose
from PIL.PngImagePlugin import PngInfo

from flowturbo_jax import pictures
from flowturbo_jax.data import pixels
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pictures import open_mask, open_picture

ORIENTATION = 0x0112
MARK = np.array([[9, 200, 90], [60, 150, 30]], np.uint8)  # no two turns of it are the same
AS_STORED = {  # what a camera stores of an upright picture, by its orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def noise(width, height, channels=3):
    generator = np.random.default_rng([width, height, channels])
    return generator.integers(0, 256, (height, width, channels), np.uint8).squeeze()


def encode(image, file_format="PNG", **options):
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(header, rows, *chunks):
    """A PNG file of (width, height, depth, colour type), rows of bytes, and (kind, body) chunks."""
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)), *chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (*parts, (b"IDAT", body), (b"IEND", b""))
    )


@pytest.fixture
def picture(tmp_path):
    """Opens a file of the given content for a model of the given side."""

    def opened(content, side, channels=3):
        path = tmp_path / "picture"
        path.write_bytes(content)
        result = open_picture(path, (side, side, channels))
        assert (result.pixels.shape, result.pixels.dtype) == ((side, side, channels), np.uint8)
        return result

    return opened


@pytest.fixture
def mask(tmp_path):
    """Opens a mask of the given content, for a picture of the mask's size unless it is given."""

    def opened(content, side, size=None):
        path = tmp_path / "mask"
        path.write_bytes(content)
        if size is None:
            size = upright_size(content)
        result = open_mask(path, size, (side, side, 3))
        assert (result.shape, result.dtype) == ((side, side), np.bool_)
        return result

    return opened


def upright_size(content):
    with PIL.Image.open(io.BytesIO(content)) as image:
        return image.size[::-1] if image.getexif().get(ORIENTATION, 1) > 4 else image.size


def with_orientation(image, orientation, file_format="PNG", **options):
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(np.ascontiguousarray(image), file_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_upright(picture, orientation, file_format):
    upright = MARK.repeat(16, 0).repeat(16, 1)  # JPEG keeps even blocks
    options = {"lossless": True} if file_format == "WEBP" else {"quality": 95}
    stored = AS_STORED[orientation](upright)
    result = picture(with_orientation(stored, orientation, file_format, **options), 32, 1)
    assert result.size == (48, 32)
    np.testing.assert_allclose(result.pixels[..., 0].astype(int), upright[:, 8:40], atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow(picture, orientation):
    content = with_orientation(noise(9, 6), orientation)
    with PIL.Image.open(io.BytesIO(content)) as image:
        turned = exif_transpose(image).convert("RGB")
    result = picture(content, 6)
    assert result.size == turned.size
    np.testing.assert_array_equal(result.pixels, pixels.centre_crop(turned, 6))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff", b"Exif\0\0nonsense", b"", b"\0"])
def test_corrupt_exif_data_leave_the_picture_as_it_is(picture, exif):
    image = noise(8, 8)
    np.testing.assert_array_equal(picture(encode(image, exif=exif), 8).pixels, image)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP"])
def test_a_picture_of_the_models_size_keeps_its_bytes(picture, file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = noise(10, 10)
    result = picture(encode(image, file_format, **options), 10)
    np.testing.assert_array_equal(result.pixels, image)
    assert result.size == (10, 10)
    grey = noise(10, 10, 1)
    content = encode(grey, file_format, **options)
    np.testing.assert_array_equal(picture(content, 10, 1).pixels[..., 0], grey)
    np.testing.assert_array_equal(picture(content, 10).pixels, np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("file_format", ["JPEG", "GIF"])
def test_jpeg_and_gif_are_decoded_as_pillow_does(picture, file_format):
    content = encode(noise(20, 20), file_format)
    with PIL.Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(picture(content, 20).pixels, image.convert("RGB"))


def test_colours_become_grey_by_itu_601(picture):
    image = noise(10, 10)
    grey = picture(encode(image), 10, 1).pixels[..., 0]
    np.testing.assert_allclose(grey, image @ [0.299, 0.587, 0.114], atol=0.51)


SIZES = [(40, 40), (33, 70), (131, 67), (5, 9), (3, 2)]


@pytest.mark.parametrize(("width", "height"), [*SIZES, (70, 33), (1, 1)])
def test_other_sizes_are_cropped_and_scaled_up_or_down(picture, width, height):
    image = PIL.Image.fromarray(noise(width, height).reshape(height, width, 3))
    result = picture(encode(image), 16)
    assert result.size == (width, height)
    np.testing.assert_array_equal(result.pixels, pixels.centre_crop(image, 16))


def over_white(colour, alpha):
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparency_is_filled_with_white(picture, file_format):
    image = noise(12, 12, 4)
    image[..., 3] = np.resize([0, 255, 128, 7], (12, 12))
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    result = picture(encode(image, file_format, **options), 12).pixels
    np.testing.assert_allclose(result, over_white(image[..., :3], image[..., 3]), atol=1)
    np.testing.assert_array_equal(result[image[..., 3] == 255], image[image[..., 3] == 255][:, :3])
    assert (result[image[..., 3] == 0] == 255).all()


def test_grey_with_alpha_is_filled_with_white(picture):
    grey, alpha = noise(8, 8, 1), np.resize(np.uint8([0, 255, 60]), (8, 8))
    result = picture(encode(PIL.Image.fromarray(np.stack([grey, alpha], -1), "LA")), 8, 1).pixels
    np.testing.assert_allclose(result, over_white(grey[..., None], alpha), atol=1)


@pytest.mark.parametrize("key", [3, bytes(range(40, 104))])
@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_transparent_palette_entries_are_filled_with_white(picture, file_format, key):
    if file_format == "GIF" and isinstance(key, bytes):
        key = 63
    palette = noise(8, 8)  # 64 colours
    image = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    image.putpalette(palette.tobytes())
    alpha = np.full(64, 255)
    alpha[key if isinstance(key, int) else slice(64)] = 0 if isinstance(key, int) else list(key)
    result = picture(encode(image, file_format, transparency=key), 8).pixels
    np.testing.assert_allclose(result, over_white(palette, alpha.reshape(8, 8)), atol=1)


@pytest.mark.parametrize(
    ("side", "depth", "kind", "row", "key", "expected"),
    [
        (4, 8, 0, [0, 85, 170, 255], [0, 85], [0, 255, 170, 255]),
        (4, 1, 0, [0b01010000], [0, 0], [255, 255, 255, 255]),
        (4, 2, 0, [0b00011011], [0, 1], [0, 255, 170, 255]),
        (4, 4, 0, [0x05, 0xAF], [0, 5], [0, 255, 170, 255]),
        (4, 16, 0, [0, 0, 0, 85, 85, 85, 170, 170], [0, 85], [0, 255, 85, 170]),
        (2, 8, 2, [1, 2, 3, 1, 2, 4], [0, 1, 0, 2, 0, 3], [255, 255, 255, 1, 2, 4]),
        (2, 16, 2, [9, 8] * 3 + [7, 0] * 3, [9, 8] * 3, [255, 255, 255, 7, 7, 7]),
    ],
)
def test_the_transparent_colour_of_a_png_is_white_at_every_depth(
    picture, side, depth, kind, row, key, expected
):
    content = png((side, side, depth, kind), [bytes(row)] * side, (b"tRNS", bytes(key)))
    result = picture(content, side).pixels
    expected = np.reshape(expected, (1, side, -1))  # each row, of one channel or three
    np.testing.assert_array_equal(result, np.broadcast_to(expected, result.shape))


def test_sixteen_bits_are_scaled_and_not_clipped(picture):
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(picture(encode(grey), 16, 1).pixels[..., 0], expected)
    image = noise(6, 6)
    rows = [(row.astype(">u2") * 257).tobytes() for row in image]
    np.testing.assert_array_equal(picture(png((6, 6, 16, 2), rows), 6).pixels, image)
    turned = with_orientation(np.rot90(grey), 6)
    np.testing.assert_array_equal(picture(turned, 16, 1).pixels[..., 0], expected)


def test_black_and_white_is_zero_and_255(picture):
    image = noise(8, 8, 1) > 127
    result = picture(encode(PIL.Image.fromarray(image)), 8, 1).pixels[..., 0]
    np.testing.assert_array_equal(result, image * np.uint8(255))


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)])
def test_cmyk_comes_out_in_its_colours(picture, colour):
    # Pillow writes Adobe's marker, and inverted values as Photoshop does.
    content = encode(PIL.Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in content
    result = picture(content, 16).pixels
    np.testing.assert_allclose(result.astype(int), np.broadcast_to(colour, (16, 16, 3)), atol=3)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "MPO"])
def test_of_several_frames_the_first_is_taken(picture, file_format):
    frames = [PIL.Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    result = picture(content, 16).pixels.astype(int)
    np.testing.assert_allclose(result, np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=2)


def test_the_content_counts_and_not_the_name(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(noise(8, 8)))
    np.testing.assert_array_equal(open_picture(str(path), (8, 8, 3)).pixels, noise(8, 8))


def test_the_text_of_a_png_cannot_pose_as_its_metadata(picture):
    info = PngInfo()
    for key in ("transparency", "exif", "xmp", "Raw profile type exif"):
        info.add_text(key, "\n\n\n9")
    image = noise(8, 8)
    np.testing.assert_array_equal(picture(encode(image, pnginfo=info), 8).pixels, image)


SMALL = {
    "jpeg": encode(noise(9, 7), "JPEG"),
    "turned": with_orientation(noise(9, 7), 6, "JPEG"),
    "png": encode(noise(9, 7)),
    "alpha": with_orientation(noise(9, 7, 4), 3),
    "deep": encode(noise(9, 7, 1).astype(np.uint16) * 257),
    "palette": encode(PIL.Image.fromarray(noise(9, 7)).quantize(8), transparency=b"\0\1"),
    "webp": encode(noise(9, 7), "WEBP"),
    "lossless": encode(noise(9, 7, 4), "WEBP", lossless=True),
    "gif": encode(noise(9, 7), "GIF", transparency=3),
    "bmp": encode(noise(9, 7), "BMP"),
}
WHOLE = "give a whole PNG, JPEG or WebP file"


def refused(opener):
    """The refusal, which is one line and names the file; None where there is none."""
    try:
        opener()
    except InputError as error:
        line = str(error)
    else:
        return None
    assert line.isprintable()
    assert "picture" in line or "mask" in line
    return line


@pytest.mark.parametrize("kind", SMALL)
def test_a_file_cut_anywhere_is_refused_in_a_line_or_whole(picture, mask, kind):
    content, size = SMALL[kind], upright_size(SMALL[kind])
    lines = [refused(lambda n=n: picture(content[:n], 4)) for n in range(len(content))]
    assert sum(line is not None and WHOLE in line for line in lines) >= len(content) - 24
    for length in range(0, len(content), 7):
        line = refused(lambda n=length: mask(content[:n], 4, size))
        assert line is None or WHOLE in line or "several colours" in line


@pytest.mark.parametrize("kind", SMALL)
def test_damaged_bytes_are_refused_in_a_line_or_decode(picture, mask, kind):
    generator = np.random.default_rng(7)
    for _ in range(150):
        content = np.frombuffer(SMALL[kind], np.uint8).copy()
        content[generator.integers(0, len(content), 4)] = generator.integers(0, 256, 4)
        refused(lambda: picture(content.tobytes(), 4))  # noqa: B023  (called at once)
        refused(lambda: mask(content.tobytes(), 4, (9, 7)))  # noqa: B023


def open_mask_of_8(path, shape):
    return open_mask(path, (8, 8), shape)


@pytest.mark.parametrize("opener", [open_picture, open_mask_of_8])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello", "it is no JPEG, PNG, WebP, BMP or GIF image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no JPEG"),
        (encode(noise(8, 8), "TIFF"), "it is no JPEG"),
        (encode(noise(8, 8))[:60], "the image is damaged"),
        (png((200_000, 200_000, 8, 2), [b""]), "more than [0-9]+ pixels"),
        (png((12_000, 12_000, 8, 2), [b""]), "12000 x 12000 is more than [0-9]+ pixels"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, opener, content, message):
    path = tmp_path / "name.png"
    path.write_bytes(content)
    wanted = rf"^cannot read .*name\.png: .*{message}.*; {WHOLE}$"
    with pytest.raises(InputError, match=wanted):
        opener(path, (64, 64, 3))


def test_a_picture_too_narrow_to_scale_is_refused(picture):
    content = encode(np.zeros((2_000_000, 1), np.uint8))
    with pytest.raises(InputError, match=r"picture: 64 x 128000000 is more than [0-9]+ pixels"):
        picture(content, 64)


def no_permission(*_):
    raise PermissionError(13, "Permission denied")


def test_what_is_no_readable_file_is_refused_by_name(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    wanted = {
        tmp_path / "nothing": "No such file",
        tmp_path: "it is a folder",
        tmp_path / "pipe": "it is no regular file",
        "/dev/zero": "it is no regular file",
        "a\0b": "no file can have such a name",
        "two\nlines": "No such file",
        "": "No such file",
    }
    for path, message in wanted.items():
        for opener in (open_picture, open_mask_of_8):
            with pytest.raises(InputError, match=f"^cannot read .*{message}") as caught:
                opener(path, (8, 8, 3))
            assert str(caught.value).isprintable()
    (tmp_path / "secret").write_bytes(SMALL["png"])
    monkeypatch.setattr(os, "open", no_permission)
    with pytest.raises(InputError, match=r"^cannot read .*secret: Permission denied"):
        open_picture(tmp_path / "secret", (8, 8, 3))


def test_a_file_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(SMALL["png"])
    os.truncate(path, pictures.MAX_FILE + 1)  # takes no room on the disk
    with pytest.raises(InputError, match=r"picture: it has more than [0-9]+ bytes"):
        open_picture(path, (8, 8, 3))


def test_the_home_folder_has_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "picture.png").write_bytes(encode(noise(8, 8)))
    assert open_picture("~/picture.png", (8, 8, 3)).size == (8, 8)


@pytest.mark.parametrize("shape", [(8, 16, 3), (8, 8, 4), (8, 8, 2)])
def test_models_that_no_picture_fits_are_refused(shape):
    message = rf"this model's images are \[{', '.join(map(str, shape))}\]; .*square"
    with pytest.raises(InputError, match=message):
        open_picture("picture.png", shape)
    with pytest.raises(InputError, match=message):
        open_mask("box:0,0,1,1", (8, 8), shape)


# Masks


def grid(*rows):
    return np.array([[letter == "#" for letter in row] for row in rows])


@pytest.mark.parametrize(("black", "white"), [(0, 255), (0, 1), (3, 7), (254, 255)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_of_two_values_the_brighter_is_repainted(mask, black, white, dtype):
    drawn = noise(8, 8, 1) > 127
    content = encode(np.where(drawn, white, black).astype(dtype))
    np.testing.assert_array_equal(mask(content, 8), drawn)


def test_of_more_values_the_upper_half_is_repainted(mask):
    values = noise(16, 16, 1)
    np.testing.assert_array_equal(mask(encode(values), 16), values >= 128)
    deep = values.astype(np.uint16) * 256 + 255
    np.testing.assert_array_equal(mask(encode(deep), 16), values >= 128)


def test_masks_of_every_kind_of_file_agree(mask):
    drawn = MARK.repeat(8, 0).repeat(8, 1) > 100
    white = drawn * np.uint8(255)
    palette = PIL.Image.fromarray(drawn.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])  # as Pascal VOC's classes
    layer = np.zeros((*drawn.shape, 4), np.uint8)
    layer[drawn] = (200, 30, 30, 255)
    lossless = encode(white, "WEBP", lossless=True)
    for content in (
        encode(PIL.Image.fromarray(drawn)),  # 1 bit
        encode(white, "JPEG", quality=95),
        encode(white, "GIF"),
        encode(np.repeat(white[..., None], 3, 2)),
        encode(palette),
        encode(layer),
        encode(white, transparency=0),
        lossless,
        with_orientation(np.rot90(white), 6),
    ):
        assert upright_size(content) == (24, 16)
        np.testing.assert_array_equal(mask(content, 16), drawn[:, 4:20])


def test_a_fitted_pixel_is_masked_where_any_part_is(mask):
    drawn = np.zeros((64, 96), np.uint8)
    drawn[0, 16], drawn[63, 79], drawn[20, 15], drawn[31, 40] = 255, 255, 255, 255
    result = mask(encode(drawn), 8)  # 8 x 8 pixels each, the columns 16 to 79
    np.testing.assert_array_equal(np.argwhere(result), [[0, 0], [3, 3], [7, 7]])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_mask_and_picture_stay_aligned(picture, mask, width, height):
    # A white rectangle on black, and the mask of it.
    drawn = np.zeros((height, width), np.uint8)
    top, left = height // 3, width // 3
    bottom, right = top + max(height // 4, 1), left + max(width // 4, 1)
    drawn[top:bottom, left:right] = 255
    shown = picture(encode(drawn), 16, 1).pixels[..., 0]
    masked = mask(encode(drawn), 16)
    box = open_mask(f"box:{left},{top},{right},{bottom}", (width, height), (16, 16, 3))
    np.testing.assert_array_equal(masked, box)
    assert masked[shown > 128].all()  # half white is at least touched
    # Seen from outside: bicubic filtering reaches two pixels far (of the picture, if larger).
    scale = 16 / min(width, height)
    reach = int(np.ceil(2 * max(1, scale))) + 1
    near = np.pad(masked, reach)
    windows = np.lib.stride_tricks.sliding_window_view(near, (2 * reach + 1,) * 2)
    assert (shown[~windows.any(axis=(2, 3))] <= 2).all()
    rows, columns = (np.flatnonzero(masked.any(axis=axis)) for axis in (1, 0))
    middle = [(lines[0] + lines[-1] + 1) / 2 for lines in (rows, columns)]
    weight = shown / shown.sum()
    centre = [((np.arange(16) + 0.5) * weight.sum(axis=axis)).sum() for axis in (1, 0)]
    np.testing.assert_allclose(middle, centre, atol=0.75)  # outward to whole pixels


def test_where_scaling_is_exact_the_mask_is_where_the_picture_changed(picture, mask):
    drawn = np.zeros((64, 96), np.uint8)
    drawn[17:38, 30:52] = 255
    for content in (encode(drawn), with_orientation(np.rot90(drawn), 6)):
        np.testing.assert_array_equal(mask(content, 16), picture(content, 16, 1).pixels[..., 0] > 0)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("box:1,1,3,2", (4, 4), grid("....", ".##.", "....", "....")),
        ("box: 1, 1; 3 2 ", (4, 4), grid("....", ".##.", "....", "....")),
        ("box:1,1,3.01,2.01", (4, 4), grid("....", ".###", ".###", "....")),
        ("box:0.99,1e0,+1.5,1.5", (4, 4), grid("....", "##..", "....", "....")),
        ("box:-5,-5,1,1", (4, 4), grid("#...", "....", "....", "....")),
        ("box:-9,-9,99,99", (4, 4), grid("####", "####", "####", "####")),
        ("box:3,1,4,2", (6, 4), grid("....", "..#.", "....", "....")),  # cropped by one left
        ("box:3,1,4,2", (4, 6), grid("...#", "....", "....", "....")),
        ("box:2,2,4,4", (8, 8), grid("....", ".#..", "....", "....")),
        ("box:3,2,5,4", (8, 8), grid("....", ".##.", "....", "....")),
        ("box:0.5,0,1,0.5", (2, 2), grid(".#..", "....", "....", "....")),
        ("box:0.4,0,1,0.6", (2, 2), grid("##..", "##..", "....", "....")),
        ("polygon:0,0 3,3 0,3", (4, 4), grid("#...", "##..", "###.", "....")),
        ("polygon:0 0; 3 3; 0 3", (4, 4), grid("#...", "##..", "###.", "....")),
        ("polygon:0,0,3,3,0,3", (4, 4), grid("#...", "##..", "###.", "....")),
        ("polygon:2,0 8,6 2,6", (12, 8), grid("#...", "##..", "###.", "....")),
        ("polygon:-4,2 4,-6 4,2", (4, 4), grid("####", "####", "....", "....")),
    ],
)
def test_boxes_and_polygons_mark_what_they_touch(text, size, expected):
    np.testing.assert_array_equal(open_mask(text, size, (4, 4, 3)), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("box:", "'' is no number of pixels"),
        ("box:1,2,3", r"wanted are LEFT,TOP,RIGHT,BOTTOM, got 3 number\(s\)"),
        ("box:1,2,3,4,5", "wanted are .* got 5"),
        ("box:1,,3,4", "'' is no number"),
        ("box:1,2,3,x", "'x' is no number"),
        ("box:1,2,nan,4", "'nan' is no number"),
        ("box:1,2,inf,4", "'inf' is no number"),
        ("box:1,2,1e999,4", "'1e999' is no number"),
        ("box:1,2,1_0,4", "'1_0' is no number"),
        ("box:1,2,٣,4", "'٣' is no number"),
        ("box:1,2,3\x1b,4", ".*is no number"),
        ("box:3,1,2,4", "it has no area; RIGHT must exceed LEFT"),
        ("box:1,4,2,4", "it has no area; RIGHT"),
        ("box:8,0,9,1", "it lies outside the picture, which is 8 x 6 pixels"),
        ("box:0,6,1,7", "it lies outside"),
        ("box:-3,0,0,1", "it lies outside"),
        ("box:7,0,8,6", "nothing to repaint: .*middle square"),
        ("polygon:1,2 3,4", r"wanted are X,Y of three corners or more, got 4 number\(s\)"),
        ("polygon:1,2 3,4 5,6 7", r"wanted are .* got 7"),
        ("polygon:1,1 2,2 3,3", "it has no area: its corners lie on one line"),
        ("polygon:1,1 1,1 1,1", "it has no area"),
        ("polygon:9,1 12,2 10,3", "it lies outside the picture"),
        ("polygon:7,0 8,0 8,6", "nothing to repaint: .*middle square"),
        ("polygon:" + "1,2 " * 500 + "x", "'x' is no number"),
    ],
)
def test_boxes_and_polygons_that_make_no_sense_are_refused(text, message):
    with pytest.raises(InputError, match=f"^mask .*{text[:4]}.*: {message}") as caught:
        open_mask(text, (8, 6), (4, 4, 3))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_masks_of_another_size_are_refused(mask):
    with pytest.raises(InputError, match=r"mask .* is 8 x 6 pixels, the picture is 6 x 8; a mask"):
        mask(encode(noise(8, 6, 1)), 4, (6, 8))
    turned = with_orientation(noise(8, 6, 1), 6)
    assert mask(turned, 4, (6, 8)).any()
    with pytest.raises(InputError, match="is 6 x 8 pixels, the picture is 8 x 6"):
        mask(turned, 4, (8, 6))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16])
def test_all_may_be_repainted_but_not_nothing(mask, dtype):
    black = np.zeros((8, 8), dtype)
    assert mask(encode(~black), 4).all()
    with pytest.raises(InputError, match="nothing to repaint: it has no white"):
        mask(encode(black), 4)
    if dtype is not bool:
        with pytest.raises(InputError, match="nothing to repaint: it has no white"):
            mask(encode(~black // 2), 4)
    nothing_drawn = np.zeros((8, 8, 4), np.uint8)
    with pytest.raises(InputError, match="nothing to repaint: it has no white"):
        mask(encode(nothing_drawn), 4)


def test_what_the_crop_cuts_off_is_nothing_to_repaint(mask):
    drawn = np.zeros((8, 16), np.uint8)
    drawn[:, :4] = 255
    with pytest.raises(InputError, match="nothing to repaint: it marks nothing in the middle"):
        mask(encode(drawn), 8)
    drawn[0, 4] = 255
    assert mask(encode(drawn), 8).sum() == 1


def test_a_picture_with_a_hole_is_no_mask(mask):
    image = noise(8, 8, 4)
    with pytest.raises(InputError, match=r"^mask .*mask: its opaque part has several colours"):
        mask(encode(image), 8)
