"""Samples the same noise with two schedules: a picture of both, their scores, and a card."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from flowturbo_jax import images
from flowturbo_jax.class_names import label_of
from flowturbo_jax.commands import output_file
from flowturbo_jax.commands.progress import say
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import evaluation, judging
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.sample_config import SampleConfig
from flowturbo_jax.schedule import Schedule

SCORES = ("frechet_distance", "label_accuracy")


def sample(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Samples by a recipe and writes `OUT/NAME.png` and `OUT/NAME.json`.

    Args:
      config: a mapping with the keys of `SampleConfig`.

    Returns:
      What the JSON holds: `{"picture": path, "schedules": [{"card": ..., "results": ...}]}`.

    Raises:
      InputError: the recipe or the model directory is wrong.
    """
    config = SampleConfig.create(config)
    output_file.check_folder(config.out)
    pipe = ClassToImage.load(config.model_dir, config.dtype, config.quantization or None, say)
    judges = judging.digits_judges() if config.data else None
    if judges is not None:
        hint = " (to sample without scores: --config.data= --config.baseline=)"
        judging.check_fits(pipe.model.description.image_shape, judges, hint)
    labels = _labels(pipe, config)
    asked = (config.guidance_scale, config.guidance or None, config.guidance_interval or None)
    for text in config.schedules:  # before the bar, so that a refusal stands alone
        pipe.check(labels, text, *asked)
    settings = {"seed": config.seed, "batch_size": config.batch_size}
    sampling = "balanced" if not config.labels else f"in turn: {config.labels}"
    rows, panels = [], []
    with tqdm(total=len(labels) * len(config.schedules), unit="image") as bar:
        for text in config.schedules:
            plan = pipe.plan(text, *asked)
            name = str(plan.schedule)
            bar.set_description(f"compiling {name}")
            made = evaluation.generate(
                pipe,
                labels,
                plan,
                **settings,
                on_batch=lambda count, name=name: _advance(bar, name, count),
            )
            results = {"ms_per_image": made.ms_per_image, "compile_seconds": made.compile_seconds}
            if judges is not None:
                found = judging.judge(made.images, made.labels, judges)
                scores = judging.score(found, judges)
                if config.labels:
                    del scores["frechet_distance"]  # of some classes, to all: it would say nothing
                results |= {name: scores[name] for name in SCORES if name in scores}
            card = evaluation.protocol_card(
                pipe,
                plan,
                samples=len(labels),
                judges=judges,
                label_sampling=sampling,
                **settings,
            )
            rows.append({"card": card, "results": results})
            panels.append((title(card, made.ms_per_image), made.images[: config.shown]))
    return _write(config, rows, panels)


def _advance(bar: Any, name: str, count: int) -> None:
    bar.set_description(f"sampling {name}")
    bar.update(count)


def _labels(pipe: ClassToImage, config: SampleConfig) -> np.ndarray:
    description = pipe.model.description
    if not config.labels:
        return evaluation.labels_of(config.samples, description.predictor.num_classes)
    wanted = [label_of(text.strip(), description.class_names) for text in config.labels.split(",")]
    return np.resize(np.array(wanted), config.samples)


def title(card: Mapping[str, Any], ms_per_image: float) -> list[str]:
    """The lines over the images of a schedule: what it is, and what it costs.

    Args:
      card: of `evaluation.protocol_card`.
      ms_per_image: what sampling takes.
    """
    schedule = Schedule.parse(card["schedule"])
    methods = {
        frozenset("H"): "Heun",
        frozenset("E"): "Euler",
        frozenset("EH"): "Euler, Heun",
        frozenset("P"): "Pseudo corrector",
    }
    method = methods.get(schedule.blocks, "FlowTurbo")
    refiner = f" + {card['refiner_evaluations']} refiner" if schedule.needs_refiner else ""
    return [
        f"{method} {schedule}",
        f"{card['predictor_evaluations']} evaluations{refiner}, {ms_per_image:.2f} ms/image",
    ]


def _write(config: SampleConfig, rows: list[Any], panels: list[Any]) -> dict[str, Any]:
    """Writes the picture, then the numbers, each whole or not at all."""
    out = Path(config.out).expanduser()
    picture = out / f"{config.name}.png"
    zoom = max(1, 48 // panels[0][1].shape[1])
    cards = json.dumps([row["card"] for row in rows])
    try:
        drawn = images.side_by_side(panels, columns=config.columns, zoom=zoom)
        images.save_png(picture, drawn, {"protocol_cards": cards})
        report = {"picture": str(picture), "schedules": rows}
        draft = out / f".{config.name}.json"
        draft.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(draft, out / f"{config.name}.json")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error}; change config.out") from error
    return report


def table(report: dict[str, Any]) -> str:
    """The rows of a report as text, one line per schedule."""
    columns = {
        "schedule": lambda card, results: card["schedule"],
        "evaluations": lambda card, results: str(card["predictor_evaluations"]),
        "refiner": lambda card, results: str(card["refiner_evaluations"]),
        "ms/image": lambda card, results: f"{results['ms_per_image']:.2f}",
    }
    rows = report["schedules"]
    if "frechet_distance" in rows[0]["results"]:
        columns["Fréchet"] = lambda card, results: f"{results['frechet_distance']:.3f}"
    if "label_accuracy" in rows[0]["results"]:
        columns["label accuracy"] = lambda card, results: f"{100 * results['label_accuracy']:.1f} %"
    lines = [list(columns)]
    lines += [[cell(row["card"], row["results"]) for cell in columns.values()] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    if "Fréchet" in columns and rows[0]["card"]["samples"] < 1000:
        text += "\n(few samples raise the Fréchet distance: compare it at equal samples only)"
    return text
