"""What a sampling recipe may say: every key, its default, and what it may be."""

import dataclasses

from flowturbo_jax.guidance import MODES, check_interval
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import PRESET_NAMES
from flowturbo_jax.model_directory import network_dtype
from flowturbo_jax.quantization import KINDS
from flowturbo_jax.recipe import Recipe
from flowturbo_jax.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class SampleConfig(Recipe):
    """A sampling recipe, validated at construction; configs/ holds the ready ones.

    Attributes:
      model_dir: model directory, or the name of a shipped model.
      schedule: which block makes each step, or what `tune` found: "fast", "balanced" or "best".
      baseline: a second schedule to sample the same noise with and compare; "" for none.
      seed: image i is image i of this seed.
      samples: how many images each schedule makes.
      shown: how many of them the picture shows.
      columns: of the picture, images beside each other.
      batch_size: images per call.
      guidance: "paired", "official" or "none"; "" for the model's default.
      guidance_scale: the model's default if not set.
      guidance_interval: first and last flow time of guidance, such as 0.1:0.8; "" for all.
      labels: the classes to sample in turn, numbers or names with commas between; "" for all.
      data: real data to compare the samples with ("digits"); "" for no scores.
      dtype: of the networks' matrix products.
      quantization: "int8" or "fp8" for those of the transformer blocks; "" for dtype.
      out: folder the picture and the numbers are written to.
    """

    model_dir: str
    schedule: str
    baseline: str = ""
    seed: int = 0
    samples: int = 60
    shown: int = 60
    columns: int = 10
    batch_size: int = 250
    guidance: str = ""
    guidance_scale: float | None = None
    guidance_interval: str = ""
    labels: str = ""
    data: str = ""
    dtype: str = "float32"
    quantization: str = ""
    out: str = "outputs"

    def __post_init__(self):
        super().__post_init__()
        self.check_range(("samples", "shown", "columns", "batch_size"), 1)
        self.check_range(("seed",), 0, 2**32)
        self.check_choice("guidance", ("", *MODES))
        self.check_choice("data", ("", "digits"))
        self.check_choice("quantization", ("", *KINDS))
        if self.data and self.samples < 2:
            raise InputError("scores need at least 2 samples; raise samples, or set data to ''")
        network_dtype(self.dtype)
        check_interval(self.guidance_interval or None)
        for text in self.schedules:
            if text not in PRESET_NAMES:
                Schedule.parse(text)

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules to sample with, the baseline first."""
        return (self.baseline, self.schedule) if self.baseline else (self.schedule,)
