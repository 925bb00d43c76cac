"""Schedules: which block makes each step, as text and as validated data.

"H1P5R3" is one Heun step, five pseudo corrector steps, three refiner steps, in that order;
"H1P5R3@0.5" are the same on a time grid that is finer near the data. "A2x8" is eight steps of
Adams-Bashforth's method of order 2, "S5" a learnt solver of five steps. Source: PAPER section 2.
"""

import dataclasses
import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import spacing
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.spacing import LEARNT, SHIFTED, SPACINGS

# letter: (predictor evaluations, refiner evaluations, needs a remembered velocity)
EVALUATIONS = {"E": (1, 0), "H": (2, 0), "P": (1, 0), "R": (0, 2), "Rc": (0, 2)}
EVALUATIONS |= {"A2": (1, 0), "A3": (1, 0), "A4": (1, 0), "S": (1, 0), "Rs": (0, 1)}
NAMES = {
    "E": "Euler",
    "H": "Heun",
    "P": "pseudo corrector",
    "R": "refiner",
    "Rc": "refiner, chained rule",
    "S": "learnt solver",
}
ADAMS = {"A2": 2, "A3": 3, "A4": 4}  # Adams-Bashforth's methods, and their orders
LEARNT_ROWS = ("S", "Rs")  # steps whose weights are learnt; Rs is what R is in their company
REFINERS = ("R", "Rc", "Rs")
GRAMMAR = (
    "a schedule is runs such as H1P5R3: a letter "
    "(" + ", ".join(f"{letter} {name}" for letter, name in NAMES.items()) + ") and a number of "
    "steps each; A2x8 is 8 steps of Adams-Bashforth of order 2 (to 4), (H1P1R1)x2 repeats, and "
    "@0.5 at the end shifts the time grid (or @cosine, @sigmoid, @learnt)"
)
_TOKEN = re.compile(
    r"\s*(?:(?P<adams>A[0-9]+)x(?P<adams_steps>[0-9]{1,9})"
    r"|(?P<run>[A-Za-z]+)(?P<steps>[0-9]{1,9})|(?P<open>\()|\)x(?P<times>[0-9]{1,9}))\s*"
)
_SHIFT = re.compile(r"[0-9]{1,4}(\.[0-9]{1,9})?")
MAX_STEPS = 10_000  # a typing error, not a schedule
SHIFT_DIGITS = 6  # as many are kept, so that the text says all of it
MAX_SHIFT = 100.0  # likewise; Stable Diffusion 3 uses 3 at 1024²


