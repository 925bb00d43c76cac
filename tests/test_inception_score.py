"""The Inception Score: the reference's values, its limits, and what is no classifier's answer."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import metrics
from flowturbo_jax.interfaces import InputError


@pytest.fixture(scope="module")
def golden_values(fixtures):
    return json.loads((fixtures / "golden" / "metrics" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def logits(fixtures):
    """Of the stored samples, in float64."""
    with (
        np.load(fixtures / "metrics" / "frechet.npz") as features,
        np.load(fixtures / "golden" / "metrics" / "softmax.npz") as matrices,
    ):
        return {
            name: features[f"{name}_b"].astype(np.float64) @ matrices[name].astype(np.float64)
            for name in ("d16", "d64")
        }


@pytest.mark.parametrize("name", ["d16", "d64"])
@pytest.mark.parametrize("split_size", [5000, 100])  # 100 leaves a shorter last split
def test_score_matches_the_reference(golden_values, logits, name, split_size):
    wanted = golden_values[f"{name}_is_split{split_size}"]
    ours = metrics.inception_score(logits[name], split_size)
    assert type(ours) is float
    assert ours == pytest.approx(wanted["float64"], rel=1e-12)
    assert ours == pytest.approx(wanted["reference"], rel=1e-6)  # computed in float32


def test_splits_are_5000_unless_told(logits):
    assert metrics.inception_score(logits["d16"]) == metrics.inception_score(logits["d16"], 5000)


def test_score_of_probabilities_is_that_of_their_logits(logits):
    powers = np.exp(logits["d64"])
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    ours = metrics.inception_score_of_probabilities(probabilities, 70)
    assert ours == pytest.approx(metrics.inception_score(logits["d64"], 70), rel=1e-12)


def test_sure_and_even_answers_score_the_number_of_classes():
    sure = np.tile(np.eye(10), (7, 1))
    assert metrics.inception_score_of_probabilities(sure) == pytest.approx(10, rel=1e-12)
    # Probabilities of 0 also where exp underflows.
    assert metrics.inception_score(1e4 * sure) == pytest.approx(10, rel=1e-12)


def test_equal_answers_score_1():
    same = np.random.default_rng(0).normal(size=(1, 12)).repeat(30, axis=0)
    assert metrics.inception_score(same) == pytest.approx(1, abs=1e-12)
    assert metrics.inception_score(same, 1) == pytest.approx(1, abs=1e-12)


def test_a_constant_added_to_a_row_of_logits_changes_nothing(logits):
    shifted = logits["d16"] + 1e4 * np.arange(len(logits["d16"]))[:, None]
    # Logits of 1e6 keep 10 digits after the point.
    assert metrics.inception_score(shifted) == pytest.approx(
        metrics.inception_score(logits["d16"]), rel=1e-8
    )


def test_score_takes_jax_arrays_in_half_precision(logits):
    half = jnp.asarray(logits["d16"], jnp.bfloat16)
    wanted = metrics.inception_score(np.asarray(half).astype(np.float64))
    assert metrics.inception_score(half) == wanted


@pytest.mark.parametrize(
    ("logits", "split_size", "message"),
    [
        (np.zeros((0, 4)), 10, "shape"),
        (np.zeros((4, 0)), 10, "shape"),
        (np.zeros(4), 10, "shape"),
        (np.zeros((4, 4)), 0, "split_size is 0"),
        (np.full((4, 4), np.nan), 10, "finite"),
        (np.full((4, 4), -np.inf), 10, "finite"),
    ],
)
def test_unusable_logits_are_refused(logits, split_size, message):
    with pytest.raises(InputError, match=message):
        metrics.inception_score(logits, split_size)


@pytest.mark.parametrize("row", [[0.5, 0.6], [1.2, -0.2], [0.0, 0.0]])
def test_rows_that_are_no_distribution_are_refused(row):
    probabilities = np.array([[0.5, 0.5], row])
    with pytest.raises(InputError, match=r"1 of 2 samples .* first sample 1"):
        metrics.inception_score_of_probabilities(probabilities)
