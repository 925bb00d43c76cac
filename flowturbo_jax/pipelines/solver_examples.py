"""What a solver is learnt from: noises, and the fine solution of the flow from each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowturbo_jax import path
from flowturbo_jax.interfaces import Latents
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.fine_solution import fine_solution
from flowturbo_jax.pipelines.plan import Plan

POINTS = 32  # of the fine solution on its way
GOLDEN_RATIO = 0.6180339887498949


class Examples(NamedTuple):
    """What a solver is learnt from, or measured on.

    Attributes:
      noise: `[B, H, W, C]` float32.
      labels: `[B]` int32.
      way: the fine solution from there, at `POINTS` even times after 0, `[B, POINTS, H, W, C]`.
    """

    noise: Any
    labels: Any
    way: Any

    def rows(self, chosen: Any) -> "Examples":
        """Some of them."""
        return Examples(*(part[chosen] for part in self))


def examples(
    pipe: ClassToImage,
    plan: Plan,
    first: int,
    count: int,
    labels: np.ndarray,
    seed: int,
    cache: Path,
    batch_size: int,
    on_images: Callable[[int, int], Any] = max,
) -> Examples:
    """Noises of a seed, with the fine solution from each.

    Args:
      pipe: the model, whose networks compute in float32.
      plan: guidance mode and scale.
      first: index of the first noise.
      count: how many.
      labels: of classes, which are spread over the noises.
      seed: image i of this seed has noise i.
      cache: folder for the solutions.
      batch_size: solved at once.
      on_images: told how many are solved, and of how many.
    """
    indices = np.arange(first, first + count, dtype=np.uint32)
    shape = pipe.model.description.predictor.shape
    seeds = np.full(count, seed, np.uint32)
    draw = jax.jit(path.sample_noise, static_argnums=2)
    noise = np.asarray(draw(jnp.asarray(seeds), jnp.asarray(indices), shape))
    shares = indices * GOLDEN_RATIO % 1  # every share of them sees labels from all over
    chosen = labels[(shares * len(labels)).astype(int)].astype(np.int32)
    way = fine_solution(pipe, noise, chosen, plan, cache, batch_size, on_images, POINTS)
    return Examples(noise, chosen, way)


def on_the_way(
    way: Float[Array, "batch points *point"], noise: Latents, t: Float[Array, ""]
) -> Latents:
    """The fine solution at any time, between its points on a straight line, `[B, ...]`."""
    position = t * way.shape[1]
    before = jnp.clip(jnp.floor(position), 0, way.shape[1] - 1).astype(jnp.int32)
    begin = jnp.where(before == 0, noise, way[:, jnp.maximum(before - 1, 0)])
    return begin + (position - before.astype(position.dtype)) * (way[:, before] - begin)
