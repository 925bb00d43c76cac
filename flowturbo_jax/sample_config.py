"""What a sampling recipe may say: every key, its default, and what it may be."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import network_dtype
from flowturbo_jax.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """A sampling recipe, validated at construction; configs/ holds the ready ones.

    Attributes:
      name: of the recipe, and of the files it writes.
      model_dir: model directory, or the name of a shipped model.
      schedule: which block makes each step.
      baseline: a second schedule to sample the same noise with and compare; "" for none.
      seed: image i is image i of this seed.
      samples: how many images each schedule makes.
      shown: how many of them the picture shows.
      batch_size: images per call.
      guidance: "paired", "official" or "none"; "" for the model's default.
      guidance_scale: the model's default if not set.
      label: the class to sample; all in turn if not set.
      data: real data to compare the samples with ("digits"); "" for no scores.
      dtype: of the networks' matrix products.
      out: folder the picture and the numbers are written to.
    """

    name: str
    model_dir: str
    schedule: str
    baseline: str = ""
    seed: int = 0
    samples: int = 64
    shown: int = 64
    batch_size: int = 250
    guidance: str = ""
    guidance_scale: float | None = None
    label: int | None = None
    data: str = ""
    dtype: str = "float32"
    out: str = "outputs"

    def __post_init__(self):
        for key in ("samples", "shown", "batch_size"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it must lie in [0, 2^32)")
        if self.data not in ("", "digits"):
            raise InputError(f"data is {self.data!r}; there are scores for 'digits' only, or ''")
        if self.data and self.samples < 2:
            raise InputError("scores need at least 2 samples; raise samples, or set data to ''")
        network_dtype(self.dtype)
        for text in self.schedules:
            Schedule.parse(text)

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules to sample with, the baseline first."""
        return (self.baseline, self.schedule) if self.baseline else (self.schedule,)

    @classmethod
    def create(cls, config: Mapping[str, Any] | ConfigDict) -> "SampleConfig":
        """The recipe of a plain mapping, such as a ConfigDict.

        Raises:
          InputError: a key is unknown or missing, or a value is wrong.
        """
        fields = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(fields.keys() - set(known)):
            raise InputError(f"unknown config key {unknown[0]!r}; known are {', '.join(known)}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"the sampling config is wrong: {error}") from error

    def to_config_dict(self) -> ConfigDict:
        """The recipe as ml_collections' flags want it; unknown keys and types are refused there."""
        fields = dataclasses.asdict(self)
        types = {"guidance_scale": float, "label": int}
        return ConfigDict(
            {
                key: config_dict.placeholder(types[key]) if value is None else value
                for key, value in fields.items()
            }
        )
