"""Data sets: labelled images by index, and endless batches that depend on (seed, step) alone."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from flowturbo_jax.interfaces import InputError

if TYPE_CHECKING:
    import grain

Example = dict[str, np.ndarray]  # {"data": [H, W, C] float32 in [-1, 1], "label": [] int32}


@runtime_checkable
class Examples(Protocol):
    """Labelled images by index; what `batches` reads may live in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class DataSource:
    """A data set the library can train on and compare with.

    Attributes:
      name: the name it was opened under, e.g. "digits".
      examples: `examples[i]` is `{"data": [H, W, C] float32 in [-1, 1], "label": [] int32}`.
      shape: `(H, W, C)` of every example's data.
      class_names: the name of label 0, 1, ...
      fingerprint: sha256 over all data and labels, in hexadecimal; equal only for equal content.
    """

    name: str
    examples: Examples
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fingerprint: str


class ArrayExamples:
    """Examples held in memory; they share the arrays, which become read-only.

    Args:
      data: `[N, H, W, C]` float32 in [-1, 1].
      labels: `[N]` int32.
    """

    def __init__(
        self, data: Float32[np.ndarray, "n height width channels"], labels: Int32[np.ndarray, " n"]
    ) -> None:
        self.data, self.labels = data, labels
        data.setflags(write=False)
        labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        return {"data": self.data[index], "label": self.labels[index, ...]}

    def fingerprint(self) -> str:
        """sha256 over shape, data and labels, in hexadecimal; the same on every machine."""
        digest = hashlib.sha256(repr(self.data.shape).encode())
        digest.update(self.data.astype("<f4").tobytes())
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


def open_digits(argument: str) -> DataSource:
    """Opens scikit-learn's handwritten digits: 1,797 real grey images, inside the package.

    Args:
      argument: what follows "digits:" in a name; there is nothing to choose, so empty.

    Returns:
      Images `[8, 8, 1]`, 17 grey levels (ink) spread over [-1, 1]; classes zero to nine.

    Raises:
      InputError: the argument is not empty.

    Source: `sklearn.datasets.load_digits`, the test set of UCI "Optical Recognition of
      Handwritten Digits".
    """
    from sklearn.datasets import load_digits  # here, because it takes most of a second

    if argument:
        raise InputError(f"the data set is called 'digits' alone, got 'digits:{argument}'.")
    bunch = load_digits()
    data = (bunch.images / 8.0 - 1.0).astype(np.float32)[..., None]  # stored as 0 .. 16
    examples = ArrayExamples(data, bunch.target.astype(np.int32))
    names = "zero one two three four five six seven eight nine"
    return DataSource(
        "digits", examples, data.shape[1:], tuple(names.split()), examples.fingerprint()
    )


# Which function opens a name: "KIND" or "KIND:ARGUMENT" calls OPENERS[KIND](ARGUMENT).
OPENERS: dict[str, Callable[[str], DataSource]] = {"digits": open_digits}


def open_source(name: str) -> DataSource:
    """Opens a data set by name.

    Args:
      name: "KIND" or "KIND:ARGUMENT", where `OPENERS` knows the kind.

    Raises:
      InputError: no such kind; the message lists the known ones.
    """
    kind, _, argument = name.partition(":")
    if kind not in OPENERS:
        raise InputError(f"unknown data set {name!r}; known: {', '.join(sorted(OPENERS))}.")
    return OPENERS[kind](argument)


def batches(source: DataSource, batch_size: int, seed: int) -> "grain.MapDataset":
    """Makes endless batches; `batches(source, batch_size, seed)[step]` never changes.

    Every epoch is a new order in which each example appears exactly once. A batch may straddle
    two epochs, so none is ever short, and it may be larger than the data set. Random access
    costs no more than the batch's own examples, so a resumed run starts at its step at once.

    Args:
      source: where the examples come from.
      batch_size: examples per batch, B >= 1.
      seed: >= 0; another seed is another, unrelated sequence of orders.

    Returns:
      A grain data set: batch `step` is `{"data": [B, H, W, C] float32 in [-1, 1],
      "label": [B] int32}`, numpy arrays that no accelerator has touched.

    Raises:
      InputError: the batch size is below 1, the seed negative, or the source empty.
    """
    import grain  # here, because it takes a quarter of a second

    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}.")
    if len(source.examples) == 0:
        raise InputError(f"data set {source.name!r} is empty, there is nothing to batch.")
    # grain orders epoch e by (seed + e), so neighbouring seeds would share all but one epoch;
    # hashed seeds do not.
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    examples = grain.MapDataset.source(source.examples).shuffle(order_seed)
    return examples.repeat().batch(batch_size)


def arrays(
    source: DataSource,
) -> tuple[Float32[np.ndarray, "n height width channels"], Int32[np.ndarray, " n"]]:
    """Reads a whole data set in its own order, e.g. to evaluate against a small one.

    Returns:
      Data `[N, H, W, C]` float32 in [-1, 1], and labels `[N]` int32, both in memory.
    """
    examples = [source.examples[i] for i in range(len(source.examples))]
    data = np.stack([example["data"] for example in examples])
    return data, np.stack([example["label"] for example in examples])
