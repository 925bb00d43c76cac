"""How a model is sampled: what a caller asks for, completed by what the model says of itself."""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from flowturbo_jax import guidance as guide
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.model_description import PRESET_NAMES, Description
from flowturbo_jax.multistep import Solver
from flowturbo_jax.schedule import Schedule

WantedSchedule = str | Schedule | LearntSolver | None  # a solver stands for its schedule
DEFAULT_SCHEDULE = "H1P5R3"  # the paper's fastest on ImageNet
WITHOUT_REFINER = "H1P6"  # the default of a model that has none


class Plan(NamedTuple):
    """What selects a program (schedule, guidance, whether there is an interval), and its arguments.

    Attributes:
      schedule: which block makes each step.
      guidance: "none", "official" or "paired".
      scale: of guidance, a number or an array `[]`; 1 for "none".
      interval: first and last flow time of guidance, two numbers or an array `[2]`; None for all
        of the time.
      solver: where the schedule is learnt, its numbers.
    """

    schedule: Schedule
    guidance: str
    scale: float | jax.Array
    interval: tuple[float, float] | jax.Array | None
    solver: LearntSolver | None = None

    @property
    def arguments(self) -> tuple[Any, Any, Solver | None]:
        """Scale `[]`, interval `[2]` (or None) and solver (or None), float32, for a program."""
        interval = None if self.interval is None else _float32(self.interval)
        return _float32(self.scale), interval, self.numbers

    @property
    def numbers(self) -> Solver | None:
        """The solver's numbers at this guidance scale; None where nothing is learnt."""
        return None if self.solver is None else self.solver.at(self.scale)

    @property
    def times(self) -> np.ndarray:
        """The time grid from 0, `[steps + 1]` float32."""
        return self.schedule.times() if self.solver is None else np.asarray(self.numbers.times)

    @property
    def settings(self) -> dict[str, Any]:
        """What a call of a pipeline has to be told, by name, to sample so."""
        return {
            "schedule": self.solver or self.schedule,
            "guidance_scale": self.scale,
            "guidance": self.guidance,
            # Said in full: for None a solver or a preset would put its own.
            "guidance_interval": (
                (0.0, 1.0) if self.interval is None and self.guidance != "none" else self.interval
            ),
        }


def _float32(value: Any) -> Any:
    """NumPy's, which compiles no conversion, but of an array of JAX's."""
    if isinstance(value, jax.Array):
        return value.astype(jnp.float32)
    return np.asarray(value, np.float32)


