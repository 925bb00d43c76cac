"""The Fréchet distance between two sets of features: FID and its relatives, in float64."""

from typing import NamedTuple

import jax
import numpy as np

from flowturbo_jax.interfaces import InputError

SLICE = 4096  # samples taken to float64 at a time


class Statistics(NamedTuple):
    """What the Fréchet distance needs to know of a set of features.

    Attributes:
      mean: `[D]` float64.
      covariance: `[D, D]` float64, normalised by count - 1.
      count: how many samples it was measured on.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int


class Moments:
    """Mean and covariance of features that come in parts, in float64 whatever they come in.

    Holds a vector and a matrix however many samples there are. Parts of a hundred samples or more
    are faster than single ones. The result does not depend on the parts, but for rounding.

        mean    <- mean + (n_b / n) d,  d = mean_b - mean
        scatter <- scatter + scatter_b + (n_a n_b / n) d d^T

    Source: Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance", eq. 2.1.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._scatter = np.zeros(0)  # scatter: sum of centred outer products

    def add(self, features: jax.Array | np.ndarray) -> None:
        """Takes in more samples, all of them or, where one is refused, none.

        Args:
          features: `[N, D]`, one row per sample, N >= 0; any real dtype.

        Raises:
          InputError: the shape is another, D is not that of the samples before, or a value is not
            finite; the message counts samples from the first ever added.
        """
        x = np.asarray(features)
        if x.ndim != 2 or x.shape[1] == 0:
            raise InputError(f"features must be [samples, dimensions], got shape {x.shape}.")
        self._check_dimensions(x.shape[1])
        # In slices: a float64 copy of everything may be larger than what is left of the memory.
        slices = [x[first : first + SLICE] for first in range(0, len(x), SLICE)]
        finite = [np.isfinite(rows.astype(np.float64)).all(axis=1) for rows in slices]
        bad = np.flatnonzero(~np.concatenate(finite)) if finite else []
        if len(bad):
            raise InputError(
                f"features of {len(bad)} of {len(x)} samples are not finite, first sample "
                f"{self._count + bad[0]}: look for NaN or infinity in its image."
            )
        for rows in slices:
            exact = rows.astype(np.float64)
            mean = exact.mean(axis=0)
            exact -= mean
            self._include(len(exact), mean, exact.T @ exact)

    def merge(self, other: "Moments") -> None:
        """Takes in all samples of another.

        Raises:
          InputError: they have another number of dimensions.
        """
        if other._count:
            self._check_dimensions(len(other._mean))
            self._include(other._count, other._mean, other._scatter)

    def statistics(self) -> Statistics:
        """What the samples so far amount to.

        Raises:
          InputError: there are fewer than two.
        """
        if self._count < 2:
            raise InputError(f"a covariance needs at least 2 samples, got {self._count}.")
        return Statistics(self._mean.copy(), self._scatter / (self._count - 1), self._count)

    def _check_dimensions(self, dimensions: int) -> None:
        if self._count and dimensions != len(self._mean):
            raise InputError(
                f"features of {dimensions} dimensions cannot join those of {len(self._mean)}: "
                "take all from the same network."
            )

    def _include(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self._count:
            self._count, self._mean, self._scatter = count, mean.copy(), scatter.copy()
            return
        total = self._count + count
        difference = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(difference, difference * (self._count * count / total))
        self._mean += difference * (count / total)
        self._count = total


def statistics(features: jax.Array | np.ndarray) -> Statistics:
    """Measures mean and covariance of a set of features, in float64 whatever they come in.

    Args:
      features: `[N, D]`, one row per sample, N >= 2; any real dtype.

    Raises:
      InputError: the shape is another, there are fewer than two rows, or a value is not finite.

    Source: the official evaluation keeps the float32 mean of float32 features; that moves an
      FID by up to 5e-7.
    """
    moments = Moments()
    moments.add(features)
    return moments.statistics()


def frechet_distance(
    mu1: jax.Array | np.ndarray,
    sigma1: jax.Array | np.ndarray,
    mu2: jax.Array | np.ndarray,
    sigma2: jax.Array | np.ndarray,
) -> float:
    """Measures how far apart two Gaussians are; on Inception features this is FID.

        |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2
        tr (S1 S2)^1/2 = sum of sqrt(eigenvalues of S1^1/2 S2 S1^1/2)

    The eigenvalue form is exact for singular covariances too (a constant feature, fewer samples
    than dimensions), where a matrix square root of S1 S2 need not exist.

    Args:
      mu1, mu2: `[D]`, means.
      sigma1, sigma2: `[D, D]`, covariances.

    Returns:
      The squared distance, in squared feature units, never below 0.

    Raises:
      InputError: shapes do not fit together, a value is not finite, or a sigma is no covariance
        (not symmetric, or with a clearly negative eigenvalue).

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule"; the official
      evaluation takes scipy's sqrtm of S1 S2 instead, within 1e-7 on well-conditioned features.
    """
    mu1, mu2, sigma1, sigma2 = (
        np.asarray(a).astype(np.float64) for a in (mu1, mu2, sigma1, sigma2)
    )
    d = mu1.size
    wanted = [(d,), (d, d), (d,), (d, d)]
    shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
    if d == 0 or shapes != wanted:
        raise InputError(
            f"means and covariances must be [D], [D, D], [D], [D, D] with one D, got {shapes}: "
            "take both from features of the same network."
        )
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise InputError("means and covariances must be finite, got NaN or infinity.")
    values, vectors = _eigh("sigma1", sigma1)
    root1 = (vectors * np.sqrt(values)) @ vectors.T
    _eigh("sigma2", sigma2)
    product = root1 @ sigma2 @ root1
    overlap = np.linalg.eigvalsh((product + product.T) / 2)
    trace_of_root = np.sqrt(np.maximum(overlap, 0.0)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(0.0, float(distance))  # rounding can leave equal statistics just below 0


def _eigh(name: str, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, rounding below zero cut off, and eigenvectors of a checked covariance."""
    scale = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > 1e-5 * scale:  # files may hold float32 covariances
        raise InputError(f"{name} is not symmetric, so it is no covariance.")
    values, vectors = np.linalg.eigh(sigma)
    if values[0] < -1e-4 * scale:
        raise InputError(f"{name} has eigenvalue {values[0]:.3g} < 0, so it is no covariance.")
    return np.maximum(values, 0.0), vectors
