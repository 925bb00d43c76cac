"""What a training recipe may say: every key, its default, and what it may be."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowturbo_jax.guidance import MODES
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import network_dtype
from flowturbo_jax.objective import LABEL_HANDLING
from flowturbo_jax.recipe import Recipe
from flowturbo_jax.schedule import Schedule

OBJECTIVES = ("flow_matching", "refiner")
DECAYS = ("constant", "cosine")
# Keys that only the refiner objective reads.
REFINER_KEYS = (
    "model_dir",
    "teacher_dtype",
    "label_handling",
    "dt_min",
    "dt_max",
    "dt_per_sample",
    "times_inside",
)
# Keys that may differ when a run is resumed: they do not change what is computed.
FREE_KEYS = (
    "name",
    "data_threads",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "allow_config_change",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Recipe):
    """A training recipe, validated at construction; configs/ holds the ready ones.

    Attributes:
      objective: "flow_matching" trains a predictor, "refiner" a refiner of model_dir's predictor.
      data: name of the data set: digits, folder:DIR, tfds:NAME, latents:DIR or mixture:DIR; for
        models of texts digit_captions, captions:DIR, shards:PATTERN, tfds_captions:NAME or
        latents:DIR.
      image_size: side of the square images of a folder or a TFDS data set, in pixels; 0 for data
        that has its own.
      horizontal_flip: exchange left and right in half of the samples.
      unreadable_limit: fraction of the data that may be unreadable; each is named and replaced.
      data_threads: threads that read, decode and crop ahead of the training.
      model_dir: model directory of the teacher (refiner only).
      model: the network's hyper-parameters; for a predictor its family too, and instead of some
        of them a published size, such as "SiT-B/2"; for a refiner only what differs from the
        predictor's one-block refiner.
      seed: of initial parameters, data order and every random draw.
      steps: optimiser steps.
      batch_size: samples per step, over all devices of all processes.
      accumulation_steps: parts a device's share of the batch is split into, one after the other, to
        need less memory.
      learning_rate: of AdamW, at its highest.
      learning_rate_decay: "constant" or "cosine" (to 0 at the last step).
      warmup_steps: of linear rise.
      weight_decay: decoupled.
      gradient_clip: largest global norm; 0 for none.
      ema_decay: per step, of the moving average that is kept as the result.
      ema_half_life: the same in samples: after so many, half of the average is newer. It replaces
        ema_decay, and means the same for every batch_size; 0 for none.
      ema_warmup: let the average's memory grow with the run; see `train_state.ema_rate`.
      label_dropout: probability that a sample's label, or caption, is dropped.
      label_handling: (refiner) "paper" or "official"; see `objective.refiner_loss`.
      dt_min: (refiner) smallest step size the refiner is trained for, in flow time.
      dt_max: (refiner) largest.
      dt_per_sample: (refiner) draw a step size per sample; the official code draws one per batch.
      times_inside: (refiner) scale t so that t + dt <= 1; the official code does not.
      dtype: of the trained network's matrix products; its parameters stay float32.
      teacher_dtype: (refiner) of the teacher's matrix products and parameters.
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

    objective: str
    data: str
    model: Mapping[str, Any]
    steps: int
    batch_size: int
    learning_rate: float
    model_dir: str = ""
    image_size: int = 0
    horizontal_flip: bool = False
    unreadable_limit: float = 0.001
    data_threads: int = 4
    seed: int = 0
    accumulation_steps: int = 1
    learning_rate_decay: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 0.0
    ema_decay: float = 0.9999
    ema_half_life: float = 0.0
    ema_warmup: bool = True
    label_dropout: float = 0.1
    label_handling: str = "paper"
    dt_min: float = 0.0
    dt_max: float = 0.12
    dt_per_sample: bool = True
    times_inside: bool = True
    dtype: str = "float32"
    teacher_dtype: str = "float32"
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
        super().__post_init__()
        self.check_choice("objective", OBJECTIVES)
        self.check_choice("learning_rate_decay", DECAYS)
        self.check_choice("label_handling", LABEL_HANDLING)
        self.check_choice("guidance", MODES)
        counts = ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every")
        self.check_range((*counts, "evaluation_size", "accumulation_steps", "data_threads"), 1)
        self.check_range(("weight_decay", "gradient_clip", "ema_half_life", "image_size"), 0)
        self.check_range(("ema_decay", "label_dropout", "unreadable_limit"), 0, 1)
        self.check_range(("seed",), 0, 2**32)
        self.check_range(("guidance_scale",), -1e6, 1e6)
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(
                f"config key warmup_steps is {self.warmup_steps}; it must be at least 0 and below "
                f"steps, which is {self.steps}"
            )
        if not self.learning_rate > 0:
            raise InputError(f"config key learning_rate is {self.learning_rate}; take more than 0")
        if not 0 <= self.dt_min < self.dt_max < 1:
            raise InputError(
                f"config keys dt_min {self.dt_min} and dt_max {self.dt_max} must rise within [0, 1)"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if self.ema_half_life and self.ema_decay != defaults["ema_decay"]:
            raise InputError("config keys ema_decay and ema_half_life mean the same; give one")
        network_dtype(self.dtype)
        network_dtype(self.teacher_dtype)
        schedule = Schedule.parse(self.schedule)
        if schedule.learnt:
            raise InputError(
                f"config key schedule is {schedule}, which is learnt for a model that is trained; "
                "sample on the way with one such as H1P5R3"
            )
        if self.objective == "refiner":
            if not self.model_dir:
                raise InputError("the refiner objective needs model_dir, that of its teacher")
            return
        if schedule.needs_refiner:
            raise InputError(f"schedule {schedule} refines, but a predictor is trained; use H or P")
        for key in REFINER_KEYS:
            if getattr(self, key) != defaults[key]:
                raise InputError(f"config key {key} belongs to the refiner objective; leave it out")

    @property
    def step_decay(self) -> float:
        """Decay of the moving average in one step."""
        if self.ema_half_life:
            return 0.5 ** (self.batch_size / self.ema_half_life)
        return self.ema_decay


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two recipes among the keys that change what is computed."""
    # A key that an older version did not have is as it is by default.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    old, new = {**defaults, **old}, {**defaults, **new}
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_KEYS and old.get(key) != new.get(key)
    ]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