def resolve(
    description: Description,
    schedule: WantedSchedule = None,
    scale: Any = None,
    mode: str | None = None,
    interval: Any = None,
    find_solver: Callable[[Schedule], LearntSolver] | None = None,
) -> Plan:
    """Completes a request by the model's defaults and refuses what the model cannot do.

    Args:
      description: of the model.
      schedule: a schedule, or "fast", "balanced" or "best" where the model has such presets, which
        also say how to guide; or a learnt solver, whatever model it was learnt for; if None
        H1P5R3, or H1P6 where there is no refiner.
      scale: guidance scale, a number or an array `[]`; the model's default if None.
      mode: "paired", "official" or "none"; that of the preset or of the model if None, but "paired"
        where the model's is "none" and a scale is given.
      interval: two flow times, text such as "0.1:0.8", or an array `[2]`; if None that of the
        preset, unless another mode is asked for, or all of the time.
      find_solver: finds the model's own solver of a learnt schedule; None where it has none.

    Raises:
      InputError: the model cannot be sampled so.
    """
    default = WITHOUT_REFINER if description.refiner is None else DEFAULT_SCHEDULE
    if schedule is None:
        schedule = default
    if isinstance(schedule, str) and schedule.strip() in PRESET_NAMES:
        name = schedule.strip()
        if name not in description.schedules:
            tune = "find it with python -m flowturbo_jax tune MODEL --write, or "
            raise InputError(
                f"this model has no schedule {name!r} yet: "
                f"{'' if description.takes_text else tune}"  # tune takes no such models
                f"name one such as {default}"
            )
        preset = description.schedules[name]
        schedule = preset.schedule
        mode = preset.guidance if mode is None else mode
        if interval is None and mode == preset.guidance:
            interval = preset.guidance_interval
    solver = schedule if isinstance(schedule, LearntSolver) else None
    schedule = Schedule.parse(schedule if solver is None else solver.schedule)
    if schedule.learnt and solver is None:
        if find_solver is None:
            raise InputError(f"schedule {schedule} is learnt, and this model has no solvers")
        solver = find_solver(schedule)
    if solver is not None:
        if solver.guidance == "none" and mode is None and description.guidance != "none":
            if scale not in (None, 1):
                raise InputError(
                    f"solver {schedule} was learnt without guidance, so it takes no "
                    "guidance_scale; leave that out, or learn one with guidance"
                )
            _warn_once(f"solver {schedule} was learnt without guidance, and samples without it")
        mode = solver.guidance if mode is None else mode
        if interval is None and mode == solver.guidance:
            interval = solver.guidance_interval
    if schedule.needs_refiner and description.refiner is None:
        raise InputError(
            f"schedule {schedule} refines, but this model has no refiner; take a schedule of "
            "E, H and P, or train one with train.py"
        )
    mode, scale = _guidance(description, mode, scale)
    if not (isinstance(interval, jax.Array) and interval.shape == (2,)):
        interval = guide.check_interval(interval)
    if mode == "none" and interval is not None:
        raise InputError("guidance 'none' has no guidance_interval; leave one out")
    if not isinstance(scale, jax.Array) and scale == 1:  # one branch gives the same, for half
        mode, interval = "none", None
    plan = Plan(schedule, mode, scale, interval, solver)
    if solver is not None:
        _check_use(solver, plan)
    return plan


def _check_use(solver: LearntSolver, plan: Plan) -> None:
    """Refuses another mode than a solver was learnt for; warns of other numbers."""
    known, unguided = solver.scales, plan.guidance == "none"
    if plan.guidance != solver.guidance and not unguided:
        raise InputError(
            f"solver {plan.schedule} was learnt under guidance {solver.guidance!r}, not "
            f"{plan.guidance!r}; leave guidance out, or learn one: python -m flowturbo_jax solve"
        )
    if not isinstance(plan.scale, jax.Array) and not known[0] <= plan.scale <= known[-1]:
        _warn_once(
            f"solver {plan.schedule} was learnt at guidance scale "
            f"{' to '.join(f'{scale:g}' for scale in dict.fromkeys((known[0], known[-1])))}; at "
            f"{plan.scale:g} it is less exact (docs/solvers.md)"
        )
    traced = isinstance(plan.interval, jax.Array)
    if not unguided and not traced and plan.interval != solver.guidance_interval:
        _warn_once(
            f"solver {plan.schedule} was learnt for the guidance interval "
            f"{solver.guidance_interval}, not {plan.interval}; it is less exact so"
        )


@functools.lru_cache
def _warn_once(message: str) -> None:
    logging.warning(message)


def _guidance(
    description: Description, mode: str | None, scale: Any
) -> tuple[str, float | jax.Array]:
    can_guide = description.can_guide
    if mode is None:
        mode = description.guidance
        if mode == "none" and scale is not None:
            mode = "paired"  # a scale was asked for, so guide, or say why not
    if mode not in guide.MODES:
        raise InputError(f"guidance is {mode!r}; it must be one of {', '.join(guide.MODES)}")
    if mode != "none" and not can_guide:
        raise InputError(
            "this model cannot be guided: it has no null class (it is unconditional, or was "
            "trained without label dropout); use guidance 'none'"
        )
    if isinstance(scale, jax.Array) and scale.ndim == 0 and mode != "none":
        return mode, scale
    if scale is None:
        scale = description.guidance_scale if mode != "none" else 1.0
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not abs(scale) < 1e6:
        raise InputError(f"guidance_scale is {scale!r}; it must be a number, such as 1.5")
    if mode == "none" and scale != 1:
        raise InputError(f"guidance 'none' has no scale, but {scale} was given; leave one out")
    return mode, float(scale)
