"""What the traced program of a function consists of."""

import jax


def equations(function, *arguments) -> list:
    """Every equation, those of inner programs included."""
    return list(_within(jax.make_jaxpr(function)(*arguments)))


def _within(program):
    for equation in program.eqns:
        yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _within(inner)
