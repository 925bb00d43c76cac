"""Masks as arrays: what is accepted, what painted ones mark, exact polygons, soft edges."""

import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import masks
from flowturbo_jax.interfaces import InputError

IMAGES = (2, 3, 4, 1)  # of the model, [B, H, W, C]


def random_mask(*shape, share=0.5, seed=0):
    return np.random.default_rng(seed).random(shape) < share


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 4, 1)])
def test_masks_are_taken_as_bool_and_as_bytes(shape, library):
    mask = random_mask(*shape)
    expected = np.broadcast_to(mask.reshape(-1, 3, 4), (2, 3, 4))
    for given in (mask, mask * np.uint8(255), mask * np.uint8(1), mask + np.uint8(127)):
        result = masks.as_masks(library.asarray(given), IMAGES)
        assert (type(result), result.dtype, result.shape) == (np.ndarray, np.bool_, (2, 3, 4))
        np.testing.assert_array_equal(result, expected)


def test_bytes_from_128_on_are_white_unless_none_exceeds_1():
    row = np.array([[[0, 1, 127, 128]] * 3], np.uint8)
    np.testing.assert_array_equal(masks.as_masks(row, (1, 3, 4, 3))[0, 0], [0, 0, 0, 1])
    row = np.minimum(row, 1)
    np.testing.assert_array_equal(masks.as_masks(row, (1, 3, 4, 3))[0, 0], [0, 1, 1, 1])
    assert not masks.as_masks(row * np.uint8(0), (1, 3, 4, 3)).any()
    assert not masks.as_masks(row * np.uint8(2), (1, 3, 4, 3)).any()


def test_the_masks_are_a_copy():
    for shape in ((3, 4), (2, 3, 4)):
        given = np.zeros(shape, bool)
        masks.as_masks(given, IMAGES)[0, 0, 0] = True
        assert not given.any()
        assert masks.as_masks(given, IMAGES).flags.writeable


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (np.zeros((3, 4), np.float32), r"float32\[3, 4\]"),
        (np.zeros((3, 4), np.int64), r"int64\[3, 4\]"),
        (np.zeros((4, 3), bool), r"bool\[4, 3\]"),
        (np.zeros((3, 3, 4), bool), r"bool\[3, 3, 4\]"),
        (np.zeros((1, 3, 4), bool), r"bool\[1, 3, 4\]"),
        (np.zeros((2, 3, 4, 3), bool), r"bool\[2, 3, 4, 3\]"),
        (np.zeros((3, 4, 1), bool), r"bool\[3, 4, 1\]"),
        (True, r"bool\[\]"),
        ("mask.png", r"<U8\[\]"),
        (None, r"object\[\]"),
    ],
)
def test_other_masks_are_refused_with_what_was_got_and_wanted(given, got):
    wanted = r"wanted is bool or uint8, \[3, 4\], \[2, 3, 4\] or \[2, 3, 4, 1\]"
    with pytest.raises(InputError, match=f"^masks are {got}; {wanted}$"):
        masks.as_masks(given, IMAGES)


def test_what_is_no_array_is_refused():
    with pytest.raises(InputError, match=r"^masks are a list that is no array"):
        masks.as_masks([[True], [True, False]], IMAGES)
    with pytest.raises(InputError, match=r"Tracer that is no array"):
        jax.jit(lambda mask: masks.as_masks(mask, IMAGES))(np.zeros((3, 4), bool))


def brute_weights(mask, margin, soften):
    """By the distance of every pixel to every masked one."""
    result = np.zeros(mask.shape)
    for place in np.ndindex(mask.shape):
        distances = [np.hypot(*np.subtract(place, other)) for other in np.argwhere(mask)]
        distance = min(distances, default=np.inf)
        if distance <= margin:
            result[place] = 1
        elif distance < margin + soften:
            result[place] = 1 - (distance - margin) / soften
    return result


@pytest.mark.parametrize("soften", [0, 1, 2.5, 7])
@pytest.mark.parametrize("margin", [0, 1, np.sqrt(2), 3])
def test_weights_match_brute_force(margin, soften):
    given = np.stack([random_mask(9, 11, share=share, seed=3) for share in (0.0, 0.02, 0.3, 2)])
    result = masks.weights(given, margin, soften)
    assert (result.dtype, result.shape) == (np.float32, given.shape)
    expected = np.stack([brute_weights(mask, margin, soften) for mask in given])
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-7)  # of float32
    np.testing.assert_array_equal(result == 1, expected == 1)
    np.testing.assert_array_equal(result == 0, expected == 0)


