"""What a training recipe may say: every key, its default, and what it may be."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from flowturbo_jax.guidance import MODES
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import network_dtype
from flowturbo_jax.objective import LABEL_HANDLING
from flowturbo_jax.schedule import Schedule

OBJECTIVES = ("flow_matching", "refiner")
DECAYS = ("constant", "cosine")
# Keys that may differ when a run is resumed: they do not change what is computed.
FREE_KEYS = ("name", "log_every", "evaluate_every", "checkpoint_every", "allow_config_change")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training recipe, validated at construction; configs/ holds the ready ones.

    Attributes:
      name: of the recipe, and of its folder in runs/.
      objective: "flow_matching" trains a predictor, "refiner" a refiner of model_dir's predictor.
      data: name of the data set, as `data.open_source` takes it.
      model_dir: model directory of the teacher (refiner only).
      model: the network's hyper-parameters; for a predictor its family too, for a refiner only
        what differs from the predictor's one-block refiner.
      seed: of initial parameters, data order and every random draw.
      steps: optimiser steps.
      batch_size: samples per step, over all devices.
      learning_rate: of AdamW, at its highest.
      learning_rate_decay: "constant" or "cosine" (to 0 at the last step).
      warmup_steps: of linear rise.
      weight_decay: decoupled.
      gradient_clip: largest global norm; 0 for none.
      ema_decay: per step.
      ema_warmup: let the average's memory grow with the run; see `train_state.ema_rate`.
      label_dropout: probability that a sample's label is dropped.
      label_handling: "paper" or "official"; see `objective.refiner_loss`.
      dt_min: smallest step size the refiner is trained for, in flow time.
      dt_max: largest.
      dt_per_sample: draw a step size per sample; the official code draws one per batch.
      times_inside: scale t so that t + dt <= 1; the official code does not.
      dtype: of the networks' matrix products.
      remat: recompute blocks in the backward pass: less memory; on CPU also faster.
      schedule: of the sample grids on the way.
      guidance: of the sample grids, and the written model's default.
      guidance_scale: likewise.
      log_every: steps between lines of metrics.
      evaluate_every: steps between evaluations on the fixed batch and sample grids.
      checkpoint_every: steps between checkpoints.
      evaluation_size: samples in the fixed batch.
      allow_config_change: resume although the recipe changed.
    """

    name: str
    objective: str
    data: str
    model: Mapping[str, Any]
    steps: int
    batch_size: int
    learning_rate: float
    model_dir: str = ""
    seed: int = 0
    learning_rate_decay: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 0.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    label_dropout: float = 0.1
    label_handling: str = "paper"
    dt_min: float = 0.0
    dt_max: float = 0.12
    dt_per_sample: bool = True
    times_inside: bool = True
    dtype: str = "float32"
    remat: bool = False
    schedule: str = "H8"
    guidance: str = "paired"
    guidance_scale: float = 1.5
    log_every: int = 100
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    evaluation_size: int = 512
    allow_config_change: bool = False

    def __post_init__(self):
        choices = {
            "objective": OBJECTIVES,
            "learning_rate_decay": DECAYS,
            "label_handling": LABEL_HANDLING,
            "guidance": MODES,
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise InputError(
                    f"{key} is {getattr(self, key)!r}; it must be one of {', '.join(known)}"
                )
        counts = ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every")
        for key in (*counts, "evaluation_size"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("seed", "warmup_steps", "weight_decay", "gradient_clip"):
            if not getattr(self, key) >= 0:
                raise InputError(f"{key} is {getattr(self, key)}; it must not be negative")
        for key in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}; it must lie in [0, 1)")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be positive")
        if not 0 <= self.dt_min < self.dt_max < 1:
            raise InputError(
                f"dt_min {self.dt_min} and dt_max {self.dt_max} must rise within [0, 1)"
            )
        if (self.objective == "refiner") != bool(self.model_dir):
            raise InputError(
                "the refiner objective needs model_dir, the directory of its teacher, and only "
                f"it does; objective is {self.objective!r}, model_dir {self.model_dir!r}"
            )
        network_dtype(self.dtype)
        Schedule.parse(self.schedule)

    @classmethod
    def create(cls, config: Mapping[str, Any] | ConfigDict) -> "TrainConfig":
        """The recipe of a plain mapping, such as a ConfigDict.

        Raises:
          InputError: a key is unknown or missing, or a value is wrong.
        """
        fields = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(fields.keys() - known):
            raise InputError(f"unknown config key {unknown[0]!r}; known are {', '.join(known)}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"the training config is wrong: {error}") from error

    def to_config_dict(self) -> ConfigDict:
        """The recipe as ml_collections' flags want it; unknown keys and types are refused there."""
        return ConfigDict(dataclasses.asdict(self))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two recipes among the keys that change what is computed."""
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_KEYS and old.get(key) != new.get(key)
    ]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
