"""Edits one image with two schedules and the same noise: pictures, numbers, and a card."""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flowturbo_jax import images, masks, pictures
from flowturbo_jax.class_names import label_of
from flowturbo_jax.commands import output_file
from flowturbo_jax.commands.progress import say
from flowturbo_jax.commands.sample import title
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import evaluation
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.editing import backwards, default_margin
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.timing import timed
from flowturbo_jax.sample_config import MASKED, SampleConfig
from flowturbo_jax.schedule import Schedule

HIDDEN = 128  # grey of what a mask hides
# What the result of each task depends on, beside the image and how it is sampled.
SETTINGS = {
    "edit": ("strength", "source_label"),
    "inpaint": ("mask", "tries", "soften"),
    "remove": ("mask", "tries", "soften", "margin"),
    "invert": (),
}


class Subject(NamedTuple):
    """What is worked on.

    Attributes:
      images: `[B, H, W, C]` uint8, the image once per result.
      mask: `[H, W]` bool, true = repaint; None where the task has none.
      labels: `[B]`, one per result; None to remove without any.
      source: the label of the image, where it is inverted to be edited.
    """

    images: np.ndarray
    mask: np.ndarray | None
    labels: np.ndarray | None
    source: int | None


def edit(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Does a task of an image and writes its pictures and numbers to config.out.

    `NAME_TASK.png` shows the image beside the results of each schedule; `NAME_TASK_0.png`, ... are
    those of the last schedule alone, `NAME_TASK.json` holds the numbers, `NAME_TASK.npz` the noise
    of "invert".

    Args:
      config: a mapping with the keys of `SampleConfig`.

    Returns:
      What the JSON holds: `{"picture": path, "results": paths, "schedules": [{"card": ...,
      "results": ...}]}`.

    Raises:
      InputError: the recipe, the model directory, the image or the mask is wrong.
    """
    config = SampleConfig.create(config)
    output_file.check_folder(config.out)
    pipe = ClassToImage.load(config.model_dir, config.dtype, config.quantization or None, say)
    subject = _subject(pipe, config)
    plans = [_plan(pipe, config, text, subject) for text in config.schedules]
    noise = None
    if config.task == "invert":
        one = (subject.images[:1], subject.labels[:1])
        noise = pipe.invert(*one, schedule=config.inversion, **_guidance(plans[-1]))
    panels, rows, made = [_given(config, subject)], [], None
    for plan in plans:
        once = partial(_do, pipe, config, subject, plan, noise)
        once()  # compiles
        made, seconds = timed(once)
        results = {"ms_per_image": 1e3 * seconds / len(made), "change": _change(made, subject)}
        card = _card(pipe, config, plan, len(made))
        rows.append({"card": card, "results": results})
        panels.append((title(card, results["ms_per_image"]), made))
    return _write(config, rows, panels, noise)


def _subject(pipe: ClassToImage, config: SampleConfig) -> Subject:
    description = pipe.model.description
    shape, names = description.image_shape, description.class_names
    wanted = [label_of(text.strip(), names) for text in config.labels.split(",") if text.strip()]
    if not wanted and not description.predictor.num_classes:
        wanted = [0]
    if not wanted and config.task != "remove":
        what = "image" if config.task == "invert" else "result"
        raise InputError(f"to {config.task}, say what the {what} shows: --config.labels=CLASS")
    if config.task == "invert" and len(wanted) > 1:
        raise InputError("an image is inverted under one label, of what it shows; give only that")
    if config.source_label and config.results > len(wanted):
        raise InputError(
            f"{config.results} results of {len(wanted)} label(s) would repeat themselves: an "
            "inverted image is edited without noise; leave out config.results"
        )
    picture = pictures.open_picture(config.image, shape)
    mask = pictures.open_mask(config.mask, picture.size, shape) if config.task in MASKED else None
    source = label_of(config.source_label.strip(), names) if config.source_label else None
    count = config.results or max(len(wanted), 1)
    labels = np.resize(np.array(wanted), count) if wanted else None
    return Subject(np.repeat(picture.pixels[None], count, axis=0), mask, labels, source)


def _plan(pipe: ClassToImage, config: SampleConfig, text: str, subject: Subject) -> Plan:
    """How one of the schedules samples; refuses what does not work before anything is computed."""
    guided = (config.guidance_scale, config.guidance or None, config.guidance_interval or None)
    if config.task == "invert" or subject.source is not None:
        backwards(config.inversion)
    if subject.labels is not None:
        pipe.check(subject.labels, text, *guided)
    elif guided[0] not in (None, 1) or guided[1] not in (None, "none") or guided[2]:
        raise InputError("without labels nothing can be guided; set config.labels")
    if subject.labels is None or (config.task == "invert" and guided == (None, None, None)):
        return pipe.plan(text, guidance="none")
    return pipe.plan(text, *guided)


def _guidance(plan: Plan) -> dict[str, Any]:
    scale = None if plan.guidance == "none" else plan.scale
    return {
        "guidance": plan.guidance,
        "guidance_scale": scale,
        "guidance_interval": plan.interval,
    }


def _do(
    pipe: ClassToImage, config: SampleConfig, subject: Subject, plan: Plan, noise: Any
) -> jax.Array:
    """The results of a schedule, `[B, H, W, C]` uint8."""
    how = {"schedule": plan.schedule, **_guidance(plan)}
    if config.task == "invert":
        return pipe.decode(pipe.sample_latents(noise, subject.labels, **how))
    how |= {"seeds": config.seed, "batch_size": min(config.batch_size, len(subject.images))}
    if config.task == "edit":
        sources = None if subject.source is None else [subject.source] * len(subject.images)
        how |= {"strength": config.strength, "source_labels": sources}
        how["inversion"] = None if sources is None else config.inversion
        return pipe.edit(subject.images, subject.labels, **how)
    how |= {"tries": config.tries, "soften": config.soften}
    if config.task == "inpaint":
        return pipe.inpaint(subject.images, subject.mask, subject.labels, **how)
    if subject.labels is None:
        how = {key: value for key, value in how.items() if not key.startswith("guidance")}
    return pipe.remove(subject.images, subject.mask, subject.labels, margin=config.margin, **how)


def _change(made: np.ndarray, subject: Subject) -> float:
    """Root mean square of the difference from the image, 1 being from black to white."""
    difference = made.astype(np.float64) - subject.images
    return float(np.sqrt(np.mean(difference**2)) / 255)


def _card(pipe: ClassToImage, config: SampleConfig, plan: Plan, count: int) -> dict[str, Any]:
    """Everything the results depend on, and what they took."""
    sampling = f"in turn: {config.labels}" if config.labels else "none"
    counts = {"samples": count, "batch_size": min(config.batch_size, count)}
    card = evaluation.protocol_card(
        pipe, plan, seed=config.seed, judges=None, label_sampling=sampling, **counts
    )
    card |= {"task": config.task, "image_sha256": _digest(config.image)}
    card |= {key: getattr(config, key) for key in SETTINGS[config.task]}
    if config.task == "remove" and config.margin is None:
        card["margin"] = default_margin(pipe.model.description.image_shape)
    if config.mask and not config.mask.startswith(pictures.DRAWN):
        card["mask_sha256"] = _digest(config.mask)
    for kind in ("predictor_evaluations", "refiner_evaluations"):
        card[kind] *= config.tries
    if config.source_label or config.task == "invert":
        card["inversion"] = config.inversion
        there = Schedule.parse(config.inversion)
        card["inversion_evaluations"] = there.predictor_evaluations
    return card


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()


def _given(config: SampleConfig, subject: Subject) -> tuple[list[str], np.ndarray]:
    """The image, and where it is repainted: by the mask, by its margin, and by its soft edge."""
    image = subject.images[:1]
    if subject.mask is None:
        return ["given"], image
    margin = 0.0
    if config.task == "remove":
        margin = default_margin(image.shape[1:]) if config.margin is None else config.margin
    parts = masks.weights(subject.mask[None], margin, config.soften)[..., None]
    covered = np.full_like(image, HIDDEN)
    hidden = images.composite(*(jnp.asarray(array) for array in (image, covered, parts)))
    return ["given", "and what is repainted"], np.concatenate([image, np.asarray(hidden)])


def _write(
    config: SampleConfig, rows: list[Any], panels: list[Any], noise: jax.Array | None
) -> dict[str, Any]:
    """Writes the pictures, then the numbers, each whole or not at all."""
    out, name = Path(config.out).expanduser(), f"{config.name}_{config.task}"
    picture, made = out / f"{name}.png", panels[-1][1]
    zoom = max(1, 96 // made.shape[1])
    cards = json.dumps([row["card"] for row in rows])
    files = [out / f"{name}_{i}.png" for i in range(len(made))]
    report = {"picture": str(picture), "results": [*map(str, files)], "schedules": rows}
    draft = out / f".{name}.json"
    try:
        drawn = images.side_by_side(panels, columns=config.columns, zoom=zoom)
        images.save_png(picture, drawn, {"protocol_cards": cards})
        for file, image in zip(files, made, strict=True):
            colour = np.broadcast_to(image, (*image.shape[:2], 3))
            images.save_png(file, colour, {"protocol_card": json.dumps(rows[-1]["card"])})
        if noise is not None:
            report["noise"] = str(out / f"{name}.npz")
            images.save_npz(report["noise"], np.asarray(noise))
        draft.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(draft, out / f"{name}.json")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error}; change config.out") from error
    return report


def table(report: dict[str, Any]) -> str:
    """The rows of a report as text, one line per schedule."""
    lines = [("schedule", "evaluations", "refiner", "ms/image", "change")]
    for row in report["schedules"]:
        card, results = row["card"], row["results"]
        counts = (card["predictor_evaluations"], card["refiner_evaluations"])
        change = f"{100 * results['change']:.2f} %"
        lines.append(
            (card["schedule"], *map(str, counts), f"{results['ms_per_image']:.2f}", change)
        )
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return (
        "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )
        + "\n(change: root mean square of the difference from the image; black to white is 100 %)"
    )
