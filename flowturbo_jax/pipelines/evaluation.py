"""How good and how fast a schedule is: many samples, their scores, and what exactly was done."""

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flowturbo_jax import parallel, stopping
from flowturbo_jax.growing_arrays import GrowingArrays
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import judging
from flowturbo_jax.pipelines.captions import Captions
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.image_files import ImageFiles
from flowturbo_jax.pipelines.judging import Judges
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.quantization import QuantizedModel

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "scikit-learn")
LABEL_SAMPLINGS = ("balanced", "random")
FEW_CLASSES = (
    "{:,} balanced samples show only the classes 0 to {:,} of {:,}: take more, or random labels"
)
RANDOM_LABELS = 0x6C61  # keeps the stream of labels apart from others of the same seed


class Generated(NamedTuple):
    """Samples of one schedule.

    Attributes:
      images: `[N, H, W, C]` uint8.
      labels: what they were made of, `[N]` int32, or `[N, 2, L]` token ids.
      ms_per_image: median over batches of wall time per image, in ms, compilation left out; of a
        single batch, with what a first call costs besides.
      compile_seconds: wall time of tracing and compiling, in s.
    """

    images: np.ndarray
    labels: np.ndarray
    ms_per_image: float
    compile_seconds: float


def labels_of(count: int, classes: int, sampling: str = "balanced", seed: int = 0) -> np.ndarray:
    """The labels of a run's images, `[count]` int32; label i depends on i and the seed alone.

    Args:
      count: how many.
      classes: of the model, or the number of captions; without any, all labels are 0.
      sampling: "balanced" for 0, 1, ..., classes - 1, 0, ... or "random" for uniform draws.
      seed: of the draws.

    Raises:
      InputError: another sampling.
    """
    if sampling not in LABEL_SAMPLINGS:
        known = " or ".join(LABEL_SAMPLINGS)
        raise InputError(f"labels are to be {sampling!r}; they can be {known}")
    if sampling == "balanced":
        return (np.arange(count) % max(classes, 1)).astype(np.int32)
    draws = np.random.Generator(np.random.Philox(key=[seed, RANDOM_LABELS]))
    return (draws.random(count) * max(classes, 1)).astype(np.int32)


class _Asked(NamedTuple):
    """What the images of a measurement are made of.

    Attributes:
      indices: which class or caption each has, `[N]` int32.
      rows: what programs get of it, `[N]` int32 or `[N, 2, L]` token ids.
      labels: what a classifier should see, `[N]` int32; None where it is not known.
    """

    indices: np.ndarray
    rows: np.ndarray
    labels: np.ndarray | None


def _asked(pipe: Generation, card: Mapping[str, Any], captions: Captions | None) -> _Asked:
    classes = pipe.model.description.predictor.num_classes
    choices = classes if captions is None else len(captions.texts)
    indices = labels_of(card["samples"], choices, card["label_sampling"], card["seed"])
    if captions is None:
        return _Asked(indices, indices, indices)
    labels = None if captions.digits is None else captions.digits[indices]
    return _Asked(indices, captions.rows(pipe, indices), labels)


def generate(
    pipe: Generation,
    labels: np.ndarray,
    plan: Plan,
    *,
    seed: int | np.ndarray = 0,
    batch_size: int = 250,
    on_batch: Callable[[int], Any] = lambda done: None,
) -> Generated:
    """Samples one image per label or text, in batches of one shape, on one device.

    Args:
      pipe: the model.
      labels: `[N]` int, or what `TextToImage.tokens` made of texts.
      plan: how to sample, from `Pipeline.plan`.
      seed: image i is image i of this seed, whatever the batch size; or `[N]` seeds, of each of
        which it is the first.
      batch_size: images per call; the last batch is filled up and cut.
      on_batch: called with the number of images a batch added, for a progress bar.

    Raises:
      InputError: as `ClassToImage.__call__`, or there are no labels, or batch_size is below 1.
    """
    if len(labels) < 1 or batch_size < 1:
        raise InputError(
            f"{len(labels)} samples in batches of {batch_size}: both must be 1 or more"
        )
    batch_size = min(batch_size, len(labels))
    settings = plan.settings
    begin = time.perf_counter()
    pipe.compile(batch_size, **settings)
    compile_seconds = time.perf_counter() - begin
    parts, times = [], []
    for first in range(0, len(labels), batch_size):
        wanted = labels[first : first + batch_size]
        seeds = seed[first : first + batch_size] if np.ndim(seed) else seed
        begin = time.perf_counter()
        made = pipe(wanted, seeds=seeds, first_index=first, batch_size=batch_size, **settings)
        parts.append(np.asarray(made))
        times.append((time.perf_counter() - begin) / batch_size)
        on_batch(len(wanted))
    return Generated(
        np.concatenate(parts),
        np.asarray(labels),
        float(np.median(times)) * 1e3,
        compile_seconds,
    )


