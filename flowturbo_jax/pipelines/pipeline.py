"""A loaded model: its parameters on the device, its compiled programs, and its autoencoder."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from flowturbo_jax import model_directory, parallel, path, solver_files
from flowturbo_jax.interfaces import ImageBytes, InputError, Latents
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.model_directory import Model
from flowturbo_jax.pipelines import program_cache, programs
from flowturbo_jax.pipelines.plan import Plan, WantedSchedule, resolve
from flowturbo_jax.pipelines.requests import (
    check_batch_size,
    check_images,
    check_latents,
    seeds_and_indices,
)
from flowturbo_jax.quantization import cast, check_kind, quantize
from flowturbo_jax.schedule import Schedule

ENCODING = np.uint32(0x9E3779B9)
Kind = TypeVar("Kind")  # of pipeline
GuidanceInterval = tuple[float, float] | str | jax.Array | None
ClassLabels = Sequence[int | str] | np.ndarray | jax.Array
Wanted = ClassLabels | str  # classes by number or name; or texts, or their tokens


class Pipeline:
    """What all that is done with a model shares.

    Nothing recompiles for other weights, seeds, labels, guidance scales or intervals: a program
    belongs to (task, networks, schedule, that of an inversion, guidance mode, whether there is an
    interval, number of tries, batch size) alone. Scale 1 is mode "none": one branch.

    Attributes:
      model: the loaded model.
      params: the predictor's and the refiner's parameters (or None) on the device, in the dtype the
        networks compute in; then those of a text encoder, if there is one.
    """

    takes_text = False

    def __init__(self, model: Model, say: Callable[[str], Any] = logging.info):
        self.model = model
        self._say = say
        # Networks cast each kernel to their dtype before they use it: cast once, they are smaller.
        self.params = cast((model.predictor_params, model.refiner_params), model.predictor.dtype)
        if model.text_encoder is not None:
            self.params += (jax.tree.map(jnp.asarray, model.text_encoder_params),)
        # The VAE's group norms want their parameters in float32.
        self._decoder = self._vae_part("decoder")
        self._encoder: Any = None  # on the device once it is needed
        self._solvers: dict[Schedule, LearntSolver] = {}
        self._ready: dict[Any, Callable[..., Any]] = {}  # compiled programs
        self._ready_for: Any = None  # these parameters
        self._mapped: dict[Any, Callable[..., Any]] = {}  # programs over all devices
        self._replicated: Any = None  # the parameters on each of them

    @classmethod
    def load(
        cls: type[Kind],
        directory: str | Path,
        dtype: str = "float32",
        quantization: str | None = None,
        say: Callable[[str], Any] = logging.info,
    ) -> Kind:
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
        if model_directory.describe(directory).takes_text != cls.takes_text:
            right = "ClassToImage" if cls.takes_text else "TextToImage"
            raise InputError(f"{directory} is no model for {cls.__name__}; load it as {right}")
        with program_cache.preparing():
            model = model_directory.load(directory, dtype)
        return cls(model if quantization is None else quantize(model, quantization), say)

    def rows(self, wanted: Any) -> Any:
        """What programs are given of what is wanted, one row per image, after checking it.

        Args:
          wanted: `[B]` labels, or texts.

        Raises:
          InputError: the model cannot take it.
        """
        raise NotImplementedError

    def placeholders(self, count: int) -> np.ndarray:
        """Any rows that the model can take, to compile with."""
        raise NotImplementedError

    def _no_rows(self, count: int) -> np.ndarray:
        """Rows that ask for nothing in particular; InputError if the model knows none."""
        raise NotImplementedError

    def plan(
        self,
        schedule: WantedSchedule = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> Plan:
        """How a call with these arguments samples: each one given, or the model's own.

        Raises:
          InputError: the model cannot be sampled so.
        """
        description = self.model.description
        asked = (schedule, guidance_scale, guidance, guidance_interval)
        return resolve(description, *asked, self.solver)

    def solver(self, schedule: Schedule) -> LearntSolver:
        """The model's own solver of a learnt schedule, read once.

        Raises:
          InputError: it has none, it was learnt for other weights, or its file is not consistent.
        """
        if schedule not in self._solvers:
            if self.model.directory is None:
                raise InputError(f"this model lies in no directory, so it has no solver {schedule}")
            found = solver_files.of_model(
                self.model.directory, schedule, not self.model.description.takes_text
            )
            found.check_model(self.model.fingerprints)
            self._solvers[schedule] = found
        return self._solvers[schedule]

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
        networks = programs.Networks(self.model)
        return programs.encode(self._encoder_params(), images, noise, networks=networks)

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

    def _run(
        self, task: Callable[..., Any], plan: Plan, arguments: tuple[Any, ...], **more: Any
    ) -> Any:
        """Calls the program of a task.

        Args:
          task: a jitted function of `programs` or `edit_programs`.
          plan: how to sample.
          arguments: of the task: parameters of the networks and of the VAE, then arrays.
          **more: of the task, static, beside those of every plan.
        """
        static = self._static(plan) | more
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        if traced or not program_cache.on_default_device(arguments[2:]):
            return task(*arguments, **static)
        return self._program(task, arguments, static)(*arguments)

    def _program(
        self, task: Callable[..., Any], arguments: tuple[Any, ...], static: Mapping[str, Any]
    ) -> Callable[..., Any]:
        """The compiled program that takes these arguments; made, or loaded, where it is new."""
        if self._ready_for is not self.params:  # they may have another dtype or device now
            self._ready, self._ready_for = {}, self.params
        leaves, tree = jax.tree.flatten(arguments[2:])
        chosen = tuple(value for name, value in static.items() if name != "networks")
        selected = (task, chosen, tree, tuple(map(np.shape, leaves)))
        if selected not in self._ready:
            what = f"{static['schedule']} for a batch of {len(arguments[2])}"
            self._say(f"preparing {what} ...")
            begin = time.perf_counter()
            model = self.model
            networks = (model.predictor, model.refiner, model.vae, model.text_encoder)
            if program_cache.can_store(arguments, networks):
                key = {"function": task.__name__, **static}
                made = partial(task.__wrapped__, **static)
                self._ready[selected] = program_cache.program(made, arguments, key)
            else:
                task.lower(*arguments, **static).compile()
                self._ready[selected] = partial(task, **static)
            self._say(f"{what}: ready after {time.perf_counter() - begin:.1f} s")
        return self._ready[selected]

    def _static(self, plan: Plan) -> dict[str, Any]:
        """What selects a program, beside the shapes."""
        return {
            "networks": programs.Networks(self.model),
            "schedule": plan.schedule,
            "guidance": plan.guidance,
        }

    @property
    def decoder_params(self) -> dict[str, Any]:
        """Parameters of the VAE's decoder on the device, by its name; empty without a VAE."""
        return self._decoder

    def _encoder_params(self) -> Any:
        """The VAE's encoder on the device; nothing without a VAE."""
        if self._encoder is None:
            self._encoder = self._vae_part("encoder")
        return self._encoder

    def _vae_params(self) -> dict[str, Any]:
        return self._encoder_params() | self._decoder

    def _vae_part(self, name: str) -> dict[str, Any]:
        vae = self.model.vae_params or {}
        return jax.tree.map(jnp.asarray, {key: vae[key] for key in (name,) if key in vae})

    def _check_shows_images(self) -> None:
        channels = self.model.description.image_shape[-1]
        if self.model.vae is None and channels not in (1, 3):
            raise InputError(
                f"this model moves latents of {channels} channels and has no VAE to decode them: "
                "convert it again with --vae, or use sample_latents"
            )


def in_batches(function: Callable[[Any], Any], count: int, batch_size: int | None) -> jax.Array:
    """Calls a function of rows for so many at a time, of which the last are filled up.

    Args:
      function: of an index of B rows, gives an array with a first axis of B.
      count: of rows in all.
      batch_size: rows of a call; None for all.

    Returns:
      The results of rows 0 to count - 1.

    Raises:
      InputError: batch_size is no positive whole number.
    """
    if batch_size is not None:
        check_batch_size(batch_size)
    if batch_size is None or batch_size == count:
        return function(slice(None))
    parts = []
    for first in range(0, count, batch_size):
        rows = np.minimum(np.arange(first, first + batch_size), count - 1)
        made = function(rows)
        parts.append(made if isinstance(made, jax.core.Tracer) else np.asarray(made))
    if isinstance(parts[0], jax.core.Tracer):
        return jnp.concatenate(parts)[:count]
    return jax.device_put(np.concatenate(parts)[:count])
