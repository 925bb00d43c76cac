"""What every data set is: labelled examples by index, and the names they are opened by."""

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from flowturbo_jax.interfaces import InputError

# As stored: {"label": [] int32} and either {"data": [H, W, C] float32 in [-1, 1]} or whatever the
# source's `draw` makes such data of.
Example = dict[str, np.ndarray]
# As a captioned source stores it: {"data": [H, W, C] float32 in [-1, 1], "captions": one text or
# more}.
CaptionedExample = dict[str, np.ndarray | tuple[str, ...]]
Draw = Callable[[Example, np.random.Generator, bool], Example]


# What is wrong with the machine and not with an example, and what to do about it.
FAILURES = {
    errno.EMFILE: "raise the limit of open files, such as with: ulimit -n 8192",
    errno.ENFILE: "let other programs end, or raise the system's limit of open files",
    errno.ENOMEM: "take a smaller batch or fewer threads",
    errno.EIO: "look after the disk or the network, then start again",
    errno.ESTALE: "look after the disk or the network, then start again",
}


class UnreadableError(Exception):
    """One example cannot be read; the message says why. Readers count it and go on."""


def refuse_failing_machine(name: str, error: BaseException) -> None:
    """Tells a failing machine, which ends a run, from a damaged example, which is passed over.

    Args:
      name: what was being read.
      error: what reading raised. Looked at are errno, here and in what caused it, and, because
        ArrayRecord raises only RuntimeError, the words of the system in the message.

    Raises:
      InputError: not the example is at fault but the machine.
    """
    cause: BaseException | None = error
    while cause is not None:
        for number, remedy in FAILURES.items():
            words = os.strerror(number)
            said = isinstance(cause, RuntimeError) and words in str(cause)
            no_memory = number == errno.ENOMEM and isinstance(cause, MemoryError)
            if said or no_memory or getattr(cause, "errno", None) == number:
                raise InputError(f"cannot read {name}: {words}; {remedy}") from error
        cause = cause.__cause__


@runtime_checkable
class Examples(Protocol):
    """Labelled examples by index, in memory or on disk; reading is safe from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`; raises UnreadableError if that one cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What a user would look for, such as the file's path."""
        ...


@runtime_checkable
class CaptionedExamples(Protocol):
    """Examples by index that have captions in place of labels; safe to read as `Examples` are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionedExample:
        """Reads example `index`; raises UnreadableError if that one cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What a user would look for, such as the file's path."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of example `index`, whose image is not decoded; raises UnreadableError."""
        ...


@dataclass(frozen=True)
class DataSource:
    """A data set the library can train on and compare with.

    Attributes:
      name: the name it was opened under, e.g. "digits".
      examples: by index, `{"data": [H, W, C] float32 in [-1, 1], "label": [] int32}`, unless `draw`
        is given; or, if `captioned`, `{"data", "captions"}`, the latter a tuple of texts.
      shape: `(H, W, C)` of every training example's data.
      class_names: the name of label 0, 1, ...; () where there are captions.
      fingerprint: in hexadecimal; equal only for equal data. In-memory sources take all content,
        others what their opener says.
      draw: `(example, generator, flip) -> {"data", "label"}`, what is random in turning a stored
        example into one to train on; None where only the flip is.
      latents: what made the latents (a `latent_cache.Manifest`); None where data are pixels.
      label: shape and dtype of a training example's label; of captions, after
        `captions.tokenised`, that of one caption's token ids.
      captioned: examples have `captions`, a tuple of texts, in place of `label`; to train on them,
        make token ids of those by `captions.tokenised`.
    """

    name: str
    examples: Examples | CaptionedExamples
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fingerprint: str
    draw: Draw | None = None
    latents: Any = None
    label: tuple[tuple[int, ...], str] = ((), "int32")
    captioned: bool = False


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

    def name(self, index: int) -> str:
        return f"example {index}"

    def fingerprint(self) -> str:
        """sha256 over shape, data and labels, in hexadecimal; the same on every machine."""
        digest = hashlib.sha256(repr(self.data.shape).encode())
        digest.update(self.data.astype("<f4").tobytes())
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


def mirror(example: Example, generator: np.random.Generator, flip: bool) -> Example:
    """The example, left and right exchanged in half of the cases if `flip`."""
    if flip and generator.random() < 0.5:
        return {**example, "data": example["data"][:, ::-1]}
    return example


def arrays(
    source: DataSource,
) -> tuple[Float32[np.ndarray, "n height width channels"], Int32[np.ndarray, " n"]]:
    """Reads a whole data set in its own order, e.g. to evaluate against a small one.

    Returns:
      Data `[N, H, W, C]` float32 in [-1, 1], and labels `[N]` int32, both in memory.

    Raises:
      InputError: an example cannot be read.
    """
    try:
        examples = [source.examples[i] for i in range(len(source.examples))]
    except UnreadableError as error:
        raise InputError(f"{source.name}: {error}") from error
    data = np.stack([example["data"] for example in examples])
    return data, np.stack([example["label"] for example in examples])