def measure(
    pipe: Generation,
    plan: Plan,
    judges: Judges,
    card: Mapping[str, Any],
    work: Path,
    *,
    captions: Captions | None = None,
    files: ImageFiles | None = None,
    on_images: Callable[[int, int], Any] = max,
) -> dict[str, Any]:
    """Samples on all devices of this process and scores; goes on where it was interrupted.

    Features, not images, are kept, in files that grow batch by batch. Scores do not depend on
    interruptions; on the batch size and the number of devices only as rounding does.

    Args:
      pipe: the model.
      plan: how to sample.
      judges: what to judge the samples by.
      card: of `protocol_card`: samples, seed, labels and batch size are read from it.
      work: folder for what must outlive an interruption. It stays: remove it once the scores are
        stored.
      captions: what images are made of by a model of texts; None for one of classes.
      files: where the images go; None for nowhere.
      on_images: told how many images are done, and of how many, first of those done before.

    Returns:
      `judging.score`, and `ms_per_image`: median over batches of the sampler's wall time per image,
      in ms, without the first batch since the start, which compiles; left out where there is no
      other. Of captions whose digit a classifier looks for `label_accuracy_by_phrasing`, too.

    Raises:
      InputError: an image is not finite, or something cannot be written; what was made is kept.
      KeyboardInterrupt: SIGINT or SIGTERM asked to stop; what was made is kept.
    """
    shape, count, seed = pipe.model.description.image_shape, card["samples"], card["seed"]
    files = files or ImageFiles(card)
    written = files.begin()
    columns = judging.row_columns(judges, shape)
    if files.npz is not None:
        columns["images"] = (np.uint8, shape)
    rows = GrowingArrays(work, dict(card), columns)
    asked = _asked(pipe, card, captions)
    devices = parallel.local_devices()
    size = -(-min(card["batch_size"], count) // devices) * devices
    done = min(rows.rows, written)
    rows.keep(done if done == count else done // size * size)  # or other batches would round anew
    sample, seeds, times = pipe.on_all_devices(plan), np.full(size, seed, np.uint32), []
    on_images(rows.rows, count)
    with stopping.requests() as stop:
        while rows.rows < count and not stop.is_set():
            first = rows.rows
            indices = np.minimum(np.arange(first, first + size), count - 1)
            new = min(size, count - first)
            begin = time.perf_counter()
            given = (seeds, indices.astype(np.uint32), asked.rows[indices])
            made, finite = jax.device_get(sample(*given))
            times.append((time.perf_counter() - begin) / size)
            _refuse_not_finite(finite[:new], first, seed)
            made = made[:new]
            files.add(first, made)
            labels = None if asked.labels is None else asked.labels[first : first + new]
            found = judging.judge(made, labels, judges)
            rows.append(**found, **({} if files.npz is None else {"images": made}))
            on_images(rows.rows, count)
        if stop.is_set():
            raise KeyboardInterrupt
    scores: dict[str, Any] = judging.score({name: rows.read(name) for name in columns}, judges)
    if captions is not None and "label_right" in columns:
        right = np.asarray(rows.read("label_right"))
        scores["label_accuracy_by_phrasing"] = captions.by_phrasing(asked.indices, right)
    if files.npz is not None:
        files.finish(rows.read("images"))
    return scores | ({"ms_per_image": float(np.median(times[1:])) * 1e3} if times[1:] else {})


def _refuse_not_finite(finite: np.ndarray, first: int, seed: int) -> None:
    if not finite.all():
        index = first + int(np.flatnonzero(~finite)[0])
        raise InputError(
            f"image {index} of seed {seed} is not finite: the sampler diverged; look at "
            "the weights, the guidance scale and the dtype"
        )


def protocol_card(
    pipe: Generation,
    plan: Plan,
    *,
    seed: int,
    samples: int,
    batch_size: int,
    judges: Judges | None,
    label_sampling: str = "balanced",
) -> dict[str, Any]:
    """Everything a reader must know to repeat a measurement, and nothing measured.

    Args:
      pipe: the model.
      plan: how it is sampled.
      seed: of the noise.
      samples: number of images.
      batch_size: images per call.
      judges: what the samples are judged by; without any, the card says what images depend on.
      label_sampling: how the labels were chosen.
    """
    description = pipe.model.description
    schedule, mode, scale, interval, solver = plan
    card = {
        "schedule": str(schedule),
        "steps": schedule.steps,
        "predictor_evaluations": schedule.predictor_evaluations,
        "refiner_evaluations": schedule.refiner_evaluations,
        "guidance": mode,
        "guidance_scale": float(scale),
        "guidance_interval": None if interval is None else [float(end) for end in interval],
        "guided_channels": description.guided_channels if mode == "official" else None,
        "dtype": np.dtype(pipe.model.predictor.dtype).name,
        "seed": seed,
        "samples": samples,
        "batch_size": batch_size,
        "label_sampling": label_sampling,
        "predictor_sha256": pipe.model.fingerprints["predictor"],
        "refiner_sha256": pipe.model.fingerprints["refiner"],
        "device": jax.devices()[0].device_kind,
        "devices": parallel.total_devices(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    if solver is not None:
        card["solver_sha256"] = solver.sha256
    if isinstance(pipe.model, QuantizedModel):  # else unsaid: cards of before stay as they are
        card["quantization"] = pipe.model.quantization
        card["versions"]["qwix"] = importlib.metadata.version("qwix")
    if description.vae is not None:
        card["vae_sha256"] = pipe.model.fingerprints["vae"]
    if description.takes_text:
        card["text_encoder_sha256"] = pipe.model.fingerprints["text_encoder"]
        card["tokenizer_sha256"] = pipe.model.tokenizer.fingerprint
        card["image_size"] = list(description.image_shape[:2])
    if judges is not None:
        card |= judging.judges_card(judges, samples)
        classes = description.predictor.num_classes
        if label_sampling == "balanced" and samples < classes:
            card["warnings"].append(FEW_CLASSES.format(samples, samples - 1, classes))
    return card
