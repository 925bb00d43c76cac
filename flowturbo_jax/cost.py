"""What a network costs, counted from its parameters and its traced program."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from flowturbo_jax.interfaces import InputError, Params

# Primitives that run the one program inside them exactly once; JAX has renamed some over time.
RUN_ONCE = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}


def parameter_count(params: Params) -> int:
    """Number of values in a tree of arrays, or of shapes from `jax.eval_shape`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def multiply_adds(function: Callable[..., Any], *args: Any) -> int:
    """Multiply-adds of one call, the number papers print as FLOPs or GMACs.

    Counts the matrix products and convolutions of the traced program; nothing is computed. A loop
    counts as often as it runs, a conditional as its most expensive branch. A convolution counts
    every tap of its kernel for every output value, padding and dilation zeros included. Products
    value by value, sums, normalisations and look-ups count as nothing; what is traced counts, even
    where the compiler would drop it.

    Args:
      function: anything JAX can trace.
      *args: pytrees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The multiply-adds for all rows of the batch together.

    Raises:
      InputError: the program multiplies inside something that runs an unknown number of times.
    """
    return _count(jax.make_jaxpr(function)(*args))


def _count(program: Any) -> int:
    return sum(_count_equation(equation) for equation in program.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return _outputs(equation) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return _outputs(equation) * (math.prod(kernel) // max(out_features, 1))
    counts = [_count(program) for program in _programs(params)]
    if not any(counts):
        return 0
    if name == "cond":
        return max(counts)
    if name == "scan":
        return params["length"] * sum(counts)
    if name in RUN_ONCE:
        return sum(counts)
    if name == "while":
        raise InputError(
            "cannot count the multiply-adds of a while loop: how often it runs is known only when "
            "it has run; use jax.lax.scan, or jax.lax.fori_loop with constant bounds"
        )
    raise InputError(
        f"cannot count the multiply-adds inside {name!r}: how often it runs its program is "
        "unknown; count the function that it wraps"
    )


def _outputs(equation: Any) -> int:
    return math.prod(equation.outvars[0].aval.shape)


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs among an equation's parameters: open or closed, alone or in a tuple."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
