"""Schedules: which block makes each step, as text and as validated data.

"H1P5R3" is one Heun step, five pseudo corrector steps, three refiner steps, in that order;
"H1P5R3@0.5" are the same on a time grid that is finer near the data. Source: PAPER section 2.
"""

import dataclasses
import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax.interfaces import InputError

# letter: (predictor evaluations, refiner evaluations, needs a remembered velocity)
EVALUATIONS = {"E": (1, 0), "H": (2, 0), "P": (1, 0), "R": (0, 2), "Rc": (0, 2)}
NAMES = {
    "E": "Euler",
    "H": "Heun",
    "P": "pseudo corrector",
    "R": "refiner",
    "Rc": "refiner, chained rule",
}
GRAMMAR = (
    "a schedule is runs such as H1P5R3: a letter "
    "(" + ", ".join(f"{letter} {name}" for letter, name in NAMES.items()) + ") and a number of "
    "steps each; (H1P1R1)x2 repeats, and @0.5 at the end shifts the time grid"
)
_TOKEN = re.compile(
    r"\s*(?:(?P<run>[A-Za-z]+)(?P<steps>[0-9]{1,9})|(?P<open>\()|\)x(?P<times>[0-9]{1,9}))\s*"
)
_SHIFT = re.compile(r"[0-9]{1,4}(\.[0-9]{1,9})?")
MAX_STEPS = 10_000  # a typing error, not a schedule
SHIFT_DIGITS = 6  # as many are kept, so that the text says all of it
MAX_SHIFT = 100.0  # likewise; Stable Diffusion 3 uses 3 at 1024²


