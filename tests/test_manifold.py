"""Precision and recall: the reference's values to the last sample, wherever the features lie."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import metrics
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import manifold


@pytest.fixture(scope="module")
def sets(fixtures):
    """Real features and those of samples, by name."""
    with np.load(fixtures / "metrics" / "frechet.npz") as arrays:
        return {name: (arrays[f"{name}_a"], arrays[f"{name}_b"]) for name in ("d16", "d64")}


@pytest.fixture(scope="module")
def golden_values(fixtures):
    return json.loads((fixtures / "golden" / "metrics" / "metrics.json").read_text())


def exact(real, samples, k):
    """The definition, in float64 and with all distances at once."""

    def apart(a, b):
        difference = a[:, None, :].astype(np.float64) - b[None, :, :].astype(np.float64)
        return np.sum(difference**2, axis=-1)

    def share(points, centres):
        own = apart(centres, centres)
        np.fill_diagonal(own, np.inf)
        radii = np.sort(own, axis=1)[:, k - 1]
        return np.mean(np.any(apart(points, centres) <= radii[None, :], axis=1))

    return share(samples, real), share(real, samples)


@pytest.mark.parametrize("name", ["d16", "d64"])
@pytest.mark.parametrize("scale", [1, 100])
def test_precision_and_recall_are_exact_to_the_last_sample(sets, golden_values, name, scale):
    real, samples = sets[name]
    wanted = golden_values[f"{name}_pr_x{scale}"]
    found = metrics.precision_recall(real * np.float32(scale), samples * np.float32(scale))
    assert found == (wanted["exact_precision"], wanted["exact_recall"])


@pytest.mark.parametrize("k", [1, 2, 7])
def test_other_neighbours_follow_the_definition(sets, k):
    assert metrics.precision_recall(*sets["d16"], k=k) == exact(*sets["d16"], k)


@pytest.mark.parametrize("block", [1, 7, 250, 299, 300, 301])
def test_result_does_not_depend_on_the_block(sets, golden_values, monkeypatch, block):
    monkeypatch.setattr(manifold, "BLOCK", block)
    wanted = golden_values["d16_pr_x1"]
    found = metrics.precision_recall(*sets["d16"])
    assert found == (wanted["exact_precision"], wanted["exact_recall"])


@pytest.mark.parametrize("shift", [1e3, -1e6])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_neither_origin_nor_unit_matters(sets, golden_values, shift, scale):
    real, samples = (features.astype(np.float64) for features in sets["d64"])
    wanted = golden_values["d64_pr_x1"]
    found = metrics.precision_recall((real + shift) * scale, (samples + shift) * scale)
    assert found == (wanted["exact_precision"], wanted["exact_recall"])


def test_samples_far_away_are_neither_precise_nor_recalled(sets):
    real, samples = sets["d16"]
    assert metrics.precision_recall(real, samples + 1e4) == (0.0, 0.0)
    assert metrics.precision_recall(real, np.full_like(samples, 1e30)) == (0.0, 0.0)
    assert metrics.precision_recall(real, np.full(samples.shape, -1e300)) == (0.0, 0.0)


def test_a_set_covers_itself_even_if_all_of_it_is_one_point(sets):
    assert metrics.precision_recall(sets["d16"][0], sets["d16"][0]) == (1.0, 1.0)
    point = np.repeat(sets["d64"][0][:1], 9, axis=0)
    assert metrics.precision_recall(point, point) == (1.0, 1.0)


def test_repeated_samples_recall_nothing_but_what_they_repeat(sets):
    real, _ = sets["d64"]
    collapsed = np.repeat(real[:1], 50, axis=0)
    assert metrics.precision_recall(real, collapsed) == (1.0, 1 / len(real))


def test_fewest_rows_and_jax_arrays_are_accepted():
    real = jnp.array([[0.0], [1.0], [3.0], [7.0]], jnp.bfloat16)
    assert metrics.precision_recall(real, real + 0.5) == (1.0, 1.0)
    # k = 1: real balls are 0 +- 1, 1 +- 1, 3 +- 2 and 7 +- 4; those of samples 2 +- 9, 11 +- 9.
    samples = jnp.array([[-2.0], [11.0]])
    assert metrics.precision_recall(real, samples, k=1) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, s: (r[:3], s), "at least 4 rows, real has 3"),
        (lambda r, s: (r, s[:0]), "at least 4 rows, samples has 0"),
        (lambda r, s: (r, s[:, :5]), "same network"),
        (lambda r, s: (r[0], s), "shape"),
        (lambda r, s: (r[:, :0], s[:, :0]), "shape"),
        (lambda r, s: (r, np.where(np.arange(len(s))[:, None] == 4, np.nan, s)), "first row 4"),
        (lambda r, s: (np.full_like(r, np.inf), s), "300 of 300 rows of real are not finite"),
        (lambda r, s: (r, s, 0), "k is 0"),
    ],
)
def test_unusable_features_are_refused(sets, change, message):
    with pytest.raises(InputError, match=message):
        metrics.precision_recall(*change(*sets["d16"]))
