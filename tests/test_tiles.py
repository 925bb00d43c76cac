"""Tiles: they cover a picture, blend without seams, and bound the memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax.models import VAE, VAEConfig
from flowturbo_jax.models.tiles import fade, tile_starts, tiled


@pytest.mark.parametrize("tile", [8, 12, 64])
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_tiles_cover_every_length_with_the_overlap_asked_for(tile, overlap):
    for length in range(1, 200):
        starts, size = tile_starts(length, tile, overlap)
        assert starts[0] == 0
        assert starts[-1] + size == length
        assert size <= tile
        gaps = [b - a for a, b in itertools.pairwise(starts)]
        assert all(0 < gap <= size - overlap for gap in gaps)


def test_no_more_tiles_than_needed():
    assert tile_starts(64, 64, 16) == ([0], 64)
    assert tile_starts(112, 64, 16) == ([0, 48], 64)
    assert len(tile_starts(113, 64, 16)[0]) == 3


def test_weights_are_positive_up_to_the_edge():
    weights = fade(20, 8)
    assert weights.min() > 0
    np.testing.assert_array_equal(weights, weights[::-1])
    assert weights[10] == 1


@pytest.mark.parametrize("shape", [(2, 20, 20, 3), (1, 40, 12, 3), (2, 5, 70, 3)])
@pytest.mark.parametrize("cell", [(1, 2), (4, 1), (1, 1)])
def test_a_pointwise_function_is_the_same_in_tiles(shape, cell):
    inside, outside = cell
    x = jax.random.normal(
        jax.random.key(0), (shape[0], shape[1] * inside, shape[2] * inside, shape[3])
    )

    def resize(x):
        x = x.repeat(outside, 1).repeat(outside, 2)
        return jnp.square(x[:, ::inside, ::inside, :2])

    made = jax.jit(lambda x: tiled(resize, x, 16, 4, cell))(x)
    np.testing.assert_allclose(made, resize(x), atol=1e-6)


def test_a_picture_of_one_tile_goes_through_whole():
    def centre(x):  # not local, so tiles would show
        return x - x.mean(axis=(1, 2), keepdims=True)

    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
    np.testing.assert_array_equal(tiled(centre, x, 16, 4, (1, 1)), centre(x))
    assert not np.allclose(tiled(centre, x, 12, 4, (1, 1)), centre(x))


def test_a_local_function_leaves_no_seams():
    """A blur sees zeros beyond a tile's edge; away from its reach the overlap hides that."""
    kernel = jnp.ones((5, 5, 1, 1)) / 25

    def blur(x):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    y, x = np.mgrid[:48, :48] / 48
    picture = jnp.asarray(np.sin(3 * x + 5 * y), jnp.float32)[None, :, :, None] + 2
    whole, parts = blur(picture), tiled(blur, picture, 24, 8, (1, 1))
    # Unblended, the zeros at a tile's edge would take up to 2/5 off a value.
    assert np.abs(parts - whole).max() < 0.1 * np.abs(whole).max()


def test_memory_of_a_large_decoding_is_that_of_a_tile():
    vae = VAE(VAEConfig(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4))
    params = jax.eval_shape(vae.initialise, jax.random.key(0))

    def temporary_bytes(side: int, tile: int) -> int:
        def decode(params, z):
            return tiled(
                lambda z: vae.apply({"params": params}, z, method="decode"), z, tile, 8, (1, 2)
            )

        z = jax.ShapeDtypeStruct((2, side, side, 4), jnp.float32)
        return jax.jit(decode).lower(params, z).compile().memory_analysis().temp_size_in_bytes

    whole, parts = temporary_bytes(128, 128), temporary_bytes(128, 32)
    assert parts < whole / 5