def test_weights_are_a_ramp_beside_one_pixel():
    mask = np.zeros((1, 1, 8), bool)
    mask[..., 0] = True
    result = masks.weights(mask, margin=2, soften=4)
    np.testing.assert_array_equal(result[0, 0], [1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_without_margin_and_softening_the_weights_are_the_mask():
    given = random_mask(3, 8, 8)
    np.testing.assert_array_equal(masks.weights(given), given)


@pytest.mark.parametrize(("margin", "soften"), [(0, 0), (5, 0), (0, 5), (1e300, 1e300)])
def test_empty_masks_weigh_nothing_and_full_ones_all(margin, soften):
    given = np.stack([np.zeros((5, 5), bool), np.ones((5, 5), bool)])
    np.testing.assert_array_equal(masks.weights(given, margin, soften), given)


@pytest.mark.parametrize(
    ("margin", "soften"), [(1e308, 1e308), (1e10, 1e-10), (0, 5e-324), (1, 5e-324)]
)
def test_extreme_margins_raise_no_warning_and_stay_in_range(margin, soften):
    result = masks.weights(random_mask(1, 6, 6, share=0.1), margin, soften)
    assert ((result == 0) | (result == 1)).all()
    assert (result == 1).sum() > 0


@pytest.mark.parametrize("value", [-1, -1e-9, np.nan, np.inf, True, "3", None, 1j, [1]])
@pytest.mark.parametrize("name", ["margin", "soften"])
@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_length_is_refused(name, value):
    with pytest.raises(InputError, match=f"^{name} is .*; it must be a finite number of pixels"):
        masks.weights(np.zeros((1, 2, 2), bool), **{name: value})


@pytest.mark.usefixtures("as_users_run_it")
def test_numpy_scalars_are_lengths():
    given = random_mask(1, 5, 5, share=0.1)
    result = masks.weights(given, np.float32(1), np.int64(2))
    np.testing.assert_array_equal(result, masks.weights(given, 1, 2))


def covered_area(corners, column, row):
    """The area of a cell that a polygon covers: Sutherland and Hodgman's clipping, exact."""
    for axis, sign, bound in ((0, 1, column), (0, -1, column + 1), (1, 1, row), (1, -1, row + 1)):
        clipped = []
        for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
            inside_a, inside_b = (sign * (p[axis] - bound) >= 0 for p in (a, b))
            if inside_a:
                clipped.append(a)
            if inside_a != inside_b:
                part = (bound - a[axis]) / (b[axis] - a[axis])
                clipped.append(tuple(s + part * (e - s) for s, e in zip(a, b, strict=True)))
        corners = clipped
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(sum(a[0] * b[1] - a[1] * b[0] for a, b in pairs))


def star(seed, count):
    """The corners of a polygon around a point, in thirds of a cell, partly outside 7 x 6 cells."""
    generator = np.random.default_rng(seed)
    angles = np.sort(generator.uniform(0, 2 * np.pi, count))
    radii = generator.uniform(1, 15, count)
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + (9, 10)
    return [tuple(Fraction(int(c), 3) for c in point) for point in np.round(points)]


@pytest.mark.parametrize("count", [3, 4, 7])
def test_a_polygon_marks_exactly_the_cells_it_covers_a_part_of(count):
    compared = 0
    for seed in range(40):
        corners = star([seed, count], count)
        expected = [[covered_area(corners, x, y) > 0 for x in range(7)] for y in range(6)]
        result = masks.polygon(np.array(corners, np.float64), 6, 7)
        backwards = masks.polygon(np.array(corners[::-1], np.float64), 6, 7)
        np.testing.assert_array_equal(result, expected, err_msg=str((seed, corners)))
        np.testing.assert_array_equal(backwards, expected)
        compared += 0 < result.sum() < 42
    assert compared > 20  # polygons neither empty nor over the whole grid


def grid(*rows):
    return np.array([[letter == "#" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ([(1, 1), (3, 1), (3, 2), (1, 2)], grid("....", ".##.", "....")),
        ([(1, 1), (3.01, 1), (3.01, 2.01), (1, 2.01)], grid("....", ".###", ".###")),
        ([(0.99, 0.99), (3, 0.99), (3, 2), (0.99, 2)], grid("###.", "###.", "....")),
        ([(1.2, 1.2), (1.4, 1.2), (1.4, 1.4)], grid("....", ".#..", "....")),
        ([(0, 0), (3, 3), (0, 3)], grid("#...", "##..", "###.")),
        ([(-9, -9), (99, -9), (99, 99), (-9, 99)], grid("####", "####", "####")),
        ([(5, 0), (9, 0), (9, 3), (5, 3)], grid("....", "....", "....")),
        ([(-4, 0), (0, 0), (0, 3), (-4, 3)], grid("....", "....", "....")),
    ],
)
def test_polygons_on_a_small_grid(corners, expected):
    result = masks.polygon(np.array(corners, np.float64), 3, 4)
    np.testing.assert_array_equal(result, expected)


def test_what_an_outline_goes_round_twice_is_inside():
    points = [(5 + 5 * np.sin(a), 5 - 5 * np.cos(a)) for a in np.arange(5) * 4 * np.pi / 5]
    pentagram = masks.polygon(np.array(points), 10, 10)
    assert pentagram[4:6, 4:6].all()
    assert not pentagram[[0, 0, 9, 9], [0, 9, 0, 9]].any()


@pytest.mark.parametrize("far", [1e9, 1e-300, 5e-324])
def test_corners_far_away_or_close_together_raise_no_warning(far):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = masks.polygon(np.array([(0, 0), (far, far / 2), (0, far)]), 4, 4)
    assert result.sum() == (14 if far > 1 else 0)  # right of (2, 1) the first row is outside


WHITE, GREY, BLACK, RED, BLUE = (255,) * 3, (100,) * 3, (0,) * 3, (255, 0, 0), (0, 0, 255)


def painted(colours, alpha=None):
    colours = np.array([colours], np.uint8)
    alpha = None if alpha is None else np.array([alpha], np.uint8)
    return masks.painted(colours, colours[..., 0], alpha)[0].astype(int).tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 255, 0], [0, 1, 0]),
        ([0, 1, 1], [0, 1, 1]),
        ([7, 9, 7], [0, 1, 0]),
        ([255, 254, 255], [1, 0, 1]),
        ([0, 127, 128], [0, 0, 1]),
        ([1, 2, 3], [0, 0, 0]),
        ([128, 128, 128], [1, 1, 1]),
        ([127, 127, 127], [0, 0, 0]),
    ],
)
def test_white_is_marked_or_the_brighter_of_two_values(values, expected):
    assert painted([(value,) * 3 for value in values]) == expected
    opaque = [255, 200, 128]  # alpha that hides nothing changes nothing
    assert painted([(value,) * 3 for value in values], opaque) == expected


