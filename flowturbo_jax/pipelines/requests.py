"""What callers of a pipeline may ask for: batch sizes and seeds, checked before anything runs."""

import numbers
from typing import Any

import numpy as np

from flowturbo_jax.interfaces import InputError


def check_batch_size(batch_size: Any) -> None:
    """Refuses what is no number of images.

    Raises:
      InputError: it is no whole number of at least 1.
    """
    whole = isinstance(batch_size, numbers.Integral) and not isinstance(batch_size, bool)
    if not whole or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; it must be a positive whole number")


def seeds_and_indices(seeds: Any, first_index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The seed and the index of each image, `[count]` uint32 both.

    Args:
      seeds: one seed, whose images have the indices first_index, first_index + 1, ...; or `[count]`
        seeds, each image being the first of its seed.
      first_index: where the indices of a single seed start.
      count: number of images.

    Raises:
      InputError: a seed or index is no whole number in [0, 2^32), or the counts disagree.
    """
    if not isinstance(first_index, numbers.Integral) or not 0 <= first_index <= 2**32 - count:
        raise InputError(f"first_index is {first_index!r}; it must be a whole number in [0, 2^32)")
    seeds = np.asarray(seeds)
    if seeds.dtype.kind not in "iu" or (seeds < 0).any() or (seeds >= 2**32).any():
        raise InputError(f"seeds are {seeds.tolist()}; they must be whole numbers in [0, 2^32)")
    if seeds.ndim == 0:
        indices = first_index + np.arange(count)
    elif seeds.shape == (count,):
        indices = np.zeros(count)
    else:
        raise InputError(f"{seeds.size} seeds for {count} labels; give one, or one per label")
    seeds = np.broadcast_to(seeds, (count,))
    return seeds.astype(np.uint32), indices.astype(np.uint32)
