"""How a model is sampled: what a caller asks for, completed by what the model says of itself."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import guidance as guide
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import PRESET_NAMES, Description
from flowturbo_jax.schedule import Schedule

DEFAULT_SCHEDULE = "H1P5R3"  # the paper's fastest on ImageNet


class Plan(NamedTuple):
    """What selects a program (schedule, guidance, whether there is an interval), and its arguments.

    Attributes:
      schedule: which block makes each step.
      guidance: "none", "official" or "paired".
      scale: of guidance, a number or an array `[]`; 1 for "none".
      interval: first and last flow time of guidance, two numbers or an array `[2]`; None for all
        of the time.
    """

    schedule: Schedule
    guidance: str
    scale: float | jax.Array
    interval: tuple[float, float] | jax.Array | None

    @property
    def arguments(self) -> tuple[Any, Any]:
        """Scale `[]` and interval `[2]` (or None) as float32 arguments of a compiled program."""
        return _float32(self.scale), None if self.interval is None else _float32(self.interval)


def _float32(value: Any) -> Any:
    """NumPy's, which compiles no conversion, but of an array of JAX's."""
    if isinstance(value, jax.Array):
        return value.astype(jnp.float32)
    return np.asarray(value, np.float32)


def resolve(
    description: Description,
    schedule: str | Schedule | None = None,
    scale: Any = None,
    mode: str | None = None,
    interval: Any = None,
) -> Plan:
    """Completes a request by the model's defaults and refuses what the model cannot do.

    Args:
      description: of the model.
      schedule: a schedule, or "fast", "balanced" or "best" where the model has such presets, which
        also say how to guide; H1P5R3 if None.
      scale: guidance scale, a number or an array `[]`; the model's default if None.
      mode: "paired", "official" or "none"; that of the preset or of the model if None, but "paired"
        where the model's is "none" and a scale is given.
      interval: two flow times, text such as "0.1:0.8", or an array `[2]`; if None that of the
        preset, unless another mode is asked for, or all of the time.

    Raises:
      InputError: the model cannot be sampled so.
    """
    schedule = DEFAULT_SCHEDULE if schedule is None else schedule
    if isinstance(schedule, str) and schedule.strip() in PRESET_NAMES:
        name = schedule.strip()
        if name not in description.schedules:
            raise InputError(
                f"this model has no schedule {name!r} yet: find it with python -m flowturbo_jax "
                "tune MODEL --write, or name one such as H1P5R3"
            )
        preset = description.schedules[name]
        schedule = preset.schedule
        mode = preset.guidance if mode is None else mode
        if interval is None and mode == preset.guidance:
            interval = preset.guidance_interval
    schedule = Schedule.parse(schedule)
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
    return Plan(schedule, mode, scale, interval)


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