@dataclasses.dataclass(frozen=True)
class Run:
    """A number of equal blocks in a row.

    Attributes:
      block: "E", "H", "P", "R" (the official sampler's rule), "Rc" (the chained rule), "A2" to "A4"
        (Adams-Bashforth), "S" (learnt), or "Rs", which is what R is in a schedule with S.
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
      spacing: of the time grid: "shifted", "cosine", "sigmoid", or "learnt": a solver's numbers say
        it. A schedule with S has that.
    """

    runs: tuple[Run, ...]
    shift: float = 1.0
    spacing: str = SHIFTED

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
        if self.spacing not in SPACINGS:
            raise InputError(f"the spacing is {self.spacing!r}; known are {', '.join(SPACINGS)}")
        if self.spacing != SHIFTED and self.shift != 1:
            raise InputError(f"a time grid is shifted or {self.spacing}, not both; leave one out")
        runs = []
        for block, group in groupby(self._companions(), key=lambda run: run.block):
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
        if runs[0].block in REFINERS:
            raise InputError(
                f"schedule {self} starts with {_letter(runs[0].block)}, but there is no velocity "
                "to refine yet; begin with H, P or E"
            )
        if self.learns_weights:
            if self.spacing not in (SHIFTED, LEARNT) or self.shift != 1:
                raise InputError(
                    f"the time grid of {self} is learnt with S; leave out what follows @"
                )
            object.__setattr__(self, "spacing", LEARNT)

    def _companions(self) -> list[Run]:
        """The runs, with R as it is in the company of S, where its weights are learnt, too."""
        blocks = {run.block for run in self.runs}
        if "S" not in blocks:
            if "Rs" in blocks:
                raise InputError("Rs is the refiner of schedules with S, and there is no S")
            return list(self.runs)
        if "Rc" in blocks:
            raise InputError("beside S the refiner has no chained rule; write R, which is learnt")
        return [Run("Rs", run.steps) if run.block == "R" else run for run in self.runs]

    @classmethod
    def parse(cls, text: "str | Schedule") -> "Schedule":
        """Reads a schedule; a Schedule is returned as it is. Runs of 0 steps are left out.

        Args:
          text: such as "H1P5R3", "P5H7R3", "(H1P1R1)x2", "E10", "H1P5Rc3", "H1P5R3@0.5",
            "H1A3x6@cosine", "S5" or "S4R1".

        Raises:
          InputError: it is empty, has no steps, an unknown letter, starts with R or cannot be read.
        """
        if isinstance(text, Schedule):
            return text
        if not isinstance(text, str):
            raise InputError(f"schedule is {text!r}, not text; {GRAMMAR}")
        shown = _shorten(text.strip())
        text, at, shift = text.strip().partition("@")
        shift, spaced = shift.strip(), SHIFTED
        if shift in SPACINGS[1:]:
            shift, spaced = "1", shift
        elif at and not _SHIFT.fullmatch(shift):
            raise InputError(
                f"schedule {shown!r} has the shift {_shorten(shift)!r}; write a number such as "
                f"@0.5, or @{', @'.join(SPACINGS[1:])}"
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
            block, steps = token["adams"] or token["run"], token["adams_steps"] or token["steps"]
            if block:
                if block not in EVALUATIONS or (block in ADAMS) != bool(token["adams"]):
                    raise InputError(
                        f"unknown block {_shorten(block)!r} in schedule {shown!r}; {GRAMMAR}"
                    )
                if int(steps):
                    stack[-1].append(Run(block, int(steps)))
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
        return cls(tuple(stack[0]), float(shift) if at else 1.0, spaced)

    def __str__(self) -> str:
        """Text that parses back to this schedule; a whole repetition is written as one."""
        # Fixed-point, which parses back, and without the zeros that say nothing.
        shift = "" if self.shift == 1 else f"@{self.shift:.{SHIFT_DIGITS}f}".rstrip("0").rstrip(".")
        if self.spacing != SHIFTED and not self.learns_weights:
            shift = f"@{self.spacing}"
        runs = [_run_text(run) for run in self.runs]
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
    def method(self) -> str:
        """What to call it in a word or two, such as "Heun", "FlowTurbo" or "Learnt solver"."""
        if self.learns_weights:
            return NAMES["S"].capitalize()
        if self.blocks & ADAMS.keys() and not self.needs_refiner:
            return "Adams-Bashforth"
        if len(self.blocks) == 1:
            return NAMES[self.runs[0].block].capitalize()
        return "Euler, Heun" if self.blocks == {"E", "H"} else "FlowTurbo"

    @property
    def learns_weights(self) -> bool:
        """Whether there are steps whose weights are learnt."""
        return any(self.learnt_rows)

    @property
    def learnt(self) -> bool:
        """Whether a solver's numbers are needed: its time grid, and maybe weights."""
        return self.spacing == LEARNT

    @property
    def remembered(self) -> int:
        """How many velocities are remembered, that of the step at hand included; 0 for none.

        A learnt step may use all that there are by then, Adams-Bashforth as many as its order.
        """
        most = 0
        for run, first, last in self.intervals():
            if run.block in LEARNT_ROWS:
                most = max(most, last)
            elif run.block in ADAMS:
                most = max(most, min(ADAMS[run.block], first + run.steps))
        return most

    @property
    def orders(self) -> tuple[int, ...]:
        """The order of each step that is Adams-Bashforth's; 0 for the others."""
        return tuple(ADAMS.get(run.block, 0) for run in self.runs for _ in range(run.steps))

    @property
    def learnt_rows(self) -> tuple[bool, ...]:
        """Of each step whether its weights are learnt."""
        return tuple(run.block in LEARNT_ROWS for run in self.runs for _ in range(run.steps))

    @property
    def blocks(self) -> frozenset[str]:
        """The letters of the blocks that occur."""
        return frozenset(run.block for run in self.runs)

    @property
    def needs_refiner(self) -> bool:
        """Whether any step is made by the refiner."""
        return self.refiner_evaluations > 0

    def time_grid(
        self,
        t_start: float | jax.Array = 0.0,
        dtype: Any = jnp.float32,
        times: Any = None,
    ) -> jax.Array:
        """Flow times of all steps, `[steps + 1]`, from t_start to exactly 1.

        t_i = 1 - (1 - t_start) left_i, with the share of the way that is left as `spacing.left`
        has it, i / N on the uniform grid; shifted grids are finer at one end, the others at both.

        Args:
          t_start: where to start, in [0, 1); may be traced.
          dtype: dtype of the grid.
          times: of a learnt grid, from 0 to 1, `[steps + 1]`; may be traced.

        Raises:
          InputError: a concrete t_start is outside [0, 1), or a learnt grid has no times.

        Source: PAPER section 1, t_i = i / N.
        """
        if not isinstance(t_start, jax.core.Tracer) and not 0 <= float(t_start) < 1:
            raise InputError(f"t_start is {float(t_start)}; it must lie in [0, 1), 0 being noise")
        if self.learnt and times is not None:
            left = 1 - jnp.asarray(times, dtype)
        else:
            left = jnp.asarray(self.left(), dtype)
        return 1 - (1 - jnp.asarray(t_start, dtype)) * left

    def times(self) -> np.ndarray:
        """The time grid from 0, `[steps + 1]` float32, without compiling anything."""
        return 1 - self.left().astype(np.float32)

    def left(self) -> np.ndarray:
        """The share of the way that is left at each time, from exactly 1 to exactly 0, float64.

        Raises:
          InputError: the grid is learnt, so that the schedule alone does not say it.
        """
        if self.learnt:
            raise InputError(
                f"the time grid of {self} is learnt: it is in the numbers of a solver, which "
                "python -m flowturbo_jax solve finds for a model"
            )
        return spacing.left(self.spacing, self.steps, self.shift)

    def intervals(self) -> Sequence[tuple[Run, int, int]]:
        """Each run with the grid index of its first and last time."""
        ends = [0]
        for run in self.runs:
            ends.append(ends[-1] + run.steps)
        return [(run, i, j) for run, (i, j) in zip(self.runs, pairwise(ends), strict=True)]


def _run_text(run: Run) -> str:
    if run.block in ADAMS:
        return f"{run.block}x{run.steps}"
    return f"{_letter(run.block)}{run.steps}"


def _letter(block: str) -> str:
    return "R" if block == "Rs" else block  # which of the two it is, its company says


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
