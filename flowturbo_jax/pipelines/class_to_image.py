"""From labels to images: condition, noise, sampler and decoding as one compiled program."""

import numbers
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import guidance as guide
from flowturbo_jax import images, model_directory, path, sampler
from flowturbo_jax.interfaces import Flow, ImageBytes, InputError, Labels, Latents
from flowturbo_jax.model_directory import Model
from flowturbo_jax.schedule import Schedule

DEFAULT_SCHEDULE = "H1P5R3"  # the paper's fastest on ImageNet


class ClassToImage:
    """Images of given classes from a model directory.

    Nothing recompiles for other weights, seeds, labels or guidance scales: a program belongs to
    (networks, schedule, guidance mode, batch size) alone.

    Attributes:
      model: the loaded model.
    """

    def __init__(self, model: Model):
        self.model = model
        self._params = jax.tree.map(jnp.asarray, (model.predictor_params, model.refiner_params))

    @classmethod
    def load(cls, directory: str | Path, dtype: str = "float32") -> "ClassToImage":
        """Loads a model directory, or a shipped model by its name ("digits").

        Args:
          directory: path or shipped name.
          dtype: of the networks' matrix products, "float32" or "bfloat16"; x stays float32.

        Raises:
          InputError: the directory is missing, damaged, or does not fit its description.
        """
        return cls(model_directory.load(directory, dtype))

    def __call__(
        self,
        labels: Sequence[int] | np.ndarray | jax.Array,
        *,
        seeds: int | Sequence[int] | np.ndarray = 0,
        first_index: int = 0,
        schedule: str | Schedule = DEFAULT_SCHEDULE,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
    ) -> ImageBytes:
        """Samples one image per label.

        Image i depends on its label and noise alone, and its noise on (seed, index) alone.

        Args:
          labels: `[B]` int, class numbers.
          seeds: one seed for all, whose images have the indices first_index, first_index + 1, ...;
            or one seed per image, each the first image of its seed.
          first_index: where the indices of a single seed start, to continue an earlier batch.
          schedule: which block makes each step.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" or "none"; the model's default if None.

        Returns:
          Images `[B, H, W, C]` uint8.

        Raises:
          InputError: a label, seed, schedule or guidance the model cannot take.
        """
        labels = self._check_labels(labels)
        seeds, indices = _seeds_and_indices(seeds, first_index, len(labels))
        static, scale = self._settings(schedule, guidance_scale, guidance)
        return _sample_images(self._params, seeds, indices, labels, scale, **static)

    def sample_latents(
        self,
        noise: Latents,
        labels: Sequence[int] | np.ndarray | jax.Array,
        *,
        schedule: str | Schedule = DEFAULT_SCHEDULE,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
    ) -> Latents:
        """Samples latents from given noise.

        Args:
          noise: `[B, H, W, C]` float32, the model's latent shape.
          labels: as in `__call__`, as are the rest.
          schedule: which block makes each step.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" or "none"; the model's default if None.

        Returns:
          Latents `[B, H, W, C]` float32.

        Raises:
          InputError: as `__call__`, or the noise is of another shape.
        """
        shape = self.model.description.predictor.shape
        noise = jnp.asarray(noise)
        if noise.ndim != 4 or noise.shape[1:] != shape or noise.dtype != jnp.float32:
            height, width, channels = shape
            raise InputError(
                f"noise is {noise.dtype}{list(noise.shape)}; this model wants "
                f"float32[B, {height}, {width}, {channels}]"
            )
        labels = self._check_labels(labels)
        if len(labels) != len(noise):
            raise InputError(f"{len(labels)} labels for {len(noise)} noises; one each is needed")
        static, scale = self._settings(schedule, guidance_scale, guidance)
        return _sample_latents(self._params, noise, labels, scale, **static)

    def check(
        self,
        labels: Sequence[int] | np.ndarray,
        schedule: str | Schedule,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
    ) -> None:
        """Refuses what `__call__` would refuse, without sampling.

        Raises:
          InputError: a label, schedule or guidance the model cannot take.
        """
        self._check_labels(labels)
        self._settings(schedule, guidance_scale, guidance)

    def _check_labels(self, labels: Any) -> Labels | None:
        """Labels as an array; JAX would silently clamp those out of range."""
        if isinstance(labels, jax.core.Tracer):
            return labels
        classes = self.model.description.predictor.num_classes
        labels = np.asarray(labels)
        if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
            raise InputError(
                f"labels are {labels.dtype}{list(labels.shape)}; wanted is a list of class numbers"
            )
        wrong = labels[(labels < 0) | (labels >= max(classes, 1))]
        if len(wrong):
            raise InputError(
                f"label {wrong[0]} is out of range; this model has "
                + (f"the classes 0 to {classes - 1}" if classes else "no classes: use label 0")
            )
        return jnp.asarray(labels, jnp.int32)

    def _settings(
        self, schedule: str | Schedule, scale: float | jax.Array | None, mode: str | None
    ) -> tuple[dict[str, Any], jax.Array]:
        """What selects a program, and the guidance scale as its argument."""
        schedule = Schedule.parse(schedule)
        if schedule.needs_refiner and self.model.refiner is None:
            raise InputError(
                f"schedule {schedule} refines, but this model has no refiner; take a schedule of "
                "E, H and P, or train one with train.py"
            )
        mode, scale = self.resolve_guidance(mode, scale)
        static = {
            "networks": _Networks(self.model),
            "schedule": schedule,
            "guidance": mode,
        }
        return static, jnp.asarray(scale, jnp.float32)

    def resolve_guidance(
        self, mode: str | None = None, scale: Any = None
    ) -> tuple[str, float | jax.Array]:
        """The guidance mode and scale that a call with these arguments uses.

        Args:
          mode: "paired", "official" or "none"; the model's default if None, but "paired" where
            that is "none" and a scale is given.
          scale: a number, also as a traced or concrete array `[]`; the model's default if None.

        Returns:
          Mode and scale; the scale of "none" is 1.

        Raises:
          InputError: the model cannot be guided, or not so.
        """
        description = self.model.description
        can_guide = description.predictor.null_label is not None
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


