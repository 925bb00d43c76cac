"""The space that `tune` searches: where it starts, and what it tries beside a schedule."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import permutations

from flowturbo_jax.guidance import MODES, check_interval
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.schedule import ADAMS, MAX_SHIFT, Run, Schedule
from flowturbo_jax.spacing import COSINE, SHIFTED, SIGMOID

RULES = ("R", "Rc")


@dataclasses.dataclass(frozen=True)
class Space:
    """What may be tried, validated at construction.

    Attributes:
      max_evaluations: predictor evaluations of a sample, at most.
      max_refiner_steps: R steps, at most; 0 without a refiner.
      modes: guidance modes, the first of which is where the search starts; () for the model's own
        and, where that guides, the other one.
      refiner_rules: "R" (the official sampler's rule), "Rc" (the chained one) or both.
      shifts: of the time grid, beside 1.
      intervals: of guidance, text such as "0.1:1", beside all of the time.
      orders: whether to try other orders than H, P, R.
      spacings: time grids beside shifted ones: "cosine", "sigmoid".
      adams: Adams-Bashforth's methods to begin with, too: "A2", "A3", "A4".
    """

    max_evaluations: int = 12
    max_refiner_steps: int = 4
    modes: tuple[str, ...] = ()
    refiner_rules: tuple[str, ...] = RULES
    shifts: tuple[float, ...] = (0.35, 0.5, 0.71, 1.41, 2.0)
    intervals: tuple[str, ...] = ("0:0.8", "0.1:1", "0.2:1")
    orders: bool = True
    spacings: tuple[str, ...] = (COSINE, SIGMOID)
    adams: tuple[str, ...] = ("A2", "A3")

    def __post_init__(self):
        if not 2 <= self.max_evaluations <= 100:
            raise InputError(f"max_evaluations is {self.max_evaluations}; it must be 2 to 100")
        if not 0 <= self.max_refiner_steps <= 20:
            raise InputError(f"max_refiner_steps is {self.max_refiner_steps}; it must be 0 to 20")
        if not self.refiner_rules or set(self.refiner_rules) - set(RULES):
            raise InputError(
                f"refiner rules are to be {self.refiner_rules}; known are {', '.join(RULES)}"
            )
        if set(self.modes) - set(MODES):
            raise InputError(f"guidance modes are to be {self.modes}; known are {', '.join(MODES)}")
        if "none" in self.modes and len(self.modes) > 1:
            raise InputError(
                "guidance 'none' makes other images than the guided modes, and cannot be compared "
                "with them; search them apart"
            )
        for shift in self.shifts:
            Schedule((Run("H", 1),), shift)
        if set(self.spacings) - {COSINE, SIGMOID}:
            raise InputError(f"spacings are to be {self.spacings}; known are {COSINE}, {SIGMOID}")
        if set(self.adams) - ADAMS.keys():
            raise InputError(f"adams is to be {self.adams}; known are {', '.join(ADAMS)}")
        for interval in self.intervals:
            check_interval(interval)

    def start(self, scale: float) -> list[Plan]:
        """Every count of H, P and R within the limits, in that order, on the uniform grid.

        And Adams-Bashforth's methods, from the start or after an H.

        Args:
          scale: of guidance.
        """
        plans = [
            Plan(Schedule(runs), self.modes[0], scale, None)
            for block in self.adams
            for n in range(2, self.max_evaluations + 1)
            for runs in ((Run(block, n),), (Run("H", 1), Run(block, n - 1)))
            if Schedule(runs).predictor_evaluations <= self.max_evaluations
        ]
        # From H1 on: a P with nothing before it is an H.
        for h in range(1, self.max_evaluations // 2 + 1):
            for p in range(self.max_evaluations + 1):
                for r in range(self.max_refiner_steps + 1):
                    runs = [("H", h), ("P", p), (self.refiner_rules[0], r)]
                    schedule = Schedule(tuple(Run(block, n) for block, n in runs if n))
                    if schedule.predictor_evaluations <= self.max_evaluations:
                        plans.append(Plan(schedule, self.modes[0], scale, None))
        return plans

    def beside(self, plan: Plan) -> Iterator[Plan]:
        """Plans that differ from one in one thing: grid, rule, order, mode or interval."""
        schedule = plan.schedule
        if schedule.learnt:  # all of it goes together
            return
        if self.shifts:
            around = (schedule.shift * factor for factor in (0.84, 1.19))
            for shift in (1.0, *self.shifts, *around):
                if 1 / MAX_SHIFT <= shift <= MAX_SHIFT:
                    grid = {"shift": shift, "spacing": SHIFTED}
                    yield plan._replace(schedule=dataclasses.replace(schedule, **grid))
        for spacing in self.spacings:
            grid = {"shift": 1.0, "spacing": spacing}
            yield plan._replace(schedule=dataclasses.replace(schedule, **grid))
        for rule in self.refiner_rules:
            runs = tuple(
                Run(rule, run.steps) if run.block in RULES else run for run in schedule.runs
            )
            yield plan._replace(schedule=dataclasses.replace(schedule, runs=runs))
        if self.orders and len(schedule.runs) <= 3:
            for runs in permutations(schedule.runs):
                other = dataclasses.replace(schedule, runs=runs) if self._legal(runs) else schedule
                if other.predictor_evaluations <= self.max_evaluations:
                    yield plan._replace(schedule=other)
        for mode in self.modes:
            yield plan._replace(guidance=mode)
        if plan.guidance != "none":
            for interval in (None, *self.intervals):
                yield plan._replace(interval=check_interval(interval))

    @staticmethod
    def _legal(runs: Sequence[Run]) -> bool:
        return runs[0].block not in RULES
