"""Precision and recall: how much of the samples looks real, how much of the real is covered."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flowturbo_jax.interfaces import InputError

BLOCK = 512  # rows compared with a whole set at a time: 100 MB for 50,000 features
# Relative to the squared norms it is computed from, float32 cannot tell a smaller distance from 0.
ROUNDING = 4e-6
FAR = 1e9  # times the largest feature of a ball's centre

Rows = Float[Array, "rows dimensions"]


class PrecisionRecall(NamedTuple):
    """How two sets of features overlap.

    Attributes:
      precision: share of the samples that lie within a real ball, in [0, 1].
      recall: share of the real features that lie within a ball of a sample, in [0, 1].
    """

    precision: float
    recall: float


def precision_recall(
    real: jax.Array | np.ndarray, samples: jax.Array | np.ndarray, k: int = 3
) -> PrecisionRecall:
    """Measures quality and coverage of samples apart, by balls around the features of each set.

    Every feature has a ball that reaches to its k-th nearest neighbour in its own set, itself not
    counted; what lies on the surface is inside.

    Args:
      real: `[N, D]`, one row per image, N > k; any real dtype.
      samples: `[M, D]`, M > k.
      k: which neighbour a ball reaches to.

    Returns:
      Shares of the samples and of the real features. Distances are of float32 on the default
      device, in memory that grows with N + M, not with their product.

    Raises:
      InputError: shapes do not fit together, a set has too few rows, or a value is not finite.

    Source: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing
      Generative Models", eq. 1-2; ADM evaluator.py computes in float16 unless that overflows.
    """
    if k < 1:
        raise InputError(f"k is {k}; it must be 1 or more.")
    real, samples = _checked("real", real, k), _checked("samples", samples, k)
    if real.shape[1] != samples.shape[1]:
        raise InputError(
            f"real features have {real.shape[1]} dimensions, samples {samples.shape[1]}: take both "
            "from the same network."
        )
    return PrecisionRecall(_share_inside(samples, real, k), _share_inside(real, samples, k))


def _checked(name: str, features: jax.Array | np.ndarray, k: int) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise InputError(f"{name} must be [samples, dimensions], got shape {features.shape}.")
    if len(features) <= k:
        raise InputError(f"neighbour {k} needs at least {k + 1} rows, {name} has {len(features)}.")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise InputError(
            f"{len(bad)} of {len(features)} rows of {name} are not finite, first row {bad[0]}: "
            "look for NaN or infinity in its image."
        )
    return features


def _share_inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """The share of the points that lie in a ball around a centre."""
    # Far from the origin, or in large units, |a|^2 + |b|^2 - 2ab would be rounding: centres move to
    # the origin, and a power of two, which rounds nothing, makes the largest feature about 1.
    origin = centres.mean(axis=0, dtype=np.float64)
    extent = max(np.abs(part - origin).max() for part in _parts(centres))
    scale = 2.0 ** -np.round(np.log2(extent)) if extent > 0 else 1.0
    inside = _inside(
        _blocks(points, origin, scale), _blocks(centres, origin, scale), len(centres), k
    )
    return float(np.asarray(inside)[: len(points)].mean())


def _parts(features: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in float64, a block at a time."""
    for first in range(0, len(features), BLOCK):
        yield features[first : first + BLOCK].astype(np.float64)


def _blocks(features: np.ndarray, origin: np.ndarray, scale: float) -> np.ndarray:
    """Moved and scaled features, `[blocks, BLOCK, D]` float32, filled up with zeros."""
    count, dimensions = features.shape
    result = np.zeros((-(-count // BLOCK), BLOCK, dimensions), np.float32)
    for block, part in zip(result, _parts(features), strict=True):
        # No ball reaches as far, and squares of more would leave float32.
        block[: len(part)] = np.clip((part - origin) * scale, -FAR, FAR)
    return result


@partial(jax.jit, static_argnames="k")
def _inside(
    points: Float[Array, "blocks rows dimensions"],
    centres: Float[Array, "all_blocks rows dimensions"],
    count: int | Int[Array, ""],
    k: int,
) -> Bool[Array, " points"]:
    """Which points lie in a ball around one of the first `count` centres."""
    everyone = centres.reshape(-1, centres.shape[-1])
    index = jnp.arange(len(everyone))
    norms = jnp.sum(everyone**2, axis=-1)

    def radii(block: tuple[Rows, Int[Array, " rows"]]) -> Float[Array, " rows"]:
        rows, own = block
        others = (index < count)[None, :] & (index[None, :] != own[:, None])
        apart = jnp.where(others, _distances(rows, everyone, norms), jnp.inf)
        return -jax.lax.top_k(-apart, k)[0][:, -1]

    reach = jax.lax.map(radii, (centres, index.reshape(centres.shape[:2]))).reshape(-1)
    reach = jnp.where(index < count, reach, -1.0)  # no distance is that small

    def inside(rows: Rows) -> Bool[Array, " rows"]:
        return jnp.any(_distances(rows, everyone, norms) <= reach[None, :], axis=1)

    return jax.lax.map(inside, points).reshape(-1)


def _distances(
    rows: Rows, everyone: Float[Array, "all dimensions"], norms: Float[Array, " all"]
) -> Float[Array, "rows all"]:
    """Squared distances of all pairs."""
    products = jnp.matmul(rows, everyone.T, precision=jax.lax.Precision.HIGHEST)
    scale = jnp.sum(rows**2, axis=-1)[:, None] + norms[None, :]
    distances = scale - 2 * products
    return jnp.where(distances < ROUNDING * scale, 0.0, distances)
