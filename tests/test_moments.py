"""Mean and covariance of features that come in parts."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import metrics
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import frechet


@pytest.fixture(scope="module")
def features():
    # Far from the origin: sums of squares alone would lose 8 of 16 digits.
    return np.random.default_rng(0).normal(1e4, 1.0, (1000, 7))


def in_parts(features, sizes):
    moments = metrics.Moments()
    bounds = np.cumsum([0, *sizes])
    assert bounds[-1] == len(features)
    for first, last in itertools.pairwise(bounds):
        moments.add(features[first:last])
    return moments


def assert_same_statistics(ours, features):
    assert ours.count == len(features)
    # Features of 1e4 are rounded to 2e-12; their spread is 1.
    np.testing.assert_allclose(ours.mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(ours.covariance, np.cov(features, rowvar=False), atol=1e-11)


@pytest.mark.parametrize(
    "sizes", [[1000], [1] * 1000, [0, 999, 0, 1, 0], [300, 700], [37] * 27 + [1], [2, 998]]
)
def test_parts_amount_to_the_whole(features, sizes):
    assert_same_statistics(in_parts(features, sizes).statistics(), features)


@pytest.mark.parametrize("size", [1, 64, 999, 1000])
def test_size_of_the_inner_slices_does_not_matter(features, monkeypatch, size):
    monkeypatch.setattr(frechet, "SLICE", size)
    assert_same_statistics(metrics.statistics(features), features)


@pytest.mark.parametrize("first", [0, 1, 400, 1000])
def test_merged_halves_amount_to_the_whole(features, first):
    a, b = metrics.Moments(), metrics.Moments()
    a.add(features[:first])
    b.add(features[first:])
    a.merge(b)
    assert_same_statistics(a.statistics(), features)
    if first < 999:
        assert b.statistics().count == 1000 - first  # it is left as it was


def test_merging_changes_one_of_the_two_alone(features):
    a, b = metrics.Moments(), metrics.Moments()
    b.add(features[:500])
    a.merge(b)
    a.add(features[500:])
    assert_same_statistics(b.statistics(), features[:500])
    given = a.statistics()
    a.add(features)
    assert_same_statistics(given, features)


def test_float32_and_bfloat16_parts_are_summed_in_float64():
    ones = metrics.Moments()
    for value in (1.0, 3.0):
        ones.add(np.full((1, 2), value, np.float32))
        ones.add(jnp.full((1, 2), value, jnp.bfloat16))
    result = ones.statistics()
    assert (result.mean.dtype, result.mean.tolist()) == (np.float64, [2.0, 2.0])
    np.testing.assert_allclose(result.covariance, np.full((2, 2), 4 / 3), rtol=1e-15)


def test_a_refused_part_changes_nothing_and_its_sample_is_counted_from_the_first(
    features, monkeypatch
):
    monkeypatch.setattr(frechet, "SLICE", 64)
    moments = in_parts(features[:600], [600])
    bad = features[600:].copy()
    bad[[150, 300], 3] = np.nan, np.inf
    with pytest.raises(InputError, match="2 of 400 samples are not finite, first sample 750"):
        moments.add(bad)
    moments.add(features[600:])
    assert_same_statistics(moments.statistics(), features)


@pytest.mark.parametrize(
    "part", [np.zeros((3, 6)), np.zeros((0, 6)), np.zeros((3, 0)), np.zeros(7)]
)
def test_parts_of_another_shape_are_refused(features, part):
    moments = in_parts(features, [1000])
    with pytest.raises(InputError, match=r"same network|shape"):
        moments.add(part)


def test_moments_of_another_network_are_not_merged(features):
    a, b = in_parts(features, [1000]), metrics.Moments()
    b.add(np.zeros((2, 6)))
    with pytest.raises(InputError, match="features of 6 dimensions cannot join those of 7"):
        a.merge(b)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_have_no_statistics(features, count):
    with pytest.raises(InputError, match=f"at least 2 samples, got {count}"):
        in_parts(features[:count], [count]).statistics()
