"""What a sampling recipe may say: every key, its default, and what it may be."""

import dataclasses
import re

from flowturbo_jax.guidance import MODES, check_interval
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import PRESET_NAMES
from flowturbo_jax.model_directory import network_dtype
from flowturbo_jax.quantization import KINDS
from flowturbo_jax.recipe import Recipe
from flowturbo_jax.sampler import INVERSION
from flowturbo_jax.schedule import Schedule

GENERATE = "generate"
MASKED = ("inpaint", "remove")
OF_IMAGES = ("edit", *MASKED, "invert")
TASKS_OF = {  # keys that not every task uses
    "image": OF_IMAGES,
    "mask": MASKED,
    "results": ("edit", *MASKED),
    "strength": ("edit",),
    "source_label": ("edit",),
    "source_prompt": ("edit",),
    "seeds": (GENERATE, "edit", *MASKED),  # an inversion has no noise to draw
    "inversion": ("edit", "invert"),
    "tries": MASKED,
    "soften": MASKED,
    "margin": ("remove",),
}
OF_TEXT = ("prompt", "prompts_file", "negative_prompt", "source_prompt", "image_size")
OF_CLASSES = ("labels", "source_label")
SIZE = re.compile(r"(\d{1,4})(?:x(\d{1,4}))?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class SampleConfig(Recipe):
    """A sampling recipe, validated at construction; configs/ holds the ready ones.

    Samples, shown and data are of task "generate". Prompt, prompts_file, negative_prompt,
    source_prompt and image_size are of models of texts; labels, source_label and data of others.

    Attributes:
      model_dir: model directory, or the name of a shipped model.
      schedule: which block makes each step, such as H1P5R3, S5 where the model has learnt it, or
        what `tune` found: "fast", "balanced" or "best".
      baseline: other schedules, with commas between, to sample the same noise with and compare; ""
        for none. A learnt one that the model has no solver for is left out.
      seed: image i is image i of this seed.
      seeds: whole numbers with commas between, one for each image in turn, which is the first image
        of its seed; "" for seed.
      samples: how many images each schedule makes; if not set 60, or one for each prompt; with
        seeds, every prompt (or class of labels) with every seed.
      shown: how many of them the picture shows.
      columns: of the picture, images beside each other.
      batch_size: images per call.
      guidance: "paired", "official" or "none"; "" for the model's default.
      guidance_scale: the model's default if not set.
      guidance_interval: first and last flow time of guidance, such as 0.1:0.8; "" for all.
      labels: the classes to sample in turn, numbers or names with commas between; "" for all.
      prompt: what the images show in turn, texts with | between.
      prompts_file: in place of prompt a file, of a text a line, or .jsonl.
      negative_prompt: what guidance leads all images away from.
      image_size: HEIGHTxWIDTH, or one number, in pixels; the model's own if "".
      data: real data to compare the samples with ("digits"); "" for no scores.
      dtype: of the networks' matrix products.
      quantization: "int8" or "fp8" for those of the transformer blocks; "" for dtype.
      out: folder the picture and the numbers are written to.
      task: "generate"; or, of an image: "edit", "inpaint", "remove" (an object) or "invert" (to the
        noise it came from, and back).
      image: a PNG, JPEG or WebP file; its middle square is what the model sees.
      mask: to inpaint or remove: a file of the image's size, white = repaint, or pixels of the
        image, which may reach beyond it: box:LEFT,TOP,RIGHT,BOTTOM or polygon:X,Y X,Y X,Y ...
      results: how many an image gets, with labels in turn, each of its own noise; 0 for one per
        label.
      strength: of an edit, from 0 (the image) to 1 (a new one).
      source_label: what the image shows; an edit then starts from the inverted image instead of
        one mixed with noise; "" for noise.
      source_prompt: the same, for a model of texts.
      inversion: schedule from the image to its noise, of E, H, P and A.
      tries: how often each step of inpainting or removing is made, to fit the new part in.
      soften: pixels around a mask over which both pictures are blended.
      margin: pixels (of the model's image) that a mask to remove is widened by; a 64th of the side,
        rounded up, if not set.
    """

    model_dir: str
    schedule: str
    baseline: str = ""
    seed: int = 0
    seeds: str = ""
    samples: int | None = None
    shown: int = 60
    columns: int = 10
    batch_size: int = 250
    guidance: str = ""
    guidance_scale: float | None = None
    guidance_interval: str = ""
    labels: str = ""
    prompt: str = ""
    prompts_file: str = ""
    negative_prompt: str = ""
    image_size: str = ""
    data: str = ""
    dtype: str = "float32"
    quantization: str = ""
    out: str = "outputs"
    task: str = GENERATE
    image: str = ""
    mask: str = ""
    results: int = 0
    strength: float = 0.6
    source_label: str = ""
    source_prompt: str = ""
    inversion: str = INVERSION
    tries: int = 1
    soften: float = 0.0
    margin: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(("shown", "columns", "batch_size"), 1)
        if self.samples is not None:
            self.check_range(("samples",), 1)
        self.check_range(("seed",), 0, 2**32)
        self.check_choice("guidance", ("", *MODES))
        self.check_choice("data", ("", "digits"))
        self.check_choice("quantization", ("", *KINDS))
        if self.data and self.samples == 1:
            raise InputError("scores need at least 2 samples; raise samples, or set data to ''")
        network_dtype(self.dtype)
        check_interval(self.guidance_interval or None)
        for text in self.schedules:
            if text not in PRESET_NAMES:
                Schedule.parse(text)
        self._check_texts()
        self._check_task()

    def _check_texts(self) -> None:
        _ = self.each_seed, self.size
        if self.prompt and self.prompts_file:
            raise InputError("config keys prompt and prompts_file are both set; leave one out")
        if self.prompt and not self.prompts:
            raise InputError(f"config key prompt is {self.prompt!r}, which has no text; give one")
        if self.negative_prompt and not (self.prompt or self.prompts_file):
            raise InputError(
                "config key negative_prompt is set, but guidance leads from it to a prompt; set "
                "prompt or prompts_file, too"
            )
        for text, classes in zip(("prompt", "source_prompt"), OF_CLASSES, strict=True):
            if getattr(self, text) and getattr(self, classes):
                raise InputError(f"config keys {text} and {classes} are both set; leave one out")

    def _check_task(self) -> None:
        self.check_choice("task", (GENERATE, *OF_IMAGES))
        self.check_range(("results", "soften", "strength"), 0)
        self.check_range(("tries",), 1)
        if self.margin is not None:
            self.check_range(("margin",), 0)
        if self.strength > 1:
            raise InputError(
                f"config key strength is {self.strength:g}; it must lie in [0, 1], 0 being the "
                "image and 1 a new one"
            )
        Schedule.parse(self.inversion)
        self._refuse_unused()
        if self.task != GENERATE and not self.image:
            raise InputError(f"to {self.task}, give an image: --config.image=FILE")
        if self.task in MASKED and not self.mask:
            raise InputError(
                f"to {self.task}, give a mask: --config.mask=FILE, or box:LEFT,TOP,RIGHT,BOTTOM"
            )

    def _refuse_unused(self) -> None:
        """Refuses what is set for another task, because a user would wait for its effect."""
        for field in dataclasses.fields(self):
            tasks = TASKS_OF.get(field.name, (self.task,))
            if self.task not in tasks and getattr(self, field.name) != field.default:
                raise InputError(
                    f"config key {field.name} is set, but task {self.task!r} has no use for it; it "
                    f"is for {', '.join(tasks)}"
                )
        source = self.source_label or self.source_prompt
        if self.task == "edit" and self.inversion != INVERSION and not source:
            raise InputError(
                "config key inversion is set, but an edit inverts only if it knows what the image "
                "shows; set source_label (or source_prompt), too"
            )

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules to sample with, the baseline first."""
        others = [text.strip() for text in self.baseline.split(",") if text.strip()]
        return (*others, self.schedule)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts that prompt lists."""
        return tuple(text.strip() for text in self.prompt.split("|") if text.strip())

    @property
    def each_seed(self) -> tuple[int, ...]:
        """The numbers that seeds lists; none where seed counts.

        Raises:
          InputError: they are no such numbers.
        """
        words = [word.strip() for word in self.seeds.split(",")] if self.seeds else []
        if not all(re.fullmatch(r"\d{1,10}", word, re.ASCII) for word in words) or any(
            int(word) >= 2**32 for word in words
        ):
            raise InputError(
                f"config key seeds is {self.seeds!r}; give whole numbers from 0 to {2**32 - 1} "
                "with commas between, such as 3,14,15"
            )
        return tuple(map(int, words))

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that image_size says; None for the model's own.

        Raises:
          InputError: it says something else.
        """
        return None if not self.image_size else size_of(self.image_size, "config key image_size")


def size_of(text: str, what: str) -> tuple[int, int]:
    """Height and width of a text such as "512x768", or "512" for a square.

    Args:
      text: the text.
      what: it is, for a message.

    Raises:
      InputError: it is no size.
    """
    if (found := SIZE.fullmatch(text.strip())) is None:
        raise InputError(f"{what} is {text!r}; give HEIGHTxWIDTH in pixels, such as 512x768")
    height, width = found.groups()
    return int(height), int(width or height)
