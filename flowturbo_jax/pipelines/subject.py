"""Which model is measured: a model directory, or a published size with random weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

from flowturbo_jax import model_directory, solver_files
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.model_description import Description
from flowturbo_jax.pipelines import any_model, program_cache, random_model
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.text_to_image import TextToImage
from flowturbo_jax.quantization import check_kind, quantize
from flowturbo_jax.schedule import Schedule


class Subject(NamedTuple):
    """A model that can be described before anything is loaded.

    Attributes:
      directory: path of a model directory or name of a shipped one; None for random weights.
      size: such as "SiT-XL/2" or "SD 1.x U-Net", where there is no directory.
      image_size: side of the images of that size, in pixels.
      vae: with a VAE's decoder, or latents alone.
    """

    directory: str | None
    size: str | None = None
    image_size: int = 256
    vae: bool = True

    @property
    def name(self) -> str:
        """In a few words."""
        if self.directory is not None:
            return self.directory
        return f"{self.size} at {self.image_size}, random weights{'' if self.vae else ', no VAE'}"

    def describe(self) -> Description:
        """What model it is. Nothing is computed, and no device is touched.

        Raises:
          InputError: there is no such model.
        """
        if self.directory is not None:
            return model_directory.describe(self.directory)
        return random_model.describe(str(self.size), self.image_size, self.vae)

    def solver(self, schedule: Schedule) -> LearntSolver:
        """The solver that the model has for a learnt schedule.

        Raises:
          InputError: it has none.
        """
        if self.directory is None:
            raise InputError(f"random weights have no solver, so {schedule} cannot be sampled")
        directory = model_directory.resolve(self.directory)
        can_learn = not model_directory.describe(self.directory).takes_text
        return solver_files.of_model(directory, schedule, can_learn)

    def load(
        self,
        dtype: str,
        quantization: str | None = None,
        say: Callable[[str], Any] = logging.info,
    ) -> Generation:
        """The model, ready to sample.

        Args:
          dtype: of the networks' matrix products, "float32" or "bfloat16".
          quantization: "int8" or "fp8" for those of the transformer blocks; None for dtype.
          say: is told, in a line, what is compiled.

        Raises:
          InputError: it cannot be loaded.
        """
        if self.directory is not None:
            return any_model.load(self.directory, dtype, quantization, say)
        check_kind(quantization)
        with program_cache.preparing():
            model = random_model.random_model(str(self.size), self.image_size, self.vae, dtype)
        kind = TextToImage if model.description.takes_text else ClassToImage
        return kind(model if quantization is None else quantize(model, quantization), say)
