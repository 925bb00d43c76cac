"""Edits one image with two schedules and the same noise: pictures, numbers, and a card."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flowturbo_jax import images, masks, pictures
from flowturbo_jax.commands import output_file, result_files, wanted
from flowturbo_jax.commands.sample import title
from flowturbo_jax.commands.wanted import Wanted
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import evaluation, memory
from flowturbo_jax.pipelines.editing import backwards, default_margin
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.timing import timed
from flowturbo_jax.sample_config import MASKED, OF_CLASSES, OF_TEXT, SampleConfig
from flowturbo_jax.schedule import Schedule

HIDDEN = 128  # grey of what a mask hides
# What the result of each task depends on, beside the image and how it is sampled.
SETTINGS = {
    "edit": ("strength", "source_label", "source_prompt"),
    "inpaint": ("mask", "tries", "soften"),
    "remove": ("mask", "tries", "soften", "margin"),
    "invert": (),
}


class Subject(NamedTuple):
    """What is worked on.

    Attributes:
      images: `[B, H, W, C]` uint8, the image once per result.
      mask: `[H, W]` bool, true = repaint; None where the task has none.
      rows: `[B]` labels or `[B, 2, L]` tokens, one per result; None to remove without any.
      source: rows of the same of what the image shows, where it is inverted to be edited.
      seeds: of the noise, one for all results or `[B]`.
    """

    images: np.ndarray
    mask: np.ndarray | None
    rows: np.ndarray | None
    source: np.ndarray | None
    seeds: Any = 0


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
    pipe = wanted.load(config)
    asked = wanted.read(pipe, config)
    subject = _subject(pipe, config, asked)
    texts = wanted.schedules(pipe, config, ())
    plans = [_plan(pipe, config, text, subject) for text in texts]
    wanted.refuse_idle_negative(config, plans)
    batch_size = min(config.batch_size, len(subject.images))
    with memory.one_line(batch_size, "--config.batch_size"):
        rows, panels, noise = _made(pipe, config, asked, subject, plans)
    return _write(config, asked, rows, [_given(config, subject), *panels], noise)


def _made(
    pipe: Generation, config: SampleConfig, asked: Wanted, subject: Subject, plans: list[Plan]
) -> tuple[list[dict[str, Any]], list[Any], Any]:
    """Card and results of each schedule, their panels, and of "invert" the noise."""
    noise = None
    if config.task == "invert":
        one = (subject.images[:1], subject.rows[:1])
        noise = pipe.invert(*one, schedule=config.inversion, **_guidance(plans[-1]))
    panels, rows = [], []
    for plan in plans:
        once = partial(_do, pipe, config, subject, plan, noise)
        once()  # compiles
        made, seconds = timed(once)
        results = {"ms_per_image": 1e3 * seconds / len(made), "change": _change(made, subject)}
        card = _card(pipe, config, plan, asked, len(made))
        rows.append({"card": card, "results": results})
        panels.append((title(card, results["ms_per_image"]), made))
    return rows, panels, noise


def _subject(pipe: Generation, config: SampleConfig, asked: Wanted) -> Subject:
    shape = pipe.model.description.image_shape
    picture = pictures.open_picture(config.image, shape)
    mask = pictures.open_mask(config.mask, picture.size, shape) if config.task in MASKED else None
    given = np.repeat(picture.pixels[None], asked.count, axis=0)
    source = None if asked.source is None else np.repeat(asked.source, asked.count, axis=0)
    return Subject(given, mask, asked.rows, source, asked.seeds)


def _plan(pipe: Generation, config: SampleConfig, text: str, subject: Subject) -> Plan:
    """How one of the schedules samples; refuses what does not work before anything is computed."""
    guided = (config.guidance_scale, config.guidance or None, config.guidance_interval or None)
    if config.task == "invert" or subject.source is not None:
        backwards(config.inversion)
    if subject.rows is not None:
        pipe.check(subject.rows, text, *guided)
    elif guided[0] not in (None, 1) or guided[1] not in (None, "none") or guided[2]:
        missing = "prompt" if pipe.takes_text else "labels"
        what = "a prompt" if pipe.takes_text else "labels"
        raise InputError(f"without {what} nothing can be guided; set config.{missing}")
    if subject.rows is None or (config.task == "invert" and guided == (None, None, None)):
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
    pipe: Generation, config: SampleConfig, subject: Subject, plan: Plan, noise: Any
) -> jax.Array:
    """The results of a schedule, `[B, H, W, C]` uint8."""
    how = {"schedule": plan.schedule, **_guidance(plan)}
    if config.task == "invert":
        return pipe.decode(pipe.sample_latents(noise, subject.rows, **how))
    how |= {"seeds": subject.seeds, "batch_size": min(config.batch_size, len(subject.images))}
    if config.task == "edit":
        how |= {"strength": config.strength, "source_labels": subject.source}
        how["inversion"] = None if subject.source is None else config.inversion
        return pipe.edit(subject.images, subject.rows, **how)
    how |= {"tries": config.tries, "soften": config.soften}
    if config.task == "inpaint":
        return pipe.inpaint(subject.images, subject.mask, subject.rows, **how)
    if subject.rows is None:
        how = {key: value for key, value in how.items() if not key.startswith("guidance")}
    return pipe.remove(subject.images, subject.mask, subject.rows, margin=config.margin, **how)


def _change(made: np.ndarray, subject: Subject) -> float:
    """Root mean square of the difference from the image, 1 being from black to white."""
    difference = made.astype(np.float64) - subject.images
    return float(np.sqrt(np.mean(difference**2)) / 255)


def _card(
    pipe: Generation, config: SampleConfig, plan: Plan, asked: Wanted, count: int
) -> dict[str, Any]:
    """Everything the results depend on, and what they took."""
    counts = {"samples": count, "batch_size": min(config.batch_size, count)}
    card = evaluation.protocol_card(
        pipe, plan, seed=config.seed, judges=None, label_sampling=asked.sampling, **counts
    )
    card |= {**asked.card, "task": config.task, "image_sha256": _digest(config.image)}
    unsaid = OF_CLASSES if pipe.takes_text else OF_TEXT
    card |= {key: getattr(config, key) for key in SETTINGS[config.task] if key not in unsaid}
    if config.task == "remove" and config.margin is None:
        card["margin"] = default_margin(pipe.model.description.image_shape)
    if config.mask and not config.mask.startswith(pictures.DRAWN):
        card["mask_sha256"] = _digest(config.mask)
    for kind in ("predictor_evaluations", "refiner_evaluations"):
        card[kind] *= config.tries
    if asked.source is not None or config.task == "invert":
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
    config: SampleConfig,
    asked: Wanted,
    rows: list[Any],
    panels: list[Any],
    noise: jax.Array | None,
) -> dict[str, Any]:
    """Writes the pictures, then the numbers."""
    card, made = rows[-1]["card"], panels[-1][1]
    cards = [card | asked.of_image(i) if asked.prompts else card for i in range(len(made))]
    return result_files.write(
        Path(config.out).expanduser(),
        f"{config.name}_{config.task}",
        {**({"prompts": list(asked.prompts)} if asked.prompts else {}), "schedules": rows},
        panels,
        columns=config.columns,
        least=96,
        alone=list(zip(made, cards, strict=True)),
        noise=None if noise is None else np.asarray(noise),
    )


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
