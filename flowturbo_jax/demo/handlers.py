"""What the page does: checked input in, images out. Nothing here knows Gradio or a visitor."""

import threading
import time
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from flowturbo_jax import pictures
from flowturbo_jax.demo import limits
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.timing import timed

MOST_PROGRAMS = 48  # kept at a time: each takes memory
BASELINE = "H8"

Pictures = UInt8[np.ndarray, "batch height width channels"]
Picture = UInt8[np.ndarray, "height width channels"]
Say = Callable[[str, float], Any]  # what is being done, and how much of it all, in [0, 1]
Call = Callable[[ClassToImage], Any]


class Request(NamedTuple):
    """What is sampled.

    Attributes:
      label: of all images.
      plan: how.
      seed: of the noise.
      count: of images.
    """

    label: int
    plan: Plan
    seed: int
    count: int


class Made(NamedTuple):
    """Images, and how they came to be.

    Attributes:
      images: `[B, H, W, C]` uint8.
      plan: how they were sampled.
      ms_per_image: median wall time of a call until the images are on the host, compiled before.
    """

    images: Pictures
    plan: Plan
    ms_per_image: float


class Studio:
    """A model that computes one request at a time and knows which programs it has.

    Args:
      pipe: the model.
      name: what to call it.
      baseline: the schedule to compare with.

    Raises:
      InputError: the model shows no images, or cannot be sampled by the baseline.
    """

    def __init__(self, pipe: ClassToImage, name: str, baseline: str = BASELINE):
        self.name, self.description = name, pipe.model.description
        self.most_images = limits.most_images(self.description)
        limits.plan(self.description, baseline, None, pipe.solver)
        pipe.check([0], baseline)
        self._pipe, self._baseline = pipe, baseline
        self._lock = threading.Lock()
        self._known: set[Any] = set()
        self._last_seconds: float | None = None  # that a program took to compile

    def request(self, label: Any, schedule: Any, scale: Any, seed: Any, count: Any) -> Request:
        """Reads the fields that all parts of the page share.

        Raises:
          InputError: one of them is nothing the model can take.
        """
        return Request(
            limits.label(label, self.description),
            limits.plan(self.description, schedule, scale, self._pipe.solver),
            limits.whole(seed, "the seed", 0, 2**32 - 1),
            limits.whole(count, "the number of images", 1, self.most_images),
        )

    def generate(self, request: Request, scale: Any, say: Say) -> tuple[Made, Made]:
        """The same noise by the baseline and by the schedule that was asked for.

        Args:
          request: what is sampled.
          scale: of guidance, for the baseline; None for the model's.
          say: is told what is being done.

        Raises:
          InputError: the model cannot do it.
        """
        baseline = limits.plan(self.description, self._baseline, scale, self._pipe.solver)
        with self._lock:
            heun = self._generated(
                request._replace(plan=baseline), lambda text, done: say(text, done / 2)
            )
            return heun, self._generated(request, lambda text, done: say(text, (1 + done) / 2))

    def edit(self, source: Picture | None, strength: Any, request: Request, say: Say) -> Made:
        """Variations of a picture under another class.

        Args:
          source: of the model's size.
          strength: 0 keeps the picture, 1 is generation.
          request: what is sampled.
          say: is told what is being done.

        Raises:
          InputError: there is no picture, or the model cannot do it.
        """
        strength = limits.within(strength, "the strength", 0, 1)
        images = self._repeated(source, request.count)
        given = {"strength": strength, **_arguments(request)}
        with self._lock:
            call = methodcaller("edit", images, _labels(request), **given)
            return self._measured("edit", request, call, say)

    def inpaint(self, source: Picture | None, mask: Any, request: Request, say: Say) -> Made:
        """A picture, painted anew where the mask says so.

        Args:
          source: of the model's size.
          mask: as the page's canvas gives it; see `limits.mask`.
          request: what is sampled.
          say: is told what is being done.

        Raises:
          InputError: there is no picture or no mask, or the model cannot do it.
        """
        images = self._repeated(source, request.count)
        drawn = limits.mask(mask, *images.shape[1:3])
        masks = np.broadcast_to(drawn, images.shape[:3])
        with self._lock:
            call = methodcaller("inpaint", images, masks, _labels(request), **_arguments(request))
            return self._measured("inpaint", request, call, say)

    def one(self, request: Request, say: Say) -> Picture:
        """A generated picture to begin with."""
        request = request._replace(count=1)
        with self._lock:
            call = methodcaller("__call__", _labels(request), **_arguments(request))
            self._prepare("generate", request, call, say)
            return np.asarray(call(self._pipe))[0]

    def read(self, path: Any) -> Picture:
        """A picture that was uploaded, at the size of the model's images.

        Raises:
          InputError: there is none, or it cannot be read.
        """
        if not isinstance(path, str):
            raise InputError("nothing was uploaded; choose a picture")
        try:
            return pictures.open_picture(path, self.description.image_shape).pixels
        except InputError as error:  # whose file it was is known; where it lies is not their matter
            raise InputError(str(error).replace(path, Path(path).name)) from error

    def _generated(self, request: Request, say: Say) -> Made:
        call = methodcaller("__call__", _labels(request), **_arguments(request))
        return self._measured("generate", request, call, say)

    def _repeated(self, source: Picture | None, count: int) -> Pictures:
        if source is None:
            raise InputError("there is no picture yet; upload one, or take a generated one")
        return np.repeat(source[None], count, axis=0)

    def _measured(self, task: str, request: Request, call: Call, say: Say) -> Made:
        self._prepare(task, request, call, say)
        say(f"sampling {_images(request.count)} with {request.plan.schedule}", 0.7)
        images, seconds = timed(lambda: call(self._pipe))
        return Made(images, request.plan, 1e3 * seconds / request.count)

    def _prepare(self, task: str, request: Request, call: Call, say: Say) -> None:
        """Compiles what a call needs, by making it, if none like it was made before."""
        plan = request.plan
        program = (task, plan.schedule, plan.guidance, plan.interval is None, request.count)
        if program in self._known:
            return
        if len(self._known) >= MOST_PROGRAMS:
            self._pipe = ClassToImage(self._pipe.model)
            self._known.clear()
        last = "" if self._last_seconds is None else f"; the last took {self._last_seconds:.0f} s"
        say(f"compiling {plan.schedule} for {_images(request.count)} (once{last})", 0.1)
        begin = time.perf_counter()
        np.asarray(call(self._pipe))
        self._last_seconds = time.perf_counter() - begin
        self._known.add(program)


def _labels(request: Request) -> list[int]:
    return [request.label] * request.count


def _arguments(request: Request) -> dict[str, Any]:
    return {"seeds": request.seed, **request.plan.settings}


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
