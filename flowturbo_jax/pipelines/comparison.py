"""Results side by side, only if they were measured alike."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo_jax import markdown
from flowturbo_jax.interfaces import InputError

# What two measurements may differ in and still say the same: what is compared, and what the
# numbers do not depend on. Whatever else a card says must be equal, or be named as allowed.
FREE = frozenset(
    {
        "schedule",
        "steps",
        "predictor_evaluations",
        "refiner_evaluations",
        "seed",
        "batch_size",
        "device",
        "devices",
        "versions",
        "warnings",
    }
)
# Of a card: what every table shows, and what none does, since it follows or says nothing.
SHOWN = frozenset(
    {
        "schedule",
        "guidance",
        "guidance_scale",
        "predictor_evaluations",
        "refiner_evaluations",
    }
)
UNSEEN = frozenset({"steps", "seed", "warnings", "guidance_interval", "guided_channels"})
HEADINGS = {
    "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "spatial",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "label_accuracy": "label accuracy",
    "ms_per_image": "ms/image",
}
DECIMALS = {"label_accuracy": 4, "frechet_distance": 4, "spatial_frechet_distance": 4}


def read_rows(path: str | Path, own: bool = False) -> list[dict[str, Any]]:
    """The measurements in a file of `evaluate` or of sample.py, `{"card", "results"}` each.

    Args:
      path: the file.
      own: only one that `evaluate` wrote, and may write again; it can be without measurements.

    Raises:
      InputError: the file holds something else, or nothing.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text())
        if isinstance(rows, dict) and not own:
            rows = rows["schedules"]
        if not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise ValueError("no rows")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; check the name") from error
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path} holds no results of evaluate; choose another file") from error
    if not rows and not own:
        raise InputError(f"{path} holds no results yet")
    return rows


def _is_row(row: Any) -> bool:
    """Whether a row has what `table` needs."""
    if not isinstance(row, dict) or not {"card", "results"} <= row.keys():
        return False
    card, results = row["card"], row["results"]
    if not isinstance(card, dict) or not isinstance(results, dict) or not card.keys() >= SHOWN:
        return False
    if not isinstance(card["schedule"], str) or not isinstance(card["guidance"], str):
        return False
    interval = card.get("guidance_interval") or []
    if not isinstance(interval, list) or len(interval) not in (0, 2):
        return False
    shown = [number for key, number in results.items() if key in HEADINGS]
    numbers = [*shown, card["guidance_scale"], *interval]
    return all(type(number) in (int, float) for number in numbers)


def refuse_unlike(
    named: Mapping[str, Sequence[Mapping[str, Any]]], allowed: frozenset[str]
) -> None:
    """Refuses measurements that were not made by one protocol.

    Args:
      named: rows of each file, by its name.
      allowed: keys of cards that may differ, because they are what is compared.

    Raises:
      InputError: they differ in something else; the message says in what, and where; or an allowed
        key is in no card.
    """
    rows = [(name, row["card"]) for name, group in named.items() for row in group]
    known = {key for _, card in rows for key in card}
    if unknown := sorted(allowed - known):
        raise InputError(f"--allow names {unknown[0]!r}, which no card has; known: {sorted(known)}")
    found = []
    (first_name, first), *others = rows
    for key in sorted(known - FREE - allowed):
        for name, card in others:
            if card.get(key) != first.get(key):
                found.append(
                    f"{key} is {_shown(first.get(key))} in {first_name} and "
                    f"{_shown(card.get(key))} in {name}"
                )
                break
    if found:
        raise InputError(
            f"these were not measured alike: {'; '.join(found)}; measure them anew, or name with "
            "--allow what you mean to compare"
        )


def _shown(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> str:
    """Mean and standard deviation over seeds of equal measurements, as a Markdown table.

    Whatever else differs between the cards has a column of its own.

    Args:
      rows: `{"card", "results"}` each, one at least.
      names: a name for each row, shown in a first column; None leaves it out.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        card = {key: value for key, value in row["card"].items() if key != "seed"}
        name = "" if names is None else names[index]
        groups.setdefault(json.dumps([name, card], sort_keys=True), []).append(index)
    metrics = [key for key in HEADINGS if any(key in row["results"] for row in rows)]
    differing = _differing([rows[indices[0]]["card"] for indices in groups.values()])
    heading = [*([] if names is None else ["file"]), "schedule", "guidance"]
    heading += ["evaluations", "+ refiner", *differing, *(HEADINGS[key] for key in metrics)]
    lines = []
    for indices in groups.values():
        card = rows[indices[0]]["card"]
        cells = [] if names is None else [names[indices[0]]]
        cells += [card["schedule"], _guidance(card)]
        cells += [str(card["predictor_evaluations"]), str(card["refiner_evaluations"])]
        cells += [_shown(card.get(key)) for key in differing]
        results = [rows[index]["results"] for index in indices]
        cells += [_cell(key, [found[key] for found in results if key in found]) for key in metrics]
        lines.append([" ".join(cell.split()).replace("|", "\\|") for cell in cells])
    return markdown.table(heading, lines)


def _differing(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells cards apart beside the columns that every table has."""
    keys = sorted({key for card in cards for key in card} - SHOWN - UNSEEN)
    return [key for key in keys if any(card.get(key) != cards[0].get(key) for card in cards)]


def _guidance(card: Mapping[str, Any]) -> str:
    if card["guidance"] == "none":
        return "none"
    text = f"{card['guidance']} {card['guidance_scale']:g}"
    if card.get("guidance_interval"):
        low, high = card["guidance_interval"]
        text += f" in {low:g}:{high:g}"
    return text


def _cell(key: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    decimals = DECIMALS.get(key, 3)
    if key == "ms_per_image":
        return f"{np.median(values):.2f}"
    spread = f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{decimals}f}{spread}"
