"""The Fréchet distance between two sets of features: FID and its relatives, in float64."""

from typing import NamedTuple

import jax
import numpy as np

from flowturbo_jax.interfaces import InputError


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


def statistics(features: jax.Array | np.ndarray) -> Statistics:
    """Measures mean and covariance of a set of features, in float64 whatever they come in.

    Args:
      features: `[N, D]`, one row per sample, N >= 2; any real dtype.

    Raises:
      InputError: the shape is another, there are fewer than two rows, or a value is not finite.

    Source: the official evaluation keeps the float32 mean of float32 features; that moves an
      FID by up to 5e-7.
    """
    x = np.asarray(features).astype(np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise InputError(f"features must be [samples, dimensions], got shape {x.shape}.")
    if len(x) < 2:
        raise InputError(f"a covariance needs at least 2 samples, got {len(x)}.")
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise InputError(
            f"features of {len(bad)} of {len(x)} samples are not finite, first sample {bad[0]}: "
            "look for NaN or infinity in its image."
        )
    mean = x.mean(axis=0)
    centred = x - mean
    return Statistics(mean, centred.T @ centred / (len(x) - 1), len(x))


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
