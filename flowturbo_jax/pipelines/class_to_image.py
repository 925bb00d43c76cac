"""From labels to images: condition, noise, sampler and decoding as one compiled program."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from flowturbo_jax import model_directory, parallel, path
from flowturbo_jax.interfaces import ImageBytes, InputError, Latents
from flowturbo_jax.model_directory import Model
from flowturbo_jax.pipelines import program_cache, programs
from flowturbo_jax.pipelines.plan import Plan, resolve
from flowturbo_jax.pipelines.requests import (
    check_batch_size,
    check_images,
    check_labels,
    check_latents,
    check_noise,
    seeds_and_indices,
)
from flowturbo_jax.quantization import cast, check_kind, quantize
from flowturbo_jax.schedule import Schedule

ENCODING = np.uint32(0x9E3779B9)
GuidanceInterval = tuple[float, float] | str | jax.Array | None
ClassLabels = Sequence[int | str] | np.ndarray | jax.Array


class ClassToImage:
    """Images of given classes from a model directory.

    Nothing recompiles for other weights, seeds, labels, guidance scales or intervals: a program
    belongs to (networks, schedule, guidance mode, whether there is an interval, batch size) alone.
    Scale 1 is mode "none", which evaluates one branch.

    Attributes:
      model: the loaded model.
      params: the predictor's and the refiner's parameters (or None) on the device, in the dtype the
        networks compute in.
    """

    def __init__(self, model: Model, say: Callable[[str], Any] = logging.info):
        self.model = model
        self._say = say
        # Networks cast each kernel to their dtype before they use it: cast once, they are smaller.
        self.params = cast((model.predictor_params, model.refiner_params), model.predictor.dtype)
        # The VAE's group norms want their parameters in float32.
        vae = model.vae_params or {}
        self._decoder = jax.tree.map(jnp.asarray, {k: v for k, v in vae.items() if k == "decoder"})
        self._ready: dict[Any, Callable[..., ImageBytes]] = {}  # compiled programs
        self._ready_for: Any = None  # these parameters
        self._mapped: dict[Any, Callable[..., Any]] = {}  # programs over all devices
        self._replicated: Any = None  # the parameters on each of them

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: str = "float32",
        quantization: str | None = None,
        say: Callable[[str], Any] = logging.info,
    ) -> "ClassToImage":
        """Loads a model directory, or a shipped model by its name ("digits").

        Args:
          directory: path or shipped name.
          dtype: of the networks' matrix products and of their parameters on the device, "float32"
            or "bfloat16"; x stays float32.
          quantization: "int8" or "fp8" for the matrix products of the transformer blocks, where the
            device is faster at them or memory is short; needs qwix (docs/speed.md). None for dtype.
          say: is told, in a line, what is compiled and how long that took.

        Raises:
          InputError: the directory is missing, damaged, or does not fit its description.
        """
        check_kind(quantization)
        with program_cache.preparing():
            model = model_directory.load(directory, dtype)
        return cls(model if quantization is None else quantize(model, quantization), say)

    def __call__(
        self,
        labels: ClassLabels,
        *,
        seeds: int | Sequence[int] | np.ndarray = 0,
        first_index: int = 0,
        schedule: str | Schedule | None = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
        batch_size: int | None = None,
    ) -> ImageBytes:
        """Samples one image per label.

        Image i depends on its label and noise alone, and its noise on (seed, index) alone.

        Args:
          labels: `[B]`, class numbers, or names such as "golden retriever".
          seeds: one seed for all, whose images have the indices first_index, first_index + 1, ...;
            or one seed per image, each the first image of its seed.
          first_index: where the indices of a single seed start, to continue an earlier batch.
          schedule: which block makes each step, or "fast", "balanced" or "best" where the model
            was tuned, which also says how to guide; H1P5R3 if None.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.
          batch_size: images computed at a time, all if None. The last batch is filled up and cut,
            so other numbers of labels compile nothing.

        Returns:
          Images `[B, H, W, C]` uint8.

        Raises:
          InputError: a label, seed, schedule, guidance or batch size the model cannot take.
        """
        self._check_shows_images()
        labels = check_labels(labels, self.model.description)
        seeds, indices = seeds_and_indices(seeds, first_index, len(labels))
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        if batch_size is not None:
            check_batch_size(batch_size)
        count = len(labels)
        if batch_size is None or batch_size == count:
            return self._sample_images(seeds, indices, labels, plan)
        labels = np.asarray(labels)
        parts = []
        for first in range(0, count, batch_size):
            rows = np.minimum(np.arange(first, first + batch_size), count - 1)
            made = self._sample_images(seeds[rows], indices[rows], labels[rows], plan)
            parts.append(np.asarray(made))
        return jax.device_put(np.concatenate(parts)[:count])

    def compile(
        self,
        batch_size: int,
        *,
        schedule: str | Schedule | None = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> None:
        """Compiles the program of a batch size, so that no later `__call__` of it waits for that.

        Args:
          batch_size: number of labels of the calls, or their `batch_size`.
          schedule: as in `__call__`, as are the rest.
          guidance_scale: any; it matters only where it turns guidance on.
          guidance: "paired", "official" or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.

        Raises:
          InputError: as `__call__`.
        """
        check_batch_size(batch_size)
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        seeds, indices = seeds_and_indices(0, 0, batch_size)
        self._program(plan, self._arguments(seeds, indices, np.zeros(batch_size, np.int32), plan))

    def on_all_devices(self, plan: Plan) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
        """The sampler over all devices of this process, for measurements.

        Args:
          plan: how to sample.

        Returns:
          `(seeds [B], indices [B], labels [B]) -> (images [B, H, W, C] uint8, finite [B] bool)`;
          B has to split evenly over the devices.
        """
        static, given = self._static(plan), plan.arguments
        selected = (plan.schedule, plan.guidance, plan.interval is None)
        if selected not in self._mapped:

            def share(frozen: Any, batch: Any) -> Any:
                (params, decoder), given = frozen
                return programs.generate(params, decoder, *batch, *given, **static)

            self._mapped[selected] = parallel.map_batch(share)
        mapped = self._mapped[selected]
        if self._replicated is None:
            self._replicated = parallel.replicate((self.params, self._decoder))
        frozen = (self._replicated, parallel.replicate(given))
        return lambda seeds, indices, labels: mapped(frozen, (seeds, indices, labels))

    def _sample_images(self, seeds: Any, indices: Any, labels: Any, plan: Plan) -> ImageBytes:
        arguments = self._arguments(seeds, indices, labels, plan)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        if traced or not program_cache.on_default_device(arguments[2:]):
            return programs.sample_images(*arguments, **self._static(plan))
        return self._program(plan, arguments)(*arguments)

    def _arguments(self, seeds: Any, indices: Any, labels: Any, plan: Plan) -> tuple[Any, ...]:
        return (self.params, self._decoder, seeds, indices, labels, *plan.arguments)

    def _program(self, plan: Plan, arguments: tuple[Any, ...]) -> Callable[..., ImageBytes]:
        """The compiled program that takes these arguments; made, or loaded, where it is new."""
        static, batch_size = self._static(plan), len(arguments[2])
        selected = (plan.schedule, plan.guidance, plan.interval is None, batch_size)
        if self._ready_for is not self.params:  # they may have another dtype or device now
            self._ready, self._ready_for = {}, self.params
        if selected not in self._ready:
            what = f"{plan.schedule} for a batch of {batch_size}"
            self._say(f"preparing {what} ...")
            begin = time.perf_counter()
            networks = (self.model.predictor, self.model.refiner, self.model.vae)
            if program_cache.can_store(arguments, networks):
                key = {"function": "generate", **static}
                made = partial(programs.generate_images, **static)
                self._ready[selected] = program_cache.program(made, arguments, key)
            else:
                programs.sample_images.lower(*arguments, **static).compile()
                self._ready[selected] = partial(programs.sample_images, **static)
            self._say(f"{what}: ready after {time.perf_counter() - begin:.1f} s")
        return self._ready[selected]

    def _static(self, plan: Plan) -> dict[str, Any]:
        """What selects a program, beside the shapes."""
        return {
            "networks": programs.Networks(self.model),
            "schedule": plan.schedule,
            "guidance": plan.guidance,
        }

    def sample_latents(
        self,
        noise: Latents,
        labels: ClassLabels,
        *,
        schedule: str | Schedule | None = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> Latents:
        """Samples latents from given noise.

        Args:
          noise: `[B, H, W, C]` float32, the model's latent shape.
          labels: as in `__call__`, as are the rest.
          schedule: as in `__call__`, as are the rest.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.

        Returns:
          Latents `[B, H, W, C]` float32.

        Raises:
          InputError: as `__call__`, or the noise is of another shape.
        """
        noise = jnp.asarray(noise)
        check_noise(noise, self.model.description)
        labels = check_labels(labels, self.model.description)
        if len(labels) != len(noise):
            raise InputError(f"{len(labels)} labels for {len(noise)} noises; one each is needed")
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        start = (self.params, noise, labels)
        return programs.sample_latents(*start, *plan.arguments, **self._static(plan))

    def encode(self, images: ImageBytes | np.ndarray, seed: int | None = None) -> Latents:
        """The latents of images, of which those of one size share a program.

        Args:
          images: `[B, H, W, C]` uint8; above 512 x 512 the VAE encodes them in tiles.
          seed: draw from the encoder's distribution with the noise of (seed, i); its mean if None.

        Returns:
          Latents `[B, H / f, W / f, C']` float32, scaled as the predictor wants them.

        Raises:
          InputError: the images are no such array, or the sides are not divisible by the VAE's f.
        """
        images, vae = jnp.asarray(images), self.model.vae
        check_images(images, self.model.description)
        noise = None
        if seed is not None and vae is not None:
            seeds, indices = seeds_and_indices(seed, 0, len(images))
            seeds = seeds ^ ENCODING  # not the noise that image i of this seed is sampled from
            factor = vae.config.downsampling
            height, width = (side // factor for side in images.shape[1:3])
            shape = (height, width, vae.config.latent_channels)
            noise = path.sample_noise(jnp.asarray(seeds), jnp.asarray(indices), shape)
        encoder = {} if vae is None else {"encoder": self.model.vae_params["encoder"]}
        return programs.encode(encoder, images, noise, networks=programs.Networks(self.model))

    def decode(self, latents: Latents) -> ImageBytes:
        """The images of latents, of which those of one size share a program.

        Args:
          latents: `[B, H, W, C]` float32, as `sample_latents` gives them; above 64 x 64 the VAE
            decodes them in tiles.

        Returns:
          Images `[B, H f, W f, C']` uint8.

        Raises:
          InputError: the latents are no such array.
        """
        self._check_shows_images()
        latents = jnp.asarray(latents)
        check_latents(latents, self.model.description)
        return programs.decode(self._decoder, latents, networks=programs.Networks(self.model))

    def check(
        self,
        labels: ClassLabels,
        schedule: str | Schedule,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> None:
        """Refuses what `__call__` would refuse, without sampling.

        Raises:
          InputError: a label, schedule or guidance the model cannot take.
        """
        self._check_shows_images()
        check_labels(labels, self.model.description)
        self.plan(schedule, guidance_scale, guidance, guidance_interval)

    def plan(
        self,
        schedule: str | Schedule | None = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> Plan:
        """How a call with these arguments samples: each one given, or the model's own.

        Raises:
          InputError: the model cannot be sampled so.
        """
        description = self.model.description
        return resolve(description, schedule, guidance_scale, guidance, guidance_interval)

    def _check_shows_images(self) -> None:
        channels = self.model.description.image_shape[-1]
        if self.model.vae is None and channels not in (1, 3):
            raise InputError(
                f"this model moves latents of {channels} channels and has no VAE to decode them: "
                "convert it again with --vae, or use sample_latents"
            )