@dataclasses.dataclass(frozen=True)
class Run:
    """A number of equal blocks in a row.

    Attributes:
      block: "E", "H", "P", "R" (the official sampler's rule) or "Rc" (the chained rule).
      steps: how many, at least 1.
    """

    block: str
    steps: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An immutable, hashable step sequence; equal schedules compare equal however written.

    Attributes:
      runs: the runs in order, neighbouring runs of one block merged.
      shift: of the time grid; 1 is uniform, above 1 steps are finer near the noise, below 1 near
        the data; see `time_grid`.
    """

    runs: tuple[Run, ...]
    shift: float = 1.0

    def __post_init__(self):
        shift = self.shift
        if isinstance(shift, bool) or not isinstance(shift, int | float):
            raise InputError(f"the shift of a schedule is {shift!r}; it must be a number")
        if not 1 / MAX_SHIFT <= shift <= MAX_SHIFT:
            raise InputError(
                f"the shift of a schedule is {shift:g}; it must lie in "
                f"[{1 / MAX_SHIFT:g}, {MAX_SHIFT:g}], 1 being the uniform grid"
            )
        object.__setattr__(self, "shift", round(float(shift), SHIFT_DIGITS))
        runs = []
        for block, group in groupby(self.runs, key=lambda run: run.block):
            if block not in EVALUATIONS:
                raise InputError(f"unknown block {block!r} in schedule; {GRAMMAR}")
            steps = [run.steps for run in group]
            if any(not isinstance(n, int) or n < 1 for n in steps):
                raise InputError(f"block {block} has {steps} steps in schedule; 1 or more wanted")
            runs.append(Run(block, sum(steps)))
        object.__setattr__(self, "runs", tuple(runs))
        if not runs:
            raise InputError(f"the schedule is empty; {GRAMMAR}")
        if self.steps > MAX_STEPS:
            raise InputError(f"the schedule has {self.steps} steps; at most {MAX_STEPS} are taken")
        if runs[0].block in ("R", "Rc"):
            raise InputError(
                f"schedule {self} starts with {runs[0].block}, but there is no velocity to refine "
                "yet; begin with H, P or E"
            )

    @classmethod
    def parse(cls, text: "str | Schedule") -> "Schedule":
        """Reads a schedule; a Schedule is returned as it is. Runs of 0 steps are left out.

        Args:
          text: such as "H1P5R3", "P5H7R3", "(H1P1R1)x2", "E10", "H1P5Rc3" or "H1P5R3@0.5".

        Raises:
          InputError: it is empty, has no steps, an unknown letter, starts with R or cannot be read.
        """
        if isinstance(text, Schedule):
            return text
        if not isinstance(text, str):
            raise InputError(f"schedule is {text!r}, not text; {GRAMMAR}")
        shown = _shorten(text.strip())
        text, at, shift = text.strip().partition("@")
        if at and not _SHIFT.fullmatch(shift.strip()):
            raise InputError(
                f"schedule {shown!r} has the shift {_shorten(shift)!r}; write a number such as @0.5"
            )
        stack: list[list[Run]] = [[]]
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None or (token["times"] and len(stack) == 1):
                raise InputError(
                    f"schedule {shown!r} cannot be read at {_shorten(text[position:])!r}; {GRAMMAR}"
                )
            position = token.end()
            if token["run"]:
                if token["run"] not in EVALUATIONS:
                    raise InputError(
                        f"unknown block {_shorten(token['run'])!r} in schedule {shown!r}; {GRAMMAR}"
                    )
                if int(token["steps"]):
                    stack[-1].append(Run(token["run"], int(token["steps"])))
            elif token["open"]:
                stack.append([])
            else:
                group = stack.pop()
                times = int(token["times"])
                if times * len(group) > MAX_STEPS:
                    raise InputError(
                        f"schedule {shown!r} has more than {MAX_STEPS} runs; that many are taken"
                    )
                stack[-1] += group * times
        if len(stack) > 1:
            raise InputError(f"schedule {shown!r} has an open bracket; close it, as in (H1P1R1)x2")
        if not stack[0]:
            raise InputError(f"schedule {shown!r} has no steps; {GRAMMAR}")
        return cls(tuple(stack[0]), float(shift) if at else 1.0)

    def __str__(self) -> str:
        """Text that parses back to this schedule; a whole repetition is written as one."""
        # Fixed-point, which parses back, and without the zeros that say nothing.
        shift = "" if self.shift == 1 else f"@{self.shift:.{SHIFT_DIGITS}f}".rstrip("0").rstrip(".")
        runs = [f"{run.block}{run.steps}" for run in self.runs]
        for period in range(2, len(runs) // 2 + 1):
            times, rest = divmod(len(runs), period)
            if not rest and runs == runs[:period] * times:
                return f"({''.join(runs[:period])})x{times}{shift}"
        return "".join(runs) + shift

    @property
    def steps(self) -> int:
        """Number of steps, hence of intervals of the time grid."""
        return sum(run.steps for run in self.runs)

    @property
    def predictor_evaluations(self) -> int:
        """Predictor evaluations per sample (nfe); a guided evaluation counts once.

        A P with no block before it evaluates its own start, one evaluation more.
        """
        first = 1 if self.runs[0].block == "P" else 0
        return first + sum(EVALUATIONS[run.block][0] * run.steps for run in self.runs)

    @property
    def refiner_evaluations(self) -> int:
        """Refiner evaluations per sample; a guided evaluation counts once."""
        return sum(EVALUATIONS[run.block][1] * run.steps for run in self.runs)

    @property
    def blocks(self) -> frozenset[str]:
        """The letters of the blocks that occur."""
        return frozenset(run.block for run in self.runs)

    @property
    def needs_refiner(self) -> bool:
        """Whether any step is made by the refiner."""
        return self.refiner_evaluations > 0

    def time_grid(self, t_start: float | jax.Array = 0.0, dtype: Any = jnp.float32) -> jax.Array:
        """Flow times of all steps, `[steps + 1]`, from t_start to exactly 1.

        With u = 1 - i / N the share of the way that is left, and s the shift,
        t_i = 1 - (1 - t_start) s u / (1 + (s - 1) u); uniform for s = 1.

        Args:
          t_start: where to start, in [0, 1); may be traced.
          dtype: dtype of the grid.

        Raises:
          InputError: a concrete t_start is outside [0, 1).

        Source: PAPER section 1, t_i = i / N; the shift is that of Esser et al. 2024, "Scaling
          Rectified Flow Transformers for High-Resolution Image Synthesis", eq. 23.
        """
        if not isinstance(t_start, jax.core.Tracer) and not 0 <= float(t_start) < 1:
            raise InputError(f"t_start is {float(t_start)}; it must lie in [0, 1), 0 being noise")
        left = jnp.asarray(self._left(), dtype)
        return 1 - (1 - jnp.asarray(t_start, dtype)) * left

    def times(self) -> np.ndarray:
        """The time grid from 0, `[steps + 1]` float32, without compiling anything."""
        return 1 - self._left().astype(np.float32)

    def _left(self) -> np.ndarray:
        """The share of the way that is left at each time, from exactly 1 to exactly 0, float64."""
        s, uniform = self.shift, np.arange(self.steps, -1, -1) / self.steps
        left = s * uniform / (1 + (s - 1) * uniform)
        left[0] = 1  # not always, by rounding
        return left

    def intervals(self) -> Sequence[tuple[Run, int, int]]:
        """Each run with the grid index of its first and last time."""
        ends = [0]
        for run in self.runs:
            ends.append(ends[-1] + run.steps)
        return [(run, i, j) for run, (i, j) in zip(self.runs, pairwise(ends), strict=True)]


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
