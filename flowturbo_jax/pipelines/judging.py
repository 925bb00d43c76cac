"""What samples are judged by: features, statistics of real images, and scores of both together."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax import data, images, parallel
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import (
    PIXELS,
    DigitsClassifier,
    FeatureNetwork,
    Reference,
    Statistics,
    frechet_distance,
    inception_network,
    inception_score_of_probabilities,
    precision_recall,
    read_reference,
)
from flowturbo_jax.pipelines.real_images import (
    feature_columns,
    measure_reference,
    named_features,
    stream_statistics,
)

DIGIT_SHAPE, DIGITS = (8, 8, 1), 10
DRAWN = 50_000  # images of a data set that has no end
TOO_FEW = "{:,} {} for {:,} feature dimensions: the covariance is singular and the distance biased"
INCEPTION_BATCH = 32  # images on each device at once
REPORTED = 20_000  # images above which their statistics are worth a word
# Sources whose images are cropped to a size.
CROPPED = ("images", "folder", "tfds", "captions", "shards", "tfds_captions")
NETWORKS = "pixels, digits or inception:FILE"


class Judges(NamedTuple):
    """What samples are judged by.

    Attributes:
      network: turns images into features.
      reference: statistics of real images, of the same network.
      classifier: judge of the labels of digits, or None.
      neighbours: of precision and recall; Kynkäänniemi et al. 2019 and ADM take 3.
      split_size: images whose score is averaged into the Inception Score; ADM takes 5,000.
    """

    network: FeatureNetwork
    reference: Reference
    classifier: DigitsClassifier | None = None
    neighbours: int = 3
    split_size: int = 5000


def digits_judges() -> Judges:
    """All real digits, compared by pixels, and a classifier fitted on three quarters of them."""
    return Judges(PIXELS, measure_reference(data.open_source("digits"), PIXELS), DigitsClassifier())


def open_network(name: str) -> FeatureNetwork:
    """A feature network by name.

    Args:
      name: "pixels", "digits" (a classifier's view of digits) or "inception:FILE", where FILE is
        pytorch-fid's or torch-fidelity's, local or `hf://owner/name/file`.

    Raises:
      InputError: no such network, or its file is refused.
    """
    kind, colon, argument = name.partition(":")
    if kind == "inception" and argument:
        # Batches split over all devices here.
        return inception_network(argument, INCEPTION_BATCH * parallel.local_devices())
    if colon or kind not in ("pixels", "digits"):
        raise InputError(f"features are to be {name!r}; they can be {NETWORKS}")
    return PIXELS if kind == "pixels" else DigitsClassifier().features


@contextlib.contextmanager
def opened(
    features: str | None,
    reference: str | None,
    shape: tuple[int, int, int],
    work: Path,
    report: Callable[[str], Any] = str,
    *,
    classes: int = DIGITS,
    on_images: Callable[[int, int], Any] = max,
) -> Iterator[Judges]:
    """The judges of samples, by the names a command line gives.

    Args:
      features: as in `open_network`; None for pixels, where images have the size of digits.
      reference: an .npz file, or a data set; None for the real digits, where images have their
        size.
      shape: [H, W, C] of the samples.
      work: folder in which the features of a data set are kept until the block is left without an
        error.
      report: told in a line what takes long.
      classes: that images are asked for by; a classifier judges the labels of ten digits only.
      on_images: told how many images of a data set are done, and of how many.

    Raises:
      InputError: a name is missing or not known, or what it names is refused.
    """
    digits = shape == DIGIT_SHAPE
    if not digits and (features is None or reference is None):
        raise InputError(
            f"images of {list(shape)} are no digits: give --features ({NETWORKS}) and --reference "
            "(FILE.npz, images:DIR, tfds:NAME, ...)"
        )
    network = open_network(features or "pixels")
    name = reference or "digits"
    kind = name.partition(":")[0]
    if name.endswith(".npz") and kind not in data.OPENERS:
        found = read_reference(name, network)
    else:
        source = data.open_source(name, shape[0] if kind in CROPPED else 0)
        count = len(source.examples)
        if kind == "mixture":
            count = min(count, DRAWN)
        if count > REPORTED:
            report(f"taking the statistics of {count:,} images of {name} first")
        found = measure_reference(source, network, work, count=count, on_images=on_images)
    labelled = name == "digits" and digits and classes == DIGITS
    yield Judges(network, found, DigitsClassifier() if labelled else None)
    remove(work)


def remove(work: Path) -> None:
    """Deletes a folder of work that is done."""
    shutil.rmtree(work, ignore_errors=True)


def row_columns(
    judges: Judges, shape: tuple[int, int, int]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Dtype and shape of the rows of `judge`, by name, as `GrowingArrays` wants them."""
    columns = feature_columns(judges.network, shape)
    if judges.classifier is not None:
        columns["label_right"] = (np.uint8, ())
    return columns


def check_fits(shape: tuple[int, int, int], judges: Judges, hint: str = "") -> None:
    """Refuses images that cannot be compared with the reference, before any is made.

    Args:
      shape: [H, W, C] of the images.
      judges: what they are to be judged by.
      hint: ends the message, where there is another way.

    Raises:
      InputError: the images, or their features, are of another size.
    """
    columns, reference = feature_columns(judges.network, shape), judges.reference
    pairs = {"pooled": reference.pooled, "spatial": reference.spatial}
    for name, statistics in pairs.items():
        if statistics is None or name not in columns:
            continue
        wanted, found = len(statistics.mean), columns[name][1][0]
        if found != wanted:
            raise InputError(
                f"the model makes images of {list(shape)}, of {found} {name} features by "
                f"{judges.network.name}; the reference {reference.name} has {wanted}: give another "
                f"one{hint}"
            )
    if judges.classifier is not None and shape != DIGIT_SHAPE:
        raise InputError(f"images of {list(shape)} are no digits, which are {list(DIGIT_SHAPE)}")


def score(found: Mapping[str, np.ndarray], judges: Judges) -> dict[str, float]:
    """How far samples are from the reference, by all that the judges can say.

    Args:
      found: rows of every sample: "pooled", and if there are any "spatial", and "label_right"
        (whether the classifier sees the label asked for).
      judges: the network the features are of, and the reference.

    Returns:
      `frechet_distance`; with spatial features on both sides `spatial_frechet_distance`; of a
      network with classes `inception_score`; with features of real images `precision`, `recall`;
      with a classifier `label_accuracy`.
    """
    pooled, reference = found["pooled"], judges.reference
    scores = {"frechet_distance": _distance(stream_statistics(pooled), reference.pooled)}
    if "spatial" in found and reference.spatial is not None:
        spatial = stream_statistics(found["spatial"])
        scores["spatial_frechet_distance"] = _distance(spatial, reference.spatial)
    if judges.network.probabilities is not None:
        splits = range(0, len(pooled), judges.split_size)
        each = [
            inception_score_of_probabilities(
                judges.network.probabilities(np.asarray(pooled[i : i + judges.split_size])),
                judges.split_size,
            )
            for i in splits
        ]
        scores["inception_score"] = float(np.mean(each))
    if _has_neighbours(judges, len(pooled)):
        near = precision_recall(reference.features, np.asarray(pooled), judges.neighbours)
        scores |= {"precision": float(near.precision), "recall": float(near.recall)}
    if "label_right" in found:
        scores["label_accuracy"] = float(np.mean(found["label_right"]))
    return scores


def _has_neighbours(judges: Judges, samples: int) -> bool:
    """Whether precision and recall can be measured."""
    real = judges.reference.features
    return real is not None and min(samples, len(real)) > judges.neighbours


def _distance(a: Statistics, b: Statistics) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def judge(made: np.ndarray, labels: np.ndarray | None, judges: Judges) -> dict[str, np.ndarray]:
    """The rows that `score` wants of a batch of images.

    Args:
      made: `[B, H, W, C]` uint8.
      labels: `[B]` int, what was asked for; None where no classifier knows it.
      judges: what to take of them.
    """
    rows = named_features(judges.network.extract(made))
    if judges.classifier is not None:
        seen = judges.classifier.predict(images.from_uint8(made))
        rows["label_right"] = (seen == labels).astype(np.uint8)
    return rows


def judges_card(judges: Judges, samples: int) -> dict[str, Any]:
    """What a protocol card says of judges, and what it warns of.

    Args:
      judges: what samples are judged by.
      samples: how many there will be.
    """
    network, reference, classifier = judges.network, judges.reference, judges.classifier
    card: dict[str, Any] = {
        "feature_network": network.name,
        "feature_network_sha256": network.fingerprint,
        "reference": reference.name,
        "reference_sha256": reference.fingerprint,
        "reference_samples": reference.pooled.count or "not recorded",
        "reference_network_sha256": reference.network or "not recorded",
    }
    if _has_neighbours(judges, samples):
        card["precision_recall"] = {
            "neighbours": judges.neighbours,
            "real_images": len(reference.features),
        }
    if network.probabilities is not None:
        card["inception_score_split"] = judges.split_size
    if classifier is not None:
        card["label_classifier_sha256"] = classifier.fingerprint
        card["label_classifier_held_out_accuracy"] = classifier.held_out_accuracy
    dimensions = len(reference.pooled.mean)
    card["warnings"] = [
        TOO_FEW.format(count, whose, dimensions)
        for count, whose in ((samples, "samples"), (reference.pooled.count, "reference images"))
        if 0 < count <= dimensions
    ]
    return card
