"""A judge for generated digits: a classifier fitted on the real ones."""

import copy
import hashlib
import itertools
import json
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from flowturbo_jax.data import arrays, open_source
from flowturbo_jax.images import from_uint8
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics.network import FeatureNetwork, Features, byte_images, softmax

SETTINGS = {"model": "SVC", "kernel": "rbf", "C": 10.0, "gamma": "scale"}
HELD_OUT = 4  # every fourth image is kept from the fit, to measure the judge on
PAIRS = tuple(itertools.combinations(range(10), 2))
PAIR_FEATURES = "one-vs-one margins; softmax of their sums by digit"


class DigitsClassifier:
    """Says which digit an image shows, to count how often a sample shows the digit asked for.

    A support vector machine on the 64 pixels, fitted on three quarters of scikit-learn's digits
    (well under a second, always to the same model).

    Attributes:
      held_out_accuracy: the share of the other quarter it reads correctly, in [0, 1]; the
        accuracy that perfect samples would reach.
      fingerprint: sha256 over the data, the split and the settings, in hexadecimal.
    """

    def __init__(self) -> None:
        from sklearn.svm import SVC  # here, because it takes most of a second

        source = open_source("digits")
        images, labels = arrays(source)
        held_out = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
        self._model = SVC(kernel=SETTINGS["kernel"], C=SETTINGS["C"], gamma=SETTINGS["gamma"])
        self._model.fit(_rows(images[~held_out]), labels[~held_out])
        self.held_out_accuracy = self.accuracy(images[held_out], labels[held_out])
        identity = {"data": source.fingerprint, "held_out": HELD_OUT, **SETTINGS}
        self.fingerprint = _sha256(identity)
        # The same fitted model, showing its decisions between pairs of digits.
        self._pairs = copy.copy(self._model).set_params(decision_function_shape="ovo")

    @property
    def features(self) -> FeatureNetwork:
        """What the classifier sees in digits, as features to compare sets of images by.

        `extract` takes `[N, 8, 8, 1]` uint8. `pooled` is `[N, 45]` float64: for every pair of
        digits a < b, in the order (0, 1), (0, 2), ..., (8, 9), how far the image lies on a's side
        of their boundary. `probabilities` gives a digit the softmax of the sum of its nine margins.
        It is not scikit-learn's one-vs-rest value, which counts won pairs and so hardly tells a
        clear digit from a doubtful one.
        """
        return FeatureNetwork(
            name="digits classifier",
            fingerprint=_sha256({"classifier": self.fingerprint, "features": PAIR_FEATURES}),
            extract=lambda images: Features(
                self._pairs.decision_function(_rows(from_uint8(byte_images(images))))
            ),
            probabilities=lambda pooled: softmax(np.asarray(pooled) @ _sides()),
            dimensions=len(PAIRS),
        )

    def predict(self, images: jax.Array | np.ndarray) -> Int32[np.ndarray, " n"]:
        """Reads digits.

        Args:
          images: `[N, 8, 8, 1]` float, pixels in [-1, 1].

        Returns:
          The digit each one shows, `[N]` int32.

        Raises:
          InputError: the images have another shape or dtype, or are not finite.
        """
        return self._model.predict(_rows(images)).astype(np.int32)

    def accuracy(self, images: jax.Array | np.ndarray, labels: jax.Array | np.ndarray) -> float:
        """Measures the share of images that show the digit of their label.

        Args:
          images: `[N, 8, 8, 1]` float, pixels in [-1, 1].
          labels: `[N]` int, 0 to 9.

        Returns:
          A share in [0, 1].

        Raises:
          InputError: as `predict`, or labels and images differ in number.
        """
        predicted, labels = self.predict(images), np.asarray(labels)
        if labels.shape != predicted.shape:
            raise InputError(
                f"every image needs one label, got labels {labels.shape} "
                f"for {len(predicted)} images."
            )
        return float(np.mean(predicted == labels))


def _sides() -> np.ndarray:
    """What a margin of a pair says for each digit: 1 or -1 for its two, `[45, 10]`."""
    digits = np.eye(10)
    return np.stack([digits[a] - digits[b] for a, b in PAIRS])


def _sha256(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _rows(images: jax.Array | np.ndarray) -> np.ndarray:
    """Checked images as rows of 64 pixels, float64."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (8, 8, 1) or len(images) == 0:
        raise InputError(f"digits are images [N, 8, 8, 1], N >= 1, got shape {images.shape}.")
    if np.issubdtype(images.dtype, np.integer) or images.dtype == bool:
        raise InputError(
            f"digits are pixels in [-1, 1], got {images.dtype}: convert with from_uint8."
        )
    rows = images.reshape(len(images), -1).astype(np.float64)
    if not np.isfinite(rows).all():
        raise InputError("digits must be finite, got NaN or infinity: the sampler diverged.")
    return rows
