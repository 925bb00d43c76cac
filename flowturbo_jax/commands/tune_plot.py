"""The picture of a search: error and metric of schedules over their time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowturbo_jax import plots
from flowturbo_jax.pipelines.fronts import Finalist, Screened


def draw(
    stem: Path,
    screened: Sequence[Screened],
    measured: Sequence[Finalist],
    recommended: dict[str, Finalist],
    metric: str | None,
    lower_is_better: bool,
) -> None:
    """Draws error (and metric) over time, as STEM.png and STEM.svg.

    Args:
      stem: path of the pictures without their suffix.
      screened: everything that was tried.
      measured: what was compiled and measured at last.
      recommended: which of it is recommended, by name.
      metric: key of the scores to draw in a second panel; None for none.
      lower_is_better: of the metric.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    with plots.style():
        figure, axes = plots.panels(2 if metric else 1)
        values = [("distance from the fine solution", lambda found: found.error)]
        if metric:
            values.append((metric.replace("_", " "), lambda found: found.scores[metric]))
        chosen = {found.plan for found in recommended.values()}
        for panel, (label, value) in zip(axes, values, strict=True):
            falls = label == values[0][0] or lower_is_better  # then it falls over decades
            if label == values[0][0]:
                ms = [1e3 * one.cost for one in screened]
                errors = [one.error for one in screened]
                panel.plot(
                    ms,
                    errors,
                    ".",
                    color=plots.QUIET_INK,
                    alpha=0.35,
                    label="tried (sum of its blocks)",
                )
            front = sorted(measured, key=lambda found: found.ms_per_image)
            front = [f for i, f in enumerate(front) if value(f) <= min(map(value, front[: i + 1]))]
            if falls:
                panel.plot(
                    [found.ms_per_image for found in front],
                    [value(found) for found in front],
                    color=plots.BLUE,
                    alpha=0.5,
                    linewidth=1.0,
                )
            for group, colour, mark, name in (
                ([f for f in measured if f.plan not in chosen], plots.BLUE, "o", "measured"),
                (list(recommended.values()), plots.VERMILION, "D", "recommended"),
            ):
                panel.plot(
                    [found.ms_per_image for found in group],
                    [value(found) for found in group],
                    mark,
                    color=colour,
                    label=name,
                )
            named: dict[Any, list[str]] = {}
            for name, found in recommended.items():
                named.setdefault(found.plan, []).append(name)
            for found in measured:
                names = named.get(found.plan)
                text = str(found.plan.schedule)
                panel.annotate(
                    f"{', '.join(names)}: {text}" if names else text,
                    (found.ms_per_image, value(found)),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=6.5,
                    color=plots.INK,
                )
            for axis, scale in ((panel.xaxis, "x"), (panel.yaxis, "y"))[: 2 if falls else 1]:
                panel.set(**{f"{scale}scale": "log"})
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
            panel.set_xlabel("ms per image, compiled")
            panel.set_ylabel(label)
        axes[0].legend()
        plots.save(figure, stem)
