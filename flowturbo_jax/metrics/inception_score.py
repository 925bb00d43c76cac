"""The Inception Score: whether each image shows one class, and all of them many."""

from collections.abc import Callable

import jax
import numpy as np

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics.network import softmax

SPLIT_SIZE = 5000  # ADM evaluator.py, compute_inception_score
ROW_SUM_TOLERANCE = 1e-3  # of probabilities in half precision


def inception_score(logits: jax.Array | np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """Measures how sure a classifier is of each image, and how evenly it sees the classes.

        mean over splits of exp(mean over images of KL(p(class | image) || p(class)))

    in float64, with p(class) the mean of its split. Splits are successive rows; the last may be
    shorter, and counts as much as the others.

    Args:
      logits: `[N, K]`, of Inception without the bias of its last layer; any real dtype.
      split_size: images per split.

    Returns:
      A score in [1, K], higher is better.

    Raises:
      InputError: the shape is another, a value is not finite, or split_size is below 1.

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4; ADM
      evaluator.py, compute_inception_score.
    """
    return _mean_over_splits(_checked(logits, split_size, "logits"), split_size, softmax)


def inception_score_of_probabilities(
    probabilities: jax.Array | np.ndarray, split_size: int = SPLIT_SIZE
) -> float:
    """Measures the Inception Score of a classifier's probabilities; see `inception_score`.

    Args:
      probabilities: `[N, K]`, rows that sum to 1.
      split_size: images per split.

    Raises:
      InputError: as `inception_score`, or a row is no distribution.
    """
    p = _checked(probabilities, split_size, "probabilities")
    sums = p.sum(axis=1, dtype=np.float64)
    wrong = np.flatnonzero((p.min(axis=1) < 0) | (np.abs(sums - 1) > ROW_SUM_TOLERANCE))
    if len(wrong):
        raise InputError(
            f"probabilities of {len(wrong)} of {len(p)} samples are negative or do not sum to 1, "
            f"first sample {wrong[0]}: give logits to inception_score instead."
        )
    return _mean_over_splits(p, split_size, lambda part: part.astype(np.float64))


def _mean_over_splits(
    rows: np.ndarray, split_size: int, distributions: Callable[[np.ndarray], np.ndarray]
) -> float:
    starts = range(0, len(rows), split_size)
    return float(np.mean([_score(distributions(rows[i : i + split_size])) for i in starts]))


def _score(p: np.ndarray) -> float:
    """exp(mean KL(p || mean p)) of rows of probabilities; a class of probability 0 adds 0."""
    overall = np.broadcast_to(p.mean(axis=0, keepdims=True), p.shape)
    ratio = np.divide(p, overall, out=np.ones_like(p), where=p > 0)
    return float(np.exp(np.mean(np.sum(p * np.log(ratio), axis=1))))


def _checked(rows: jax.Array | np.ndarray, split_size: int, what: str) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{what} must be [samples, classes], N >= 1, got shape {rows.shape}.")
    if split_size < 1:
        raise InputError(f"split_size is {split_size}; it must be 1 or more.")
    if not np.isfinite(rows).all():
        raise InputError(f"{what} must be finite, got NaN or infinity.")
    return rows
