"""How good and how fast a schedule is: many samples, their scores, and what exactly was done."""

import importlib.metadata
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from flowturbo_jax import data, images
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics import (
    PIXELS,
    DigitsClassifier,
    FeatureNetwork,
    Statistics,
    frechet_distance,
    statistics,
)
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.schedule import Schedule

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "scikit-learn")


class Generated(NamedTuple):
    """Samples of one schedule.

    Attributes:
      images: `[N, H, W, C]` uint8.
      labels: `[N]` int32.
      ms_per_image: median over batches of wall time per image, in ms, compilation left out; of a
        single batch, with what a first call costs besides.
      compile_seconds: wall time of tracing and compiling, in s.
    """

    images: np.ndarray
    labels: np.ndarray
    ms_per_image: float
    compile_seconds: float


class Reference(NamedTuple):
    """Real data to compare samples with.

    Attributes:
      source: name and sha256 of the data.
      features: the feature network.
      statistics: of the real data's features.
      classifier: judge of labels, fitted on the real data.
    """

    source: tuple[str, str]
    features: FeatureNetwork
    statistics: Statistics
    classifier: DigitsClassifier


def balanced_labels(count: int, classes: int) -> np.ndarray:
    """Labels 0, 1, ..., classes - 1, 0, ... `[count]` int32."""
    return (np.arange(count) % max(classes, 1)).astype(np.int32)


def generate(
    pipe: ClassToImage,
    labels: np.ndarray,
    schedule: Schedule | str,
    *,
    seed: int = 0,
    batch_size: int = 250,
    guidance: str | None = None,
    guidance_scale: float | None = None,
    on_batch: Callable[[int], Any] = lambda done: None,
) -> Generated:
    """Samples one image per label, in batches of one shape.

    Args:
      pipe: the model.
      labels: `[N]` int.
      schedule: which block makes each step.
      seed: image i is image i of this seed, whatever the batch size.
      batch_size: images per call; the last batch is filled up and cut.
      guidance: "paired", "official" or "none"; the model's default if None.
      guidance_scale: the model's default if None.
      on_batch: called with the number of images a batch added, for a progress bar.

    Raises:
      InputError: as `ClassToImage.__call__`, or there are no labels, or batch_size is below 1.
    """
    if len(labels) < 1 or batch_size < 1:
        raise InputError(
            f"{len(labels)} samples in batches of {batch_size}: both must be 1 or more"
        )
    batch_size = min(batch_size, len(labels))
    settings = {
        "schedule": schedule,
        "guidance": guidance,
        "guidance_scale": guidance_scale,
    }
    begin = time.perf_counter()
    pipe.compile(batch_size, **settings)
    compile_seconds = time.perf_counter() - begin
    parts, times = [], []
    for first in range(0, len(labels), batch_size):
        wanted = labels[first : first + batch_size]
        begin = time.perf_counter()
        made = pipe(wanted, seeds=seed, first_index=first, batch_size=batch_size, **settings)
        parts.append(np.asarray(made))
        times.append((time.perf_counter() - begin) / batch_size)
        on_batch(len(wanted))
    return Generated(
        np.concatenate(parts),
        np.asarray(labels),
        float(np.median(times)) * 1e3,
        compile_seconds,
    )


def digits_reference() -> Reference:
    """All real digits, compared by pixels, and a classifier fitted on three quarters of them."""
    source = data.open_source("digits")
    pixels, _ = data.arrays(source)
    real = np.asarray(images.to_uint8(pixels))  # through 8 bits, as the samples
    return Reference(
        (source.name, source.fingerprint),
        PIXELS,
        statistics(PIXELS.extract(real).pooled),
        DigitsClassifier(),
    )


def check_fits(pipe: ClassToImage, reference: Reference) -> None:
    """Refuses a model whose images cannot be compared with the reference, before any is made.

    Raises:
      InputError: the images are of another size.
    """
    shape, features = pipe.model.description.image_shape, len(reference.statistics.mean)
    if reference.features is PIXELS and math.prod(shape) != features:
        raise InputError(
            f"the model makes images of {list(shape)}, which cannot be compared with the "
            f"{reference.source[0]}; sample without scores: --config.data= --config.baseline="
        )


def score(generated: Generated, reference: Reference) -> dict[str, float]:
    """Fréchet distance to the reference, and how often the classifier sees the label asked for.

    Raises:
      InputError: the images are of another shape than the reference's.
    """
    features = reference.features.extract(generated.images).pooled
    if features.shape[1] != len(reference.statistics.mean):
        raise InputError(
            f"images of {generated.images.shape[1:]} have {features.shape[1]} features, the "
            f"reference {reference.source[0]} has {len(reference.statistics.mean)}"
        )
    found = statistics(features)
    real = reference.statistics
    return {
        "frechet_distance": frechet_distance(
            found.mean, found.covariance, real.mean, real.covariance
        ),
        "label_accuracy": reference.classifier.accuracy(
            images.from_uint8(generated.images), generated.labels
        ),
    }


def protocol_card(
    pipe: ClassToImage,
    schedule: Schedule | str,
    *,
    seed: int,
    samples: int,
    batch_size: int,
    guidance: str | None,
    guidance_scale: float | None,
    reference: Reference | None,
    label_sampling: str = "balanced",
) -> dict[str, Any]:
    """Everything a reader must know to repeat a measurement, and nothing measured.

    Args:
      pipe: the model.
      schedule: which block makes each step.
      seed: of the noise.
      samples: number of images.
      batch_size: images per call.
      guidance: None for the model's default, which is then named.
      guidance_scale: likewise.
      reference: what the samples are compared with, if anything.
      label_sampling: how the labels were chosen.
    """
    description = pipe.model.description
    schedule, mode, scale, _ = pipe.plan(schedule, guidance_scale, guidance)
    card = {
        "schedule": str(schedule),
        "steps": schedule.steps,
        "predictor_evaluations": schedule.predictor_evaluations,
        "refiner_evaluations": schedule.refiner_evaluations,
        "guidance": mode,
        "guidance_scale": float(scale),
        "guided_channels": description.guided_channels if mode == "official" else None,
        "dtype": np.dtype(pipe.model.predictor.dtype).name,
        "seed": seed,
        "samples": samples,
        "batch_size": batch_size,
        "label_sampling": label_sampling,
        "predictor_sha256": pipe.model.fingerprints["predictor"],
        "refiner_sha256": pipe.model.fingerprints["refiner"],
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    if description.vae is not None:
        card["vae_sha256"] = pipe.model.fingerprints["vae"]
    if reference is not None:
        card |= {
            "feature_network": reference.features.name,
            "feature_network_sha256": reference.features.fingerprint,
            "reference": reference.source[0],
            "reference_sha256": reference.source[1],
            "label_classifier_sha256": reference.classifier.fingerprint,
            "label_classifier_held_out_accuracy": reference.classifier.held_out_accuracy,
        }
    return card
