"""How fast this device multiplies matrices: the ceiling that utilisation is a fraction of."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowturbo_jax.pipelines.timing import Stopwatch

SIZES = (1024, 2048)  # of a CPU; larger ones are no faster
ACCELERATOR_SIZES = (4096, 8192)
PRODUCTS = 8  # in one program, so that starting it takes no part of the time

Square = Float[Array, "side side"]


class Ceiling(NamedTuple):
    """What was measured.

    Attributes:
      flop_per_second: of the size that is fastest; a multiply-add is two.
      by_size: the same of each side of the square matrices.
    """

    flop_per_second: float
    by_size: dict[int, float]


def measure(dtype: Any, stopwatch: Stopwatch, sizes: tuple[int, ...] | None = None) -> Ceiling:
    """Multiplies square matrices on the first device, at the precision networks of the dtype have.

    Args:
      dtype: float32, which is no TF32, or bfloat16.
      stopwatch: of the measurement; the shortest of its repeats counts.
      sizes: sides of the matrices; by the kind of the device if None.
    """
    if sizes is None:
        sizes = SIZES if jax.devices()[0].platform == "cpu" else ACCELERATOR_SIZES
    by_size = {}
    for size in sizes:
        keys = jax.random.split(jax.random.key(0))
        # Entries of variance 1 / size keep the products from growing or vanishing.
        left, right = (jax.random.normal(key, (size, size), jnp.float32) for key in keys)
        right = right / jnp.sqrt(jnp.float32(size))
        factors = left.astype(dtype), right.astype(dtype)
        least = stopwatch.back_to_back(partial(chained_products, *factors)).least
        by_size[size] = 2 * size**3 * PRODUCTS / least
    return Ceiling(max(by_size.values()), by_size)


def best(first: Ceiling, second: Ceiling) -> Ceiling:
    """Of two measurements, what was faster: the device may have had other work during one."""
    both = first.by_size, second.by_size
    by_size = {size: max(rates[size] for rates in both) for size in first.by_size}
    return Ceiling(max(by_size.values()), by_size)


@jax.jit
def chained_products(left: Square, right: Square) -> Square:
    """`left right^PRODUCTS`, each product after the one before."""
    precision = "highest" if left.dtype == jnp.float32 else "default"

    def multiply(x: Square, _: None) -> tuple[Square, None]:
        return jnp.matmul(x, right, precision=precision), None

    return jax.lax.scan(multiply, left, None, length=PRODUCTS)[0]
