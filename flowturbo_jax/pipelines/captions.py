"""The captions that a model of texts is measured by: where they are from, and what judges know."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax import data
from flowturbo_jax.data.digit_captions import PHRASINGS, WORDS, digit_captions
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.text_to_image import TextToImage

DIGITS = "digit_captions"  # the data set whose captions name what a classifier knows


class Captions(NamedTuple):
    """What images are made of.

    Attributes:
      name: of the data set, or of the file.
      texts: the captions, in the order in which they take turns.
      negative_prompt: what guidance leads all images away from.
      digits: the digit that each caption names `[N]` int32; None where they name none.
      phrasings: in which of PHRASINGS each does; () likewise.
    """

    name: str
    texts: tuple[str, ...]
    negative_prompt: str = ""
    digits: np.ndarray | None = None
    phrasings: tuple[str, ...] = ()

    @property
    def card(self) -> dict[str, Any]:
        """What a protocol card says of them."""
        digest = hashlib.sha256("\0".join(self.texts).encode()).hexdigest()
        return {
            "captions": self.name,
            "captions_sha256": digest,
            "negative_prompt": self.negative_prompt,
        }

    def rows(self, pipe: TextToImage, indices: np.ndarray) -> np.ndarray:
        """What programs get of some of them, `[len(indices), 2, L]` token ids."""
        used, inverse = np.unique(indices, return_inverse=True)
        return pipe.tokens([self.texts[i] for i in used], self.negative_prompt)[inverse]

    def by_phrasing(self, indices: np.ndarray, right: np.ndarray) -> dict[str, float]:
        """How often images of each phrasing show the digit that they are to.

        Args:
          indices: of the caption of each image, `[N]`.
          right: whether it shows the digit, `[N]`.
        """
        said = np.array(self.phrasings)[indices]
        return {text: float(right[said == text].mean()) for text in dict.fromkeys(said.tolist())}


def open_captions(name: str, image_size: int = 0, negative_prompt: str = "") -> Captions:
    """Captions by the name that a command line gives.

    Args:
      name: a captioned data set, such as captions:DIR, whose captions take turns so that each image
        has had its first one before any has its second; "digit_captions", of which each different
        one is taken once; or a file of a caption a line, or .jsonl, in its order.
      image_size: side of the images of a data set that needs to know, in pixels.
      negative_prompt: what guidance leads all images away from.

    Raises:
      InputError: there is no such file or data set, or it has no captions.
    """
    if name == DIGITS:
        phrased = [digit_captions(digit) for digit in range(len(WORDS))]
        pairs = [(k, digit) for k in range(len(PHRASINGS)) for digit in range(len(WORDS))]
        return Captions(
            name,
            tuple(phrased[digit][k] for k, digit in pairs),
            negative_prompt,
            np.array([digit for _, digit in pairs], np.int32),
            tuple(PHRASINGS[k] for k, _ in pairs),
        )
    if name.partition(":")[0] in data.OPENERS:
        return Captions(name, _of_source(data.open_source(name, image_size)), negative_prompt)
    file = Path(name).expanduser()
    return Captions(file.name, tuple(data.read_prompts(file)), negative_prompt)


def _of_source(source: data.DataSource) -> tuple[str, ...]:
    """The captions of a data set: the first of each image, then the second ones, and so on."""
    if not source.captioned:
        raise InputError(
            f"{source.name} has no captions; give captions:DIR, {DIGITS}, or a file of a caption a "
            "line"
        )
    each = []
    for index in range(len(source.examples)):
        try:
            each.append(source.examples.captions(index))
        except data.UnreadableError:
            continue  # as in training
    most = max(map(len, each), default=0)
    if not most:
        raise InputError(f"no caption of {source.name} can be read")
    return tuple(texts[k] for k in range(most) for texts in each if k < len(texts))
