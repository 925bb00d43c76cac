"""Where refining is safe, by a rule over the errors that `stability` measured."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

Range = tuple[float, float]


class Verdict(NamedTuple):
    """Where refining, or without a refiner keeping, serves.

    Attributes:
      better: the range of t up to the last one measured in which the refiner's mean error is below
        that of keeping; None where there is none, or no refiner.
      safe: the part of it, up to the last t, in which it is also below the threshold.
      sentence: what to tell the user.
    """

    better: Range | None
    safe: Range | None
    sentence: str


def judge(
    t: Sequence[float],
    keep: Sequence[float],
    refine: Sequence[float] | None,
    safe_below: float,
) -> Verdict:
    """The rule: refining is safe where it errs less than keeping and less than a threshold.

    A range has to reach the last t, since schedules end in their R steps (PAPER section 2).

    Args:
      t: flow times, rising.
      keep: mean error of the velocity kept for a step, at each.
      refine: mean error of the velocity refined, at each; None without a refiner.
      safe_below: the threshold, a fraction of |v|.
    """
    limit = f"{100 * safe_below:g} % of |v|"
    if refine is None:
        where = _listed(_ranges(t, np.asarray(keep) < safe_below)) or "at no t"
        sentence = (
            "This model has no refiner to measure; keeping the velocity for a step errs less than "
            f"{limit} {where}."
        )
        return Verdict(None, None, sentence)
    less = np.asarray(refine) < np.asarray(keep)
    both = less & (np.asarray(refine) < safe_below)
    better, safe = _last(t, less), _last(t, both)
    at_end = (
        f"at t = {t[-1]:.3g} it errs {100 * refine[-1]:.1f} %, where keeping the velocity errs "
        f"{100 * keep[-1]:.1f} %"
    )
    if safe is not None:
        wider = f" (less than keeping from t = {better[0]:.3g} on)" if better != safe else ""
        sentence = (
            f"Refining is safe from t = {safe[0]:.3g} on: it errs less than keeping the velocity "
            f"and less than {limit}{wider}; {at_end}."
        )
    elif better is not None:
        earlier = f" (only {found})" if (found := _listed(_ranges(t, both))) else ""
        sentence = (
            f"Refining errs less than keeping the velocity from t = {better[0]:.3g} on, but in no "
            f"range up to t = 1 also less than {limit}{earlier}: {at_end}."
        )
    else:
        sentence = f"Refining errs no less than keeping in any range up to t = 1: {at_end}."
    return Verdict(better, safe, sentence)


def _ranges(t: Sequence[float], inside: np.ndarray) -> list[Range]:
    """First and last time of every run of times that are inside."""
    runs = [list(group) for _, group in groupby(range(len(t)), key=lambda i: bool(inside[i]))]
    return [(t[run[0]], t[run[-1]]) for run in runs if inside[run[0]]]


def _last(t: Sequence[float], inside: np.ndarray) -> Range | None:
    """The range that reaches the last time, if any does."""
    return _ranges(t, inside)[-1] if inside[-1] else None


def _listed(ranges: Sequence[Range]) -> str:
    return " and ".join(
        f"at t = {a:.3g}" if a == b else f"from t = {a:.3g} to {b:.3g}" for a, b in ranges
    )
