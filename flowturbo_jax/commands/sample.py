"""Samples the same noise with several schedules: a picture, their scores, and cards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from flowturbo_jax.commands import output_file, result_files, wanted
from flowturbo_jax.commands.wanted import Wanted
from flowturbo_jax.pipelines import evaluation, judging, memory
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.judging import Judges
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.sample_config import SampleConfig
from flowturbo_jax.schedule import Schedule

SCORES = ("frechet_distance", "label_accuracy")


def sample(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Samples by a recipe and writes `OUT/NAME.png` and `OUT/NAME.json`.

    Of texts also `OUT/NAME_0.png`, ...: the images of the last schedule by themselves.

    Args:
      config: a mapping with the keys of `SampleConfig`.

    Returns:
      What the JSON holds: `{"picture": path, "schedules": [{"card": ..., "results": ...}]}`; of
      texts also "results", the names of the images, and "prompts", their texts.

    Raises:
      InputError: the recipe or the model directory is wrong.
    """
    config = SampleConfig.create(config)
    output_file.check_folder(config.out)
    pipe = wanted.load(config)
    judges = judging.digits_judges() if config.data else None
    if judges is not None:
        hint = " (to sample without scores: --config.data= --config.baseline=)"
        judging.check_fits(pipe.model.description.image_shape, judges, hint)
    asked = wanted.read(pipe, config)
    guided = (config.guidance_scale, config.guidance or None, config.guidance_interval or None)
    texts = wanted.schedules(pipe, config, guided)
    for text in texts:  # before the bar, so that a refusal stands alone
        pipe.check(asked.rows, text, *guided)
    plans = [pipe.plan(text, *guided) for text in texts]
    wanted.refuse_idle_negative(config, plans)
    rows, panels, made = [], [], None
    with tqdm(total=asked.count * len(plans), unit="image") as bar:
        for plan in plans:
            bar.set_description(f"compiling {plan.schedule}")
            with memory.one_line(min(config.batch_size, asked.count), "--config.batch_size"):
                row, made = _sampled(pipe, plan, asked, judges, config, bar)
            rows.append(row)
            heading = title(row["card"], row["results"]["ms_per_image"])
            panels.append((heading, made[: config.shown]))
    report: dict[str, Any] = {"schedules": rows}
    how: dict[str, Any] = {"columns": config.columns, "least": 48}
    if pipe.takes_text:
        report = {"prompts": list(asked.prompts), **report}
        cards = [rows[-1]["card"] | asked.of_image(i) for i in range(asked.count)]
        how["alone"] = list(zip(made, cards, strict=True))
    return result_files.write(Path(config.out).expanduser(), config.name, report, panels, **how)


def _sampled(
    pipe: Generation,
    plan: Plan,
    asked: Wanted,
    judges: Judges | None,
    config: SampleConfig,
    bar: tqdm,
) -> tuple[dict[str, Any], np.ndarray]:
    """Card and results of a schedule, and its images."""
    name = str(plan.schedule)
    made = evaluation.generate(
        pipe,
        asked.rows,
        plan,
        seed=asked.seeds,
        batch_size=config.batch_size,
        on_batch=lambda count: _advance(bar, name, count),
    )
    results = {"ms_per_image": made.ms_per_image, "compile_seconds": made.compile_seconds}
    if judges is not None:
        scores = judging.score(judging.judge(made.images, asked.rows, judges), judges)
        if config.labels:
            del scores["frechet_distance"]  # of some classes, to all: it would say nothing
        results |= {name: scores[name] for name in SCORES if name in scores}
    card = evaluation.protocol_card(
        pipe,
        plan,
        seed=config.seed,
        samples=asked.count,
        batch_size=config.batch_size,
        judges=judges,
        label_sampling=asked.sampling,
    )
    return {"card": card | asked.card, "results": results}, made.images


def _advance(bar: Any, name: str, count: int) -> None:
    bar.set_description(f"sampling {name}")
    bar.update(count)


def title(card: Mapping[str, Any], ms_per_image: float) -> list[str]:
    """The lines over the images of a schedule: what it is, and what it costs.

    Args:
      card: of `evaluation.protocol_card`.
      ms_per_image: what sampling takes.
    """
    schedule = Schedule.parse(card["schedule"])
    refiner = f" + {card['refiner_evaluations']} refiner" if schedule.needs_refiner else ""
    return [
        f"{schedule.method} {schedule}",
        f"{card['predictor_evaluations']} evaluations{refiner}, {ms_per_image:.2f} ms/image",
    ]


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
