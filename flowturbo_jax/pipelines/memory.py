"""What does not fit into memory, said in one line that tells what to do."""

import contextlib
from collections.abc import Iterator

import jax

from flowturbo_jax.interfaces import InputError


@contextlib.contextmanager
def one_line(batch_size: int, remedy: str) -> Iterator[None]:
    """Turns the errors of a batch that does not fit, on the host or a device, into an InputError.

    Args:
      batch_size: images in a batch.
      remedy: what to take a smaller one by, such as "--batch-size".

    Raises:
      InputError: memory did not suffice inside the block; other errors pass.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        words = str(error)
        if not isinstance(error, MemoryError) and not (
            "RESOURCE_EXHAUSTED" in words or "out of memory" in words.lower()
        ):
            raise
        raise InputError(
            f"a batch of {batch_size} images does not fit into memory; take a smaller {remedy}"
        ) from error
