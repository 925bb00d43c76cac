"""What samples are judged by: features, statistics of real images, and scores of both together."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax import data, images, parallel
from flowturbo_jax.growing_arrays import GrowingArrays
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import (
    PIXELS,
    DigitsClassifier,
    FeatureNetwork,
    Features,
    Moments,
    Reference,
    Statistics,
    frechet_distance,
    inception_network,
    inception_score_of_probabilities,
    precision_recall,
    read_reference,
)

STREAM_ROWS = 2000  # features held at once
DIGIT_SHAPE = (8, 8, 1)
TOO_FEW = "{:,} {} for {:,} feature dimensions: the covariance is singular and the distance biased"
INCEPTION_BATCH = 32  # images on each device at once
REPORTED = 20_000  # images above which their statistics are worth a word
CROPPED = ("images", "folder", "tfds")  # sources whose images are cropped to a size
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
    if name.endswith(".npz"):
        found = read_reference(name, network)
    else:
        source = data.open_source(name, 0 if name in ("digits",) else _side(name, shape))
        if len(source.examples) > REPORTED:
            report(f"taking the statistics of {len(source.examples):,} images of {name} first")
        found = measure_reference(source, network, work)
    yield Judges(network, found, DigitsClassifier() if name == "digits" and digits else None)
    remove(work)


def _side(name: str, shape: tuple[int, int, int]) -> int:
    return shape[0] if name.partition(":")[0] in CROPPED else 0


def remove(work: Path) -> None:
    """Deletes a folder of work that is done."""
    shutil.rmtree(work, ignore_errors=True)


def measure_reference(
    source: data.DataSource,
    network: FeatureNetwork,
    work: Path | None = None,
    kept: int = 10_000,
    batch_size: int = 64,
    on_images: Callable[[int, int], Any] = max,
) -> Reference:
    """Takes the statistics of a data set's images, each as it is, none mirrored.

    Args:
      source: the images.
      network: takes their features.
      work: folder in which interrupted work is continued; None keeps features in memory.
      kept: how many rows of features to keep for precision and recall, spread over the data set.
      batch_size: images whose features are taken at once.
      on_images: told how many images are done, and of how many.

    Raises:
      InputError: the source has no images, fewer than 2, or one that cannot be read.
    """
    count = len(source.examples)
    if source.latents is not None:
        raise InputError(f"{source.name} holds latents; statistics are of images")
    if count < 2:
        raise InputError(f"{source.name} has {count} images; statistics need at least 2")
    columns = feature_columns(network, source.shape)
    identity = {"source": source.fingerprint, "network": network.fingerprint}
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = GrowingArrays(work, identity, columns)
        on_images(rows.rows, count)
        while rows.rows < count:
            indices = range(rows.rows, min(rows.rows + batch_size, count))
            pixels = np.stack([_read_image(source, index) for index in indices])
            found = network.extract(np.asarray(images.to_uint8(pixels)))
            rows.append(**named_features(found))
            on_images(rows.rows, count)
        pooled = rows.read("pooled")
        chosen = np.linspace(0, count - 1, min(kept, count)).round().astype(int)
        spatial = stream_statistics(rows.read("spatial")) if "spatial" in columns else None
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return Reference(
            source.name,
            digest,
            stream_statistics(pooled),
            spatial,
            np.asarray(pooled[chosen]),
            network.fingerprint,
        )


def _read_image(source: data.DataSource, index: int) -> np.ndarray:
    try:
        return source.examples[index]["data"]
    except data.UnreadableError as error:
        raise InputError(
            f"{source.examples.name(index)} cannot be read ({error}); statistics are of all images "
            "or none: mend or remove it"
        ) from error


def feature_columns(
    network: FeatureNetwork, shape: tuple[int, int, int]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Dtype and shape of the features of one image, by name, as `GrowingArrays` wants them.

    Args:
      network: takes the features.
      shape: [H, W, C] of the images.

    Raises:
      InputError: the network does not take such images.
    """
    found = network.extract(np.zeros((1, *shape), np.uint8))
    return {name: (rows.dtype, rows.shape[1:]) for name, rows in named_features(found).items()}


def named_features(found: Features) -> dict[str, np.ndarray]:
    """The features that there are, by name."""
    return {name: np.asarray(rows) for name, rows in found._asdict().items() if rows is not None}


def stream_statistics(rows: np.ndarray) -> Statistics:
    """Mean and covariance of rows that need not fit into memory, in float64."""
    moments = Moments()
    for first in range(0, len(rows), STREAM_ROWS):
        moments.add(np.asarray(rows[first : first + STREAM_ROWS]))
    return moments.statistics()


def row_columns(
    judges: Judges, shape: tuple[int, int, int]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Dtype and shape of the rows of `judge`, by name, as `GrowingArrays` wants them."""
    columns = feature_columns(judges.network, shape)
    if judges.classifier is not None:
        columns["label_right"] = (np.uint8, ())
    return columns


def check_fits(shape: tuple[int, int, int], judges: Judges) -> None:
    """Refuses images that cannot be compared with the reference, before any is made.

    Args:
      shape: [H, W, C] of the images.
      judges: what they are to be judged by.

    Raises:
      InputError: the images, or their features, are of another size.
    """
    wanted = len(judges.reference.pooled.mean)
    found = feature_columns(judges.network, shape)["pooled"][1][0]
    if found != wanted:
        raise InputError(
            f"the model makes images of {list(shape)}, of {found} features by {judges.network.name}"
            f"; the reference {judges.reference.name} has {wanted}: give another one (to sample "
            "without scores: --config.data= --config.baseline=)"
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
    if reference.features is not None and min(len(pooled), len(reference.features)) > (
        judges.neighbours
    ):
        near = precision_recall(reference.features, np.asarray(pooled), judges.neighbours)
        scores |= {"precision": float(near.precision), "recall": float(near.recall)}
    if "label_right" in found:
        scores["label_accuracy"] = float(np.mean(found["label_right"]))
    return scores


def _distance(a: Statistics, b: Statistics) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def judge(made: np.ndarray, labels: np.ndarray, judges: Judges) -> dict[str, np.ndarray]:
    """The rows that `score` wants of a batch of images.

    Args:
      made: `[B, H, W, C]` uint8.
      labels: `[B]` int, what was asked for.
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
    if reference.features is not None:
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
