"""Fréchet distance, pixel features and the judge of digits."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import data, metrics
from flowturbo_jax.images import to_uint8
from flowturbo_jax.interfaces import InputError

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
GOLDEN = json.loads((FIXTURES / "frechet.json").read_text())["cases"]


def distance(a, b):
    a, b = metrics.statistics(a), metrics.statistics(b)
    return metrics.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian(seed, d=6, rank=6):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(d, rank))
    return rng.normal(size=d), factor @ factor.T


@pytest.fixture(scope="module")
def golden_features():
    with np.load(FIXTURES / "frechet.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def digits():
    return data.arrays(data.open_source("digits"))


@pytest.fixture(scope="module")
def judge():
    return metrics.DigitsClassifier()


@pytest.mark.parametrize("case", GOLDEN)
def test_frechet_distance_matches_the_official_evaluation(golden_features, case):
    ours = distance(golden_features[f"{case}_a"], golden_features[f"{case}_b"])
    # The bound covers the official float32 mean (5e-7) and its matrix root of singular products.
    assert abs(ours - GOLDEN[case]["reference"]) <= GOLDEN[case]["bound"]
    assert abs(ours - GOLDEN[case]["eigenvalue_formula"]) <= GOLDEN[case]["bound"]


def test_frechet_distance_of_commuting_gaussians_has_its_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    s1, s2 = rng.uniform(0.1, 3, 5), np.array([0.0, 0.0, 1.0, 2.0, 3.0])
    mu1, mu2 = rng.normal(size=5), rng.normal(size=5)
    covariance1, covariance2 = (basis * s1**2) @ basis.T, (basis * s2**2) @ basis.T
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((s1 - s2) ** 2)
    result = metrics.frechet_distance(mu1, covariance1, mu2, covariance2)
    assert type(result) is float
    # A zero eigenvalue comes back as about 1e-16, whose root is 1e-8.
    assert result == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rank", [6, 2, 1])
def test_frechet_distance_is_symmetric_and_zero_for_equals(rank):
    a, b = gaussian(0, rank=rank), gaussian(1, rank=6)
    # Eigenvalues of a singular product carry rounding of 1e-16 times its scale, rooted.
    assert metrics.frechet_distance(*a, *b) == pytest.approx(
        metrics.frechet_distance(*b, *a), abs=1e-5
    )
    assert 0.0 <= metrics.frechet_distance(*a, *a) < 1e-5
    assert metrics.frechet_distance(*a, *b) > 1.0


def test_frechet_distance_scales_with_the_square_of_the_features(golden_features):
    a, b = golden_features["d16_a"].astype(np.float64), golden_features["d16_b"].astype(np.float64)
    assert distance(1e3 * a, 1e3 * b) == pytest.approx(1e6 * distance(a, b), rel=1e-9)


def test_statistics_are_numpys_in_float64():
    features = np.random.default_rng(0).normal(1e3, 1.0, (50, 4)).astype(np.float32)
    result = metrics.statistics(features)
    exact = features.astype(np.float64)
    assert (result.mean.dtype, result.covariance.dtype, result.count) == (
        np.float64,
        np.float64,
        50,
    )
    # Both are float64 sums, in another order; the mean of 1e3 leaves 1e-13 of it.
    np.testing.assert_allclose(result.mean, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(result.covariance, np.cov(exact, rowvar=False), rtol=1e-10)


def test_statistics_accept_jax_features_of_one_dimension():
    result = metrics.statistics(jnp.array([[1.0], [3.0]], jnp.bfloat16))
    assert (result.mean.tolist(), result.covariance.tolist(), result.count) == ([2.0], [[2.0]], 2)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((1, 4)), "at least 2 samples, got 1"),
        (np.zeros((0, 4)), "at least 2 samples, got 0"),
        (np.zeros((4, 0)), "shape"),
        (np.zeros((4, 2, 2)), "shape"),
        (np.zeros(4), "shape"),
        (np.array([[0.0], [1.0], [np.nan]]), "1 of 3 samples are not finite, first sample 2"),
        (np.array([[np.inf], [1.0]]), "not finite"),
    ],
)
def test_statistics_refuse_unusable_features(features, message):
    with pytest.raises(InputError, match=message):
        metrics.statistics(features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, s: (m, s, m[:5], s[:5, :5]), "same network"),
        (lambda m, s: (m, s, m, s[:5]), "same network"),
        (lambda m, s: (m[None], s, m, s), "same network"),
        (lambda m, s: (s, s, m, s), "same network"),
        (lambda m, s: (m * np.nan, s, m, s), "finite"),
        (lambda m, s: (m, s, m, np.triu(s)), "sigma2 is not symmetric"),
        (lambda m, s: (m, -s, m, s), "sigma1 has eigenvalue"),
        (lambda m, s: (m, s, m, s - 1.1 * np.diag(np.diag(s))), "sigma2 has eigenvalue"),
    ],
)
def test_frechet_distance_refuses_what_is_no_pair_of_gaussians(change, message):
    with pytest.raises(InputError, match=message):
        metrics.frechet_distance(*change(*gaussian(0)))


def test_pixel_features_are_the_pixels_in_float64(digits):
    images, _ = digits
    stored = to_uint8(images[:20])
    features = metrics.pixel_features(stored)
    assert (features.shape, features.dtype) == ((20, 64), np.float64)
    # Half a byte is 1/255 of the range -1 .. 1.
    np.testing.assert_allclose(features.reshape(images[:20].shape), images[:20], atol=1.001 / 255)
    extracted = metrics.PIXELS.extract(stored)
    np.testing.assert_array_equal(extracted.pooled, features)
    assert (extracted.spatial, metrics.PIXELS.probabilities, metrics.PIXELS.dimensions) == (
        None,
    ) * 3
    assert "pixels" in metrics.PIXELS.name
    assert len(metrics.PIXELS.fingerprint) == 64


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 1), np.float32), np.zeros((8, 8, 1), np.uint8)]
)
def test_pixel_features_refuse_anything_but_byte_images(images):
    with pytest.raises(InputError, match="to_uint8"):
        metrics.pixel_features(images)


def test_pixel_distance_tells_noise_from_digits(digits):
    images, _ = digits
    even, odd = (metrics.pixel_features(to_uint8(images[i::2])) for i in (0, 1))
    noise = np.random.default_rng(0).uniform(-1, 1, odd.shape)
    assert 10 * distance(even, odd) < distance(even, noise)


def test_judge_reads_held_out_digits(judge):
    # 98.00 % is UCI's nearest-neighbour baseline on these images (optdigits.names).
    assert 0.98 <= judge.held_out_accuracy < 1.0


def test_judge_is_measured_on_images_it_was_not_fitted_on(judge, digits):
    images, labels = digits
    held_out = np.arange(len(images)) % 4 == 3
    assert judge.accuracy(images[held_out], labels[held_out]) == judge.held_out_accuracy
    assert judge.accuracy(images[~held_out], labels[~held_out]) > judge.held_out_accuracy


def test_judge_counts_wrong_labels_and_noise(judge, digits):
    images, labels = digits
    right = judge.accuracy(images, labels)
    assert judge.accuracy(jnp.asarray(images), jnp.asarray(labels)) == right
    assert judge.accuracy(images, (labels + 1) % 10) <= 1 - right
    noise = np.random.default_rng(0).uniform(-1, 1, images.shape).astype(np.float32)
    assert judge.accuracy(noise, labels) < 0.2  # one in ten by chance
    predicted = judge.predict(images)
    assert (predicted.shape, predicted.dtype) == (labels.shape, np.int32)


def test_judge_is_the_same_every_time(judge, digits):
    again = metrics.DigitsClassifier()
    images = np.random.default_rng(0).uniform(-1, 1, digits[0].shape)
    np.testing.assert_array_equal(again.predict(images), judge.predict(images))
    assert again.fingerprint == judge.fingerprint
    assert again.held_out_accuracy == judge.held_out_accuracy


def test_judge_of_other_settings_has_another_fingerprint(judge, monkeypatch):
    monkeypatch.setitem(metrics.classifier.SETTINGS, "C", 1.0)
    assert metrics.DigitsClassifier().fingerprint != judge.fingerprint


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 16, 16, 1), np.float32), "shape"),
        (np.zeros((8, 8, 1), np.float32), "shape"),
        (np.zeros((0, 8, 8, 1), np.float32), "N >= 1"),
        (np.zeros((2, 8, 8, 1), np.uint8), "from_uint8"),
        (np.full((2, 8, 8, 1), np.nan, np.float32), "finite"),
    ],
)
def test_judge_refuses_what_is_no_digit(judge, images, message):
    with pytest.raises(InputError, match=message):
        judge.predict(images)


@pytest.mark.parametrize("count", [1, 3])
def test_judge_needs_one_label_per_image(judge, digits, count):
    with pytest.raises(InputError, match="one label"):
        judge.accuracy(digits[0][:2], digits[1][:count])


def test_judge_features_are_its_decisions_between_pairs_of_digits(judge, digits):
    images, _ = digits
    features = judge.features.extract(to_uint8(images))
    assert (features.pooled.shape, features.pooled.dtype) == ((len(images), 45), np.float64)
    assert features.spatial is None
    assert judge.features.dimensions == 45
    pairs = [(a, b) for a in range(10) for b in range(a + 1, 10)]
    won = [np.where(features.pooled[:, i] > 0, a, b) for i, (a, b) in enumerate(pairs)]
    votes = np.stack([np.sum(np.stack(won) == digit, axis=0) for digit in range(10)], axis=1)
    # The digit that wins most pairs is the one read; the lowest, of several that win as many.
    np.testing.assert_array_equal(votes.argmax(axis=1), judge.predict(images))


def test_judge_probabilities_favour_the_digit_shown(judge, digits):
    images, labels = digits
    probabilities = judge.features.probabilities(judge.features.extract(to_uint8(images)).pooled)
    assert (probabilities.shape, probabilities.dtype) == ((len(images), 10), np.float64)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert np.mean(probabilities.argmax(axis=1) == labels) > 0.98
    # Sure of nearly every digit, and all digits as frequent: near 10, the number of classes.
    assert 9 < metrics.inception_score_of_probabilities(probabilities) <= 10


def test_judge_features_tell_noise_from_digits(judge, digits):
    images = to_uint8(digits[0])
    noise = np.random.default_rng(0).integers(0, 256, images[1::2].shape, np.uint8)
    even, odd, other = (
        judge.features.extract(part).pooled for part in (images[::2], images[1::2], noise)
    )
    assert 10 * distance(even, odd) < distance(even, other)


def test_judge_features_have_a_fingerprint_of_their_own(judge):
    again = metrics.DigitsClassifier().features
    assert again.fingerprint == judge.features.fingerprint != judge.fingerprint
    assert judge.features.name == "digits classifier"


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (0, 8, 8, 1), (2, 16, 16, 1)])
def test_judge_features_refuse_what_is_no_digit(judge, shape):
    with pytest.raises(InputError, match="digits are images"):
        judge.features.extract(np.zeros(shape, np.uint8))


def test_statistics_files_hold_what_statistics_measures(golden_features):
    folder = FIXTURES.parent / "golden" / "metrics"
    with np.load(folder / "stats_ref.npz") as real, np.load(folder / "stats_sample.npz") as made:
        np.testing.assert_array_equal(made["activations"], golden_features["d16_b"])
        for stored, name in ((real, "d16_a"), (made, "d16_b")):
            ours = metrics.statistics(golden_features[name])
            # Theirs are a float32 mean and a float64 covariance.
            np.testing.assert_allclose(ours.mean, stored["mu"], rtol=1e-6)
            np.testing.assert_allclose(ours.covariance, stored["sigma"], atol=1e-6)
        found = metrics.frechet_distance(real["mu"], real["sigma"], made["mu"], made["sigma"])
    wanted = json.loads((folder / "metrics.json").read_text())["d16_fid"]
    assert found == pytest.approx(wanted["reference"], abs=2e-6)
