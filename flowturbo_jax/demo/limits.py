"""What a visitor of the page may ask for, checked before anything runs."""

import base64
import binascii
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool

from flowturbo_jax.class_names import label_of
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.model_description import PRESET_NAMES, Description
from flowturbo_jax.pipelines.plan import DEFAULT_SCHEDULE, Plan, resolve
from flowturbo_jax.schedule import Schedule

MOST_IMAGES = 16
MOST_PIXELS = 2**20  # of all images of a request
MOST_EVALUATIONS = 128  # of either network
MOST_RUNS = 32  # a program grows with them, and the time to compile it
LONGEST_TEXT = 80
SCALES = (0.0, 20.0)
MOST_BYTES = 10 * 2**20  # of an uploaded file
_MASK = re.compile(r"([0-9]{1,5})x([0-9]{1,5}):([A-Za-z0-9+/=]*)")


def most_images(description: Description) -> int:
    """How many images of this model a request may have."""
    height, width, _ = description.image_shape
    return max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))


def whole(value: Any, name: str, least: int, most: int) -> int:
    """A whole number within bounds; the page's number fields give floats, or None if empty.

    Raises:
      InputError: it is none.
    """
    given = _number(value, name)
    if given != int(given) or not least <= given <= most:
        raise InputError(f"{name} is {given:.12g}; give a whole number from {least} to {most}")
    return int(given)


def within(value: Any, name: str, least: float, most: float) -> float:
    """A number within bounds.

    Raises:
      InputError: it is none.
    """
    given = _number(value, name)
    if not least <= given <= most:
        raise InputError(f"{name} is {given:g}; give a number from {least:g} to {most:g}")
    return given


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{name} is {'empty' if value is None else 'no number'}; give a number")
    return float(value)


def label(value: Any, description: Description) -> int:
    """The class that was chosen from the list, or typed as a number or a name.

    Raises:
      InputError: the model has no such class.
    """
    classes = description.predictor.num_classes
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise InputError("no class is chosen; take one from the list")
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise InputError(f"the class has {len(value)} letters; give its name or its number")
    found = label_of(value, description.class_names)
    if not 0 <= found < max(classes, 1):
        raise InputError(f"class {found} is out of range; there are 0 to {max(classes, 1) - 1}")
    return found


def schedules(description: Description) -> list[tuple[str, str]]:
    """The schedules of the page's list: how each is shown, and its text."""
    presets = [
        (f"{name}: {description.schedules[name].schedule}", name)
        for name in PRESET_NAMES
        if name in description.schedules
    ]
    others = (DEFAULT_SCHEDULE, "H1P3R2") if description.refiner is not None else ("H1P5", "P8")
    return [*presets, *((text, text) for text in others)]


def plan(
    description: Description,
    schedule: Any,
    scale: Any,
    find_solver: Callable[[Schedule], LearntSolver] | None = None,
) -> Plan:
    """How to sample, of a schedule that a page can wait for.

    Args:
      description: of the model.
      schedule: a text, or the name of a preset.
      scale: of guidance; None for the model's default.
      find_solver: as in `pipelines.plan.resolve`.

    Raises:
      InputError: it cannot be read, the model cannot do it, or it would take too long.
    """
    if not isinstance(schedule, str) or not schedule.strip():
        raise InputError("no schedule is chosen; take one from the list, or type one like H1P3R2")
    if len(schedule) > LONGEST_TEXT:
        raise InputError(
            f"the schedule has {len(schedule)} letters; at most {LONGEST_TEXT} are taken here"
        )
    scale = None if scale is None else within(scale, "guidance", *SCALES)
    found = resolve(description, schedule, scale, find_solver=find_solver)
    evaluations = (found.schedule.predictor_evaluations, found.schedule.refiner_evaluations)
    if max(evaluations) > MOST_EVALUATIONS or len(found.schedule.runs) > MOST_RUNS:
        raise InputError(
            f"this schedule has {evaluations[0]} evaluations, {evaluations[1]} of the refiner, in "
            f"{len(found.schedule.runs)} runs; the page takes up to {MOST_EVALUATIONS} of each and "
            f"{MOST_RUNS} runs: sample.py takes any"
        )
    return found


def mask(text: Any, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """The mask that was drawn in the page, true where it is to be repainted.

    Args:
      text: "8x8:" (width, height) and the base64 of a bit per pixel, row by row.
      height: of the model's images.
      width: of the model's images.

    Raises:
      InputError: nothing was drawn, or the text is no mask of that size.
    """
    if not text:
        raise InputError("nothing is painted yet; paint over what is to be made anew")
    found = _MASK.fullmatch(text) if isinstance(text, str) else None
    try:
        drawn = base64.b64decode(found[3], validate=True) if found else b""
    except binascii.Error:
        drawn = b""
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8))[: height * width]
    if not found or (int(found[1]), int(found[2])) != (width, height) or len(bits) < height * width:
        raise InputError("the painted mask does not fit the picture; clear it and paint again")
    if not bits.any():
        raise InputError("nothing is painted yet; paint over what is to be made anew")
    return bits.reshape(height, width).astype(bool)