def test_half_of_sixteen_bits_is_white():
    colours = np.zeros((1, 3, 3), np.uint8)
    values = np.array([[0, 32767, 32768]], np.uint16)
    np.testing.assert_array_equal(masks.painted(colours, values, None), [[0, 0, 1]])
    values = np.array([[0, 1, 0]], np.uint16)
    np.testing.assert_array_equal(masks.painted(colours, values, None), [[0, 1, 0]])


@pytest.mark.parametrize(
    ("colours", "alpha", "expected"),
    [
        ([RED, RED, BLUE], [255, 128, 127], [1, 1, 0]),  # a layer drawn in red
        ([BLACK, WHITE, WHITE], [255, 0, 0], [1, 0, 0]),  # in black
        ([(240, 3, 0), RED, BLUE], [255, 255, 0], [1, 1, 0]),  # with compressed edges
        ([WHITE, BLACK, WHITE], [255, 255, 0], [1, 0, 0]),  # black and white on a layer
        ([WHITE, GREY, BLACK, WHITE], [255, 255, 255, 0], [1, 0, 0, 0]),
        ([WHITE, WHITE, WHITE], [0, 0, 127], [0, 0, 0]),
    ],
)
def test_of_a_layer_the_opaque_part_is_marked(colours, alpha, expected):
    assert painted(colours, alpha) == expected


def test_a_picture_with_a_hole_is_no_mask():
    with pytest.raises(InputError, match="several colours"):
        painted([RED, BLUE, WHITE], [255, 255, 0])
