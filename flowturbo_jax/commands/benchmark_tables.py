"""What a benchmark found, as tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowturbo_jax import markdown
from flowturbo_jax.commands.entry import one_line
from flowturbo_jax.pipelines.ablation import WAYS
from flowturbo_jax.pipelines.cold_start import STAGES
from flowturbo_jax.pipelines.time_split import PARTS


def tables(report: Mapping[str, Any]) -> list[str]:
    """Speed, time split, and where they were measured the ablation and the cold start.

    Args:
      report: of the command, as its JSON file holds it.
    """
    found = [_speed(report), _split(report)]
    if report["ablation"]:
        found.append(_ablation(report["ablation"]))
    if report["cold_start"] is not None:
        found.append(_cold_start(report["cold_start"]))
    return found


def guidance(row: Mapping[str, Any]) -> str:
    """How a row is guided, in a few words, such as "paired 1.5 in 0.1:0.8"."""
    text = row["guidance"]
    if text != "none":
        text += f" {row['guidance_scale']:g}"
    if row["guidance_interval"] is not None:
        low, high = row["guidance_interval"]
        text += f" in {low:g}:{high:g}"
    return text


def dtype(card: Mapping[str, Any]) -> str:
    """The dtype of the products, with their quantization if there is one."""
    return " ".join(filter(None, [card["dtype"], card.get("quantization")]))


def title(part: str) -> str:
    """A part of the time as it is shown."""
    return part.replace("_", " ")


def short(number: float) -> str:
    """Three digits that count, never in powers of ten."""
    if number == 0:
        return "0"
    digits = 2
    while digits > 0 and abs(number) >= 10 ** (3 - digits):
        digits -= 1
    while abs(number) < 0.995 * 10 ** (2 - digits) and digits < 4:
        digits += 1
    return f"{number:,.{digits}f}"


def _speed(report: Mapping[str, Any]) -> str:
    heading = ["schedule", "guidance", "batch", "evaluations", "+ refiner", "GMAC", "ms/image"]
    heading += ["images/s", "speed-up", "utilisation", "of networks", "of decode", "memory", "by"]
    lines = []
    for row in report["rows"]:
        used = row["utilisation"]
        cells = [row["schedule"], guidance(row), str(row["batch_size"])]
        cells += [str(row["predictor_evaluations"]), str(row["refiner_evaluations"])]
        cells += [short(row["gmac"]), short(row["ms_per_image"]), short(row["images_per_second"])]
        cells.append(f"{row['speed_up']:.2f}")
        shares = [used["whole"], used["networks"], used["decode"]]
        cells += ["" if share is None else f"{100 * share:.0f} %" for share in shares]
        memory = row["memory_bytes"]
        cells += ["" if memory is None else f"{memory / 1e6:,.0f} MB", row["memory_source"]]
        cells.append(f"{row['trace_seconds'] + row['compile_seconds']:.1f}")
        lines.append(cells)
    card, rate = report["card"], report["ceiling"]["flop_per_second"]
    note = (
        f"{one_line(report['model'])}, {dtype(card)}, on {card['device']}; matrix products alone "
        f"reach {short(rate / 1e9)} GFLOP/s, which is 100 % utilisation."
    )
    return f"{markdown.table([*heading, 'compile s'], lines)}\n\n{note}"


def _split(report: Mapping[str, Any]) -> str:
    lines = []
    for row in report["rows"]:
        size, split = row["batch_size"], row["split_ms_per_batch"]
        cells = [row["schedule"], str(size), *(short(split[part] / size) for part in PARTS)]
        lines.append([*cells, short(row["ms_per_image"])])
    return markdown.table(["schedule", "batch", *map(title, PARTS), "all, ms/image"], lines)


def _ablation(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [row["schedule"], str(row["batch_size"]), *(short(row["ms_per_image"][w]) for w in WAYS)]
        for row in rows
    ]
    return markdown.table(["latents, ms/image, compiled:", "batch", *WAYS], lines)


def _cold_start(found: Mapping[str, Any]) -> str:
    lines = []
    for name in ("cold", "warm"):
        start = found[name]
        cells = [name, *(f"{start['seconds'][stage]:.2f}" for stage in STAGES)]
        cells += [f"{start['call_seconds']:.2f}", str(start["compiled"]), str(start["loaded"])]
        lines.append(cells)
    heading = ["fresh process", *STAGES, "call to images, s", "compiled", "loaded"]
    note = (
        f"{found['schedule']}, batch {found['batch_size']}: with what the first process kept, the "
        f"second has its images after {100 * found['warm_over_cold']:.0f} % of the time."
    )
    return f"{markdown.table(heading, lines)}\n\n{note}"
