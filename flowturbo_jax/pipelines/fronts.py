"""Plans by cost and error: which are worth a closer look, and which to recommend."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowturbo_jax.model_description import Preset
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.schedule import Schedule


class Screened(NamedTuple):
    """A plan with what a screen found.

    Attributes:
      plan: how to sample.
      cost: seconds of a batch, from its blocks' times.
      error: relative distance from the fine solution.
      noises: how many the error was measured on.
    """

    plan: Plan
    cost: float
    error: float
    noises: int


class Finalist(NamedTuple):
    """A plan as it was measured at last.

    Attributes:
      plan: how to sample.
      ms_per_image: median wall time of the compiled sampler, per image, in ms.
      error: relative distance from the fine solution.
      scores: of `judging.score`, where samples were judged.
      badness: what finalists are ranked by, positive, lower is better: the error, or of a score
        itself or its inverse.
    """

    plan: Plan
    ms_per_image: float
    error: float
    scores: dict[str, float]
    badness: float


def described(plan: Plan) -> str:
    """A plan in a few words, such as "H1P3R2@0.5 paired 1.5 in 0:0.8"."""
    text = f"{plan.schedule} {plan.guidance}"
    if plan.guidance != "none":
        text += f" {float(plan.scale):g}"
    if plan.interval is not None:
        low, high = plan.interval
        text += f" in {low:g}:{high:g}"
    return text


def near_front(screened: Sequence[Screened], margin: float) -> list[Screened]:
    """What no cheaper one beats by more than a factor in error, cheapest first.

    Args:
      screened: what was measured.
      margin: 1 keeps the front itself, in which errors fall as costs rise.
    """
    best, kept = float("inf"), []
    for one in sorted(screened, key=lambda one: (one.cost, one.error)):
        if one.error < best * margin and np.isfinite(one.error):
            kept.append(one)
        best = min(best, one.error)
    return kept


def thinned(front: Sequence[Screened], count: int) -> list[Screened]:
    """At most `count` of a front, its ends and others spread evenly over the logarithm of cost."""
    if len(front) <= count:
        return list(front)
    costs = np.log([max(one.cost, 1e-12) for one in front])
    wanted = np.linspace(costs[0], costs[-1], count)
    chosen = {0, len(front) - 1, *(int(np.abs(costs - level).argmin()) for level in wanted)}
    return [front[index] for index in sorted(chosen)]


def recommend(finalists: Sequence[Finalist], baseline: Finalist) -> dict[str, Finalist]:
    """The finalists to call "fast", "balanced" and "best".

    best has the least badness; fast is the cheapest that is at least as good as the
    baseline, or the cheapest of all if none is; balanced is, from fast to best, the one with the
    lowest product of time and badness.

    Args:
      finalists: what was measured, at least one.
      baseline: what a user would take without a search, such as H8.
    """
    best = min(finalists, key=lambda one: (one.badness, one.ms_per_image))
    good = [one for one in finalists if one.badness <= baseline.badness] or list(finalists)
    fast = min(good, key=lambda one: (one.ms_per_image, one.badness))
    between = [
        one for one in good if fast.ms_per_image <= one.ms_per_image <= best.ms_per_image
    ] or [fast]
    balanced = min(between, key=lambda one: one.ms_per_image * one.badness)
    return {"fast": fast, "balanced": balanced, "best": best}


def rank_correlation(finalists: Sequence[Finalist]) -> float:
    """Spearman's rank correlation of error and badness, 1 where both rank alike; NaN if all tie."""
    from scipy.stats import spearmanr

    columns = [[one.error for one in finalists], [one.badness for one in finalists]]
    if any(len(set(column)) == 1 for column in columns):
        return float("nan")  # nothing is ranked
    return float(spearmanr(*columns).statistic)


def preset(plan: Plan) -> Preset:
    """A plan as model.json stores it, without the scale, which is the caller's."""
    return Preset(str(Schedule.parse(plan.schedule)), plan.guidance, plan.interval)
