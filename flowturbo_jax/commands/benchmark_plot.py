"""The picture of a benchmark: where the time of each schedule goes, one bar per row."""

from collections.abc import Mapping
from typing import Any

from flowturbo_jax import plots
from flowturbo_jax.commands.benchmark_tables import dtype, guidance, short, title
from flowturbo_jax.commands.entry import one_line
from flowturbo_jax.pipelines.time_split import PARTS

# Source: Okabe and Ito 2008, "Color Universal Design", as plots has it.
ORANGE, SKY = "#e69f00", "#56b4e9"
COLOURS = {
    "predictor": plots.BLUE,
    "refiner": plots.VERMILION,
    "conditioning": ORANGE,
    "guidance_and_steps": plots.PURPLE,
    "decode": plots.GREEN,
    "host": SKY,
    "rest": "#c3c9d0",
}
WIDTH, ROW, FRAME = 7.6, 0.36, 1.7  # of the picture, of a bar, of what is around them: inches
LONGEST = 64  # letters of a title
MEASURED = "measured"


def draw(report: Mapping[str, Any]) -> Any:
    """A figure of stacked bars, in ms per image.

    The line across a bar is the measured time. Where the parts take longer apart than together,
    they reach beyond it.

    Args:
      report: of the command, as its JSON file holds it.
    """
    rows = report["rows"]
    with plots.style():
        figure, (axes,) = plots.panels(1)
        figure.set_size_inches(WIDTH, FRAME + ROW * len(rows))
        totals = [row["ms_per_image"] for row in rows]
        shares = [_parts(row) for row in rows]
        ends = [
            max(sum(share.values()), total) for share, total in zip(shares, totals, strict=True)
        ]
        for part in PARTS:
            starts = [_before(share, part) for share in shares]
            widths = [share[part] for share in shares]
            if any(widths):
                axes.barh(
                    range(len(rows)), widths, 0.66, starts, color=COLOURS[part], label=title(part)
                )
        line = {"color": plots.INK, "linewidth": 1.6}
        axes.vlines(totals, *_around(len(rows)), label=MEASURED, **line)
        for i, (total, end) in enumerate(zip(totals, ends, strict=True)):
            axes.annotate(short(total), (end, i), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [_label(row, report) for row in rows], color=plots.INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        axes.set_xlim(0, 1.1 * max(ends))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("ms per image")
        figure.suptitle(_title(report), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _parts(row: Mapping[str, Any]) -> dict[str, float]:
    """ms per image of each part; a negative rest is nothing to draw."""
    split = row["split_ms_per_batch"]
    return {part: max(split[part], 0.0) / row["batch_size"] for part in PARTS}


def _before(share: Mapping[str, float], part: str) -> float:
    return sum(share[other] for other in PARTS[: PARTS.index(part)])


def _around(count: int) -> tuple[list[float], list[float]]:
    """From where to where a line crosses each of so many bars."""
    return [i - 0.42 for i in range(count)], [i + 0.42 for i in range(count)]


def _label(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    text = f"{row['schedule']}, batch {row['batch_size']}"
    alike = len({guidance(other) for other in report["rows"]}) == 1
    return text if alike else f"{text}\n{guidance(row)}"


def _title(report: Mapping[str, Any]) -> str:
    card, rows, model = report["card"], report["rows"], one_line(report["model"])
    if len(model) > LONGEST:  # the end of a path says more than its beginning
        model = f"...{model[3 - LONGEST :]}"
    guided = {guidance(row) for row in rows} if rows[0]["guidance"] != "none" else ()
    how = f", {guidance(rows[0])} guidance" if len(guided) == 1 else ""
    return f"{model}\n{dtype(card)}{how}, {card['device']}"
