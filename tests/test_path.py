"""The straight path, and noise that depends on an image's own numbers alone."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import path

SHAPE = (3, 2, 4)


@pytest.fixture
def ends():
    keys = jax.random.split(jax.random.key(0))
    return tuple(jax.random.normal(key, (5, *SHAPE)) for key in keys)


@pytest.mark.parametrize("as_batch", [False, True])
def test_path_runs_from_noise_to_data(ends, as_batch):
    noise, data = ends

    def at(t):
        return path.interpolate(noise, data, jnp.full(5, t) if as_batch else jnp.asarray(t))

    np.testing.assert_array_equal(at(0.0), noise)
    np.testing.assert_array_equal(at(1.0), data)
    np.testing.assert_allclose(at(0.25), 0.75 * noise + 0.25 * data, rtol=0, atol=1e-6)


def test_each_sample_has_its_own_time(ends):
    noise, data = ends
    t = jnp.asarray([0.0, 0.1, 0.5, 0.9, 1.0])
    together = path.interpolate(noise, data, t)
    for i in range(5):
        alone = path.interpolate(noise[i : i + 1], data[i : i + 1], t[i])
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_times_of_a_batch_are_shaped_to_multiply_any_rank(rank):
    x = jnp.ones((2, 3, 4, 5)[:rank])
    t = jnp.asarray([0.5, 2.0])
    product = path.per_sample(t, x) * x
    assert product.shape == x.shape
    np.testing.assert_array_equal(product[0], 0.5 * x[0])
    np.testing.assert_array_equal(product[1], 2.0 * x[1])
    assert path.per_sample(t[0], x).shape == ()


def test_velocity_is_the_derivative_of_the_path(ends):
    noise, data = ends
    t = jnp.asarray(0.3)
    _, derivative = jax.jvp(lambda t: path.interpolate(noise, data, t), (t,), (jnp.ones(()),))
    np.testing.assert_allclose(derivative, path.velocity(noise, data), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(path.velocity(noise, data), data - noise)


def test_path_keeps_the_dtype():
    half = jnp.ones((2, 3), jnp.bfloat16)
    assert path.interpolate(half, half, jnp.asarray(0.5, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.fixture
def numbers():
    """Seeds and image numbers of ten images, as a run would spread them."""
    return jnp.asarray([3, 3, 3, 4, 4, 0, 0, 2**32 - 1, 3, 4], jnp.uint32), jnp.asarray(
        [0, 1, 2, 0, 1, 0, 7, 2**32 - 1, 50_000, 2], jnp.uint32
    )


@pytest.mark.parametrize(
    ("sizes", "compiled"), [([1] * 10, True), ([4, 4, 2], True), ([5, 5], False)]
)
def test_noise_does_not_depend_on_how_images_are_batched(numbers, sizes, compiled):
    seeds, indices = numbers
    draw = jax.jit(path.sample_noise, static_argnums=2) if compiled else path.sample_noise
    whole = path.sample_noise(seeds, indices, SHAPE)
    ends = np.cumsum([0, *sizes])
    parts = [draw(seeds[a:b], indices[a:b], SHAPE) for a, b in pairwise(ends)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_noise_does_not_depend_on_place_or_neighbours(numbers):
    seeds, indices = numbers
    order = np.random.default_rng(0).permutation(10)
    shuffled = path.sample_noise(seeds[order], indices[order], SHAPE)
    np.testing.assert_array_equal(shuffled, path.sample_noise(seeds, indices, SHAPE)[order])


def test_every_seed_and_number_has_noise_of_its_own(numbers):
    noise = np.asarray(path.sample_noise(*numbers, SHAPE)).reshape(10, -1)
    assert (noise.shape, noise.dtype) == ((10, 24), np.float32)
    assert len(np.unique(noise)) == noise.size  # two equal values of 240 would be a coincidence


def test_noise_is_standard_normal():
    count = 4096
    noise = path.sample_noise(
        jnp.full(count, 7, jnp.uint32), jnp.arange(count, dtype=jnp.uint32), (5, 5)
    )
    values = np.asarray(noise, np.float64)
    # Five standard errors of 102,400 draws: of the mean 1 / 320, of the variance sqrt(2) / 320.
    assert abs(values.mean()) < 5 / 320
    assert abs(values.var() - 1) < 5 * 2**0.5 / 320
    # Neighbouring image numbers are independent: the correlation of as many pairs.
    assert abs((values[:-1] * values[1:]).mean()) < 5 / 320
