"""The embedded data set of texts: scikit-learn's handwritten digits, each with several captions."""

import hashlib

import numpy as np
from jaxtyping import Float32, Int32

from flowturbo_jax.data.digits import open_digits
from flowturbo_jax.data.source import CaptionedExample, DataSource
from flowturbo_jax.interfaces import InputError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a handwritten {word}",
    "the digit {numeral}",
    "a picture of the number {word}",
    "somebody wrote {article} {word}",
    "{word}, written by hand",
    "a small grey {numeral}",
    "{numeral}",
    "the number {numeral} in somebody's handwriting",
)


def open_digit_captions(argument: str, image_size: int) -> DataSource:
    """Opens scikit-learn's handwritten digits with a caption in each of PHRASINGS.

    Args:
      argument: what follows "digit_captions:" in a name; there is nothing to choose, so empty.
      image_size: 0, or 8.

    Returns:
      The images of "digits", `[8, 8, 1]`, captioned.

    Raises:
      InputError: the argument is not empty, or another size is asked for.
    """
    if argument:
        raise InputError(
            f"the data set is called 'digit_captions' alone, got 'digit_captions:{argument}'."
        )
    digits = open_digits("", image_size)
    content = "\0".join([digits.fingerprint, *PHRASINGS])
    return DataSource(
        "digit_captions",
        DigitCaptions(digits.examples.data, digits.examples.labels),
        digits.shape,
        (),
        hashlib.sha256(content.encode()).hexdigest(),
        captioned=True,
    )


def digit_captions(label: int | np.integer) -> tuple[str, ...]:
    """The captions of a digit, e.g. "a handwritten seven", one for each of PHRASINGS.

    Raises:
      InputError: the label is no digit.
    """
    if not 0 <= label < len(WORDS):
        raise InputError(f"a digit is from 0 to {len(WORDS) - 1}, got {label}")
    word = WORDS[label]
    words = {"article": "an" if word == "eight" else "a", "word": word, "numeral": int(label)}
    return tuple(phrasing.format(**words) for phrasing in PHRASINGS)


class DigitCaptions:
    """Digits by index: `{"data": [8, 8, 1] float32, "captions": digit_captions(label)}`.

    Args:
      data: `[N, 8, 8, 1]` float32 in [-1, 1].
      labels: `[N]` int32, zero to nine.

    Attributes:
      data: as given.
      labels: as given, to evaluate what was made of a caption; examples do not hold them.
    """

    def __init__(
        self, data: Float32[np.ndarray, "n height width channels"], labels: Int32[np.ndarray, " n"]
    ) -> None:
        self.data, self.labels = data, labels
        self._captions = [digit_captions(label) for label in range(len(WORDS))]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> CaptionedExample:
        return {"data": self.data[index], "captions": self.captions(index)}

    def name(self, index: int) -> str:
        return f"example {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[int(self.labels[index])]
