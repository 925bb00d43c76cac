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
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import evaluation
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.sample_config import SampleConfig
from flowturbo_jax.schedule import Schedule

COLUMNS = 8


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
    pipe = ClassToImage.load(config.model_dir, config.dtype)
    reference = evaluation.digits_reference() if config.data else None
    labels = _labels(pipe, config)
    settings = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "guidance": config.guidance or None,
        "guidance_scale": config.guidance_scale,
    }
    rows, panels = [], []
    with tqdm(total=len(labels) * len(config.schedules), unit="image") as bar:
        for text in config.schedules:
            schedule = Schedule.parse(text)
            bar.set_description(f"compiling {schedule}")
            made = evaluation.generate(
                pipe,
                labels,
                schedule,
                **settings,
                on_batch=lambda count, name=str(schedule): _advance(bar, name, count),
            )
            results = {"ms_per_image": made.ms_per_image, "compile_seconds": made.compile_seconds}
            if reference is not None:
                results |= evaluation.score(made, reference)
            card = evaluation.protocol_card(
                pipe, schedule, samples=len(labels), reference=reference, **settings
            )
            if config.label is not None:
                card["label_sampling"] = f"label {config.label}"
            rows.append({"card": card, "results": results})
            panels.append((_title(schedule, made.ms_per_image), made.images[: config.shown]))
    return _write(config, rows, panels)


def _advance(bar: Any, name: str, count: int) -> None:
    bar.set_description(f"sampling {name}")
    bar.update(count)


def _labels(pipe: ClassToImage, config: SampleConfig) -> np.ndarray:
    if config.label is None:
        classes = pipe.model.description.predictor.num_classes
        return evaluation.balanced_labels(config.samples, classes)
    return np.full(config.samples, config.label, np.int32)


def _title(schedule: Schedule, ms_per_image: float) -> list[str]:
    methods = {frozenset("H"): "Heun", frozenset("E"): "Euler", frozenset("EH"): "Euler, Heun"}
    method = methods.get(schedule.blocks, "FlowTurbo")
    refiner = f" + {schedule.refiner_evaluations} refiner" if schedule.needs_refiner else ""
    return [
        f"{method} {schedule}",
        f"{schedule.predictor_evaluations} evaluations{refiner}, {ms_per_image:.2f} ms/image",
    ]


def _write(config: SampleConfig, rows: list[Any], panels: list[Any]) -> dict[str, Any]:
    """Writes the picture, then the numbers, each whole or not at all."""
    out = Path(config.out)
    picture = out / f"{config.name}.png"
    zoom = max(1, 48 // panels[0][1].shape[1])
    cards = json.dumps([row["card"] for row in rows])
    try:
        drawn = images.side_by_side(panels, columns=COLUMNS, zoom=zoom)
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
    head = ["schedule", "evaluations", "refiner", "ms/image", "Fréchet", "label accuracy"]
    lines = [head]
    for row in report["schedules"]:
        card, results = row["card"], row["results"]
        line = [
            card["schedule"],
            str(card["predictor_evaluations"]),
            str(card["refiner_evaluations"]),
            f"{results['ms_per_image']:.2f}",
        ]
        if "frechet_distance" in results:
            accuracy = f"{100 * results['label_accuracy']:.1f} %"
            line += [f"{results['frechet_distance']:.3f}", accuracy]
        lines.append(line)
    widths = [max(len(line[i]) for line in [*lines[1:], head]) for i in range(len(lines[1]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=False))
        for line in lines
    )
