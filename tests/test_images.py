"""Pixels to bytes and back, grids, titled panels, PNG files."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from flowturbo_jax import images
from flowturbo_jax.interfaces import InputError


def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_every_byte_survives_the_round_trip():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pixels = images.from_uint8(every)
    assert pixels.dtype == jnp.float32
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(images.to_uint8(pixels), every)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_pixels_outside_the_range_saturate(dtype):
    pixels = jnp.array([-7.0, -1.0, 0.0, 1.0, 7.0], dtype).reshape(1, 1, 5, 1)
    assert images.to_uint8(pixels).ravel().tolist() == [0, 0, 128, 255, 255]


def test_bfloat16_pixels_round_to_the_nearest_byte():
    pixels = jnp.linspace(-1, 1, 501).astype(jnp.bfloat16).reshape(1, 1, -1, 1)
    nearest = np.rint((np.asarray(pixels, np.float64) + 1) * 127.5)
    np.testing.assert_array_equal(images.to_uint8(pixels), nearest)


def test_bytes_are_the_same_under_jit_and_vmap():
    pixels = jnp.asarray(np.random.default_rng(0).uniform(-1.2, 1.2, (2, 3, 4, 5, 3)), jnp.float32)
    one_by_one = jnp.stack([images.to_uint8(p) for p in pixels])
    np.testing.assert_array_equal(jax.jit(jax.vmap(images.to_uint8))(pixels), one_by_one)
    back = jnp.stack([images.from_uint8(b) for b in one_by_one])
    # Compiled, the division by 127.5 may become a multiplication: one rounding of float32 apart.
    np.testing.assert_allclose(jax.jit(jax.vmap(images.from_uint8))(one_by_one), back, atol=2e-7)


def test_grid_puts_every_image_in_reading_order():
    tiles, zoom, gap, columns = random_bytes(7, 4, 5, 3), 3, 2, 3
    picture = images.grid(tiles, columns, zoom, gap)
    assert picture.shape == (3 * 12 + 2 * gap, 3 * 15 + 2 * gap, 3)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (12 + gap), (i % columns) * (15 + gap)
        shown = picture[top : top + 12, left : left + 15]
        for row in range(zoom):
            for column in range(zoom):
                np.testing.assert_array_equal(shown[row::zoom, column::zoom], tile)


def test_grid_is_white_where_no_image_is():
    picture = images.grid(np.zeros((3, 4, 4, 1), np.uint8), columns=2, zoom=2, gap=3)
    assert (picture == 0).sum() == 3 * 8 * 8 * 3
    assert (picture == 255).sum() == picture.size - (picture == 0).sum()
    assert (picture[11:, 11:] == 255).all()


def test_grid_shows_grey_as_equal_colours_and_shrinks_to_few_images():
    grey = random_bytes(2, 4, 4, 1)
    picture = images.grid(jnp.asarray(grey), columns=8, gap=0)
    assert picture.shape == (4, 8, 3)
    np.testing.assert_array_equal(picture[:, :4], np.repeat(grey[0], 3, axis=-1))


@pytest.mark.parametrize(
    ("shape", "dtype", "settings", "message"),
    [
        ((2, 4, 4, 1), np.float32, {}, "to_uint8"),
        ((2, 4, 4, 2), np.uint8, {}, "1 or 3"),
        ((4, 4, 3), np.uint8, {}, "1 or 3"),
        ((0, 4, 4, 3), np.uint8, {}, "N >= 1"),
        ((2, 4, 4, 1), np.uint8, {"columns": 0}, "columns=0"),
        ((2, 4, 4, 1), np.uint8, {"zoom": 0}, "zoom=0"),
        ((2, 4, 4, 1), np.uint8, {"gap": -1}, "gap=-1"),
    ],
)
def test_grid_refuses_what_it_cannot_show(shape, dtype, settings, message):
    with pytest.raises(InputError, match=message):
        images.grid(np.zeros(shape, dtype), **{"columns": 2, **settings})


def test_panels_show_every_image_below_their_titles():
    panels = [(["Heun H8", "16 evaluations"], random_bytes(6, 8, 8, 1))]
    panels.append((["FlowTurbo"], 255 - panels[0][1]))
    picture = np.asarray(images.side_by_side(panels, columns=3))
    windows = np.lib.stride_tricks.sliding_window_view(picture, (8, 8, 3))[:, :, 0]
    corners = [
        np.argwhere((windows == tile).all(axis=(-3, -2, -1)))
        for _, tiles in panels
        for tile in tiles
    ]
    assert [len(found) for found in corners] == [1] * 12
    tops, lefts = np.concatenate(corners).reshape(2, 2, 3, 2).transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(tops[0], tops[1])
    assert lefts[0].max() + 8 < lefts[1].min()
    assert (picture[: tops.min()] < 128).any()  # the titles


@pytest.mark.parametrize(
    "lines", [["A title much wider than the small grid under it"], ["a", "b" * 60]]
)
def test_text_wider_than_its_grid_is_not_clipped(lines):
    tile = random_bytes(1, 8, 8, 1)
    picture = np.asarray(images.side_by_side([(lines, tile), (lines, tile)], columns=1))
    ink = (picture < 200).any(axis=(0, 2))
    assert picture.shape[1] > 2 * 8 * 10
    assert not ink[:8].any()
    assert not ink[-8:].any()
    columns_of_ink = np.flatnonzero(ink)
    assert np.diff(columns_of_ink).max() > 16  # the two titles stay apart


def test_longer_titles_do_not_shift_the_other_panels_lines():
    tile = random_bytes(4, 8, 8, 1)
    alone = images.side_by_side([(["Heun"], tile)], columns=2, zoom=8)
    taller = images.side_by_side([(["Heun", "second", "third"], tile)], columns=2, zoom=8)
    bare = images.side_by_side([([], tile)], columns=2, zoom=8)
    assert bare.height < alone.height < taller.height
    np.testing.assert_array_equal(np.asarray(alone)[:35], np.asarray(taller)[:35])


def test_side_by_side_needs_a_panel():
    with pytest.raises(InputError, match="at least one panel"):
        images.side_by_side([], columns=2)


def test_png_keeps_pixels_and_metadata(tmp_path):
    path = tmp_path / "new" / "folder" / "samples.png"
    pixels = random_bytes(9, 7, 3)
    metadata = {"schedule": "H1P5R3", "prompt": "ein Käfer, 甲虫"}
    images.save_png(path, pixels, metadata)
    with PIL.Image.open(path) as stored:
        assert stored.text == metadata
        np.testing.assert_array_equal(np.asarray(stored), pixels)
    panel = images.side_by_side([(["one"], random_bytes(1, 8, 8, 1))], columns=1)
    images.save_png(path, panel)
    with PIL.Image.open(path) as stored:
        assert (stored.size, stored.text) == (panel.size, {})
    images.save_png(path, jnp.asarray(pixels))
    with PIL.Image.open(path) as stored:
        np.testing.assert_array_equal(np.asarray(stored), pixels)
    assert [p.name for p in path.parent.iterdir()] == ["samples.png"]


def test_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "samples.png"
    images.save_png(path, random_bytes(4, 4, 3))
    before = path.read_bytes()

    def fill_the_disk(self, file, **settings):
        file.write_bytes(b"half a picture")
        raise OSError("no space left")

    monkeypatch.setattr(PIL.Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        images.save_png(path, random_bytes(4, 4, 3))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "picture", "message"),
    [
        ("samples.jpg", np.zeros((4, 4, 3), np.uint8), "end the name in .png"),
        ("samples.png", np.zeros((2, 4, 4, 3), np.uint8), "with grid"),
        ("samples.png", np.zeros((4, 4, 3), np.float32), "float32"),
    ],
)
def test_save_png_refuses_what_it_cannot_write(tmp_path, name, picture, message):
    with pytest.raises(InputError, match=message):
        images.save_png(tmp_path / name, picture)
    assert list(tmp_path.iterdir()) == []
