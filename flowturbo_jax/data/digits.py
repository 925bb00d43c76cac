"""The embedded data set: scikit-learn's handwritten digits."""

import numpy as np

from flowturbo_jax.data.source import ArrayExamples, DataSource
from flowturbo_jax.interfaces import InputError

SIZE = 8


def open_digits(argument: str, image_size: int) -> DataSource:
    """Opens scikit-learn's handwritten digits: 1,797 real grey images, inside the package.

    Args:
      argument: what follows "digits:" in a name; there is nothing to choose, so empty.
      image_size: 0, or 8.

    Returns:
      Images `[8, 8, 1]`, 17 grey levels (ink) spread over [-1, 1]; classes zero to nine.

    Raises:
      InputError: the argument is not empty, or another size is asked for.

    Source: `sklearn.datasets.load_digits`, the test set of UCI "Optical Recognition of
      Handwritten Digits".
    """
    from sklearn.datasets import load_digits  # here, because it takes most of a second

    if argument:
        raise InputError(f"the data set is called 'digits' alone, got 'digits:{argument}'.")
    if image_size not in (0, SIZE):
        raise InputError(f"digits are {SIZE} pixels wide; leave image_size out, got {image_size}.")
    bunch = load_digits()
    data = (bunch.images / 8.0 - 1.0).astype(np.float32)[..., None]  # stored as 0 .. 16
    examples = ArrayExamples(data, bunch.target.astype(np.int32))
    names = "zero one two three four five six seven eight nine"
    return DataSource(
        "digits", examples, data.shape[1:], tuple(names.split()), examples.fingerprint()
    )
