"""What each button of the page answers: a line of what happened, then what is shown and kept."""

from collections.abc import Callable
from typing import Any

from flowturbo_jax.demo import markup
from flowturbo_jax.demo.handlers import Picture, Request, Say, Studio


def generate(studio: Studio, say: Say, *fields: Any) -> tuple[str, str]:
    """Heun and FlowTurbo side by side.

    Args:
      studio: does the work.
      say: is told what is being done.
      *fields: as of `Studio.request`.

    Raises:
      InputError: something that was asked for is wrong, as in the others.
    """
    request = studio.request(*fields)
    heun, fast = studio.generate(request, fields[2], say)
    faster = heun.ms_per_image / fast.ms_per_image
    text = (
        f"{fast.plan.schedule} took {fast.ms_per_image:.2f} ms per image, {heun.plan.schedule} "
        f"{heun.ms_per_image:.2f} ms: {faster:.1f} times as fast."
    )
    alt = _alt(studio, request)
    return text, markup.side_by_side(markup.made(heun, alt), markup.made(fast, alt))


def edit(
    studio: Studio, say: Say, source: Picture | None, strength: Any, *fields: Any
) -> tuple[str, str]:
    """Variations of the picture that was chosen."""
    request = studio.request(*fields)
    made = studio.edit(source, strength, request, say)
    text = f"Edited as {_class(studio, request)}, strength {strength:g}."
    return text, markup.made(made, f"Edited: {_alt(studio, request)}")


def inpaint(
    studio: Studio, say: Say, source: Picture | None, painter: Any, *fields: Any
) -> tuple[str, str]:
    """The picture that was chosen, made anew where it was painted over.

    Args:
      studio: does the work.
      say: is told what is being done.
      source: the picture.
      painter: the value of painter.js, `{"mask": text}`.
      *fields: as of `Studio.request`.
    """
    request = studio.request(*fields)
    mask = painter.get("mask") if isinstance(painter, dict) else None
    made = studio.inpaint(source, mask, request, say)
    text = f"Made anew as {_class(studio, request)}; what was not painted is as it was."
    return text, markup.made(made, f"Inpainted: {_alt(studio, request)}")


def take(
    studio: Studio, show: Callable[[Picture], Any], say: Say, *fields: Any
) -> tuple[str, Any, Picture]:
    """A generated picture to begin with: how it is shown, and itself."""
    request = studio.request(*fields)
    picture = studio.one(request, say)
    text = f"A generated picture of {_class(studio, request)}, seed {request.seed}."
    return text, show(picture), picture


def upload(
    studio: Studio, show: Callable[[Picture], Any], say: Say, path: Any
) -> tuple[str, Any, Picture]:
    """An uploaded picture to begin with: how it is shown, and itself."""
    del say
    picture = studio.read(path)
    height, width, _ = picture.shape
    return f"Your picture, its middle square at {width} x {height}.", show(picture), picture


def _class(studio: Studio, request: Request) -> str:
    names = studio.description.class_names
    return names[request.label] if names else "an image"


def _alt(studio: Studio, request: Request) -> str:
    return f"{request.count} of {_class(studio, request)}, seed {request.seed}"