class _Networks:
    """The static part of a model, equal and hashed by what the programs depend on."""

    def __init__(self, model: Model):
        self.predictor, self.refiner = model.predictor, model.refiner
        self.config = model.description.predictor
        self.guided_channels = model.description.guided_channels
        self._key = (self.predictor, self.refiner, self.config, self.guided_channels)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Networks) and self._key == other._key


def make_flow(networks: Any, params: Any, labels: Labels, scale: jax.Array, guidance: str) -> Flow:
    """The flow of a model's networks under labels.

    Args:
      networks: has `predictor`, `refiner` (or None), `config` and `guided_channels`.
      params: parameters of both, `(predictor, refiner)`.
      labels: `[B]` int32.
      scale: guidance scale `[]` float32.
      guidance: "none", "official" or "paired".
    """
    predictor_params, refiner_params = params

    def predictor(x, t, condition):
        return networks.predictor.apply({"params": predictor_params}, x, t, condition)

    def refiner(x, v, t, condition):
        return networks.refiner.apply({"params": refiner_params}, x, v, t, condition)

    refiner = refiner if networks.refiner is not None else None
    if not networks.config.num_classes:
        return guide.unguided(predictor, refiner, None)
    if guidance == "none":
        return guide.unguided(predictor, refiner, labels)
    null = jnp.full_like(labels, networks.config.null_label)
    if guidance == "paired":
        return guide.paired(predictor, refiner, labels, null, scale)
    return guide.official(predictor, refiner, labels, null, scale, networks.guided_channels)


@partial(jax.jit, static_argnames=("networks", "schedule", "guidance"))
def _sample_latents(params, noise, labels, scale, *, networks, schedule, guidance):
    flow = make_flow(networks, params, labels, scale, guidance)
    return sampler.sample(flow, noise, schedule)


@partial(jax.jit, static_argnames=("networks", "schedule", "guidance"))
def _sample_images(params, seeds, indices, labels, scale, *, networks, schedule, guidance):
    noise = path.sample_noise(seeds, indices, networks.config.shape)
    flow = make_flow(networks, params, labels, scale, guidance)
    return images.to_uint8(sampler.sample(flow, noise, schedule))


def _seeds_and_indices(seeds: Any, first_index: int, count: int) -> tuple[jax.Array, jax.Array]:
    seeds = np.asarray(seeds)
    if seeds.dtype.kind not in "iu" or (seeds < 0).any() or (seeds >= 2**32).any():
        raise InputError(f"seeds are {seeds.tolist()}; they must be whole numbers in [0, 2^32)")
    if seeds.ndim == 0:
        indices = first_index + np.arange(count)
    elif seeds.shape == (count,):
        indices = np.zeros(count)
    else:
        raise InputError(f"{seeds.size} seeds for {count} labels; give one, or one per label")
    if (
        not isinstance(first_index, numbers.Integral)
        or first_index < 0
        or first_index + count > 2**32
    ):
        raise InputError(f"first_index is {first_index!r}; it must be a whole number in [0, 2^32)")
    seeds = np.broadcast_to(seeds, (count,))
    return jnp.asarray(seeds, jnp.uint32), jnp.asarray(indices, jnp.uint32)
