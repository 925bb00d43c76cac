"""The pipeline of a model, by what its description says it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from flowturbo_jax import model_directory
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import Model
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.text_to_image import TextToImage


def load(
    directory: str | Path,
    dtype: str = "float32",
    quantization: str | None = None,
    say: Callable[[str], Any] = logging.info,
) -> Generation:
    """Loads a model directory, or a shipped model by its name, whatever it takes.

    The arguments and errors are those of `Pipeline.load`.
    """
    takes_text = model_directory.describe(directory).takes_text
    kind = TextToImage if takes_text else ClassToImage
    return kind.load(directory, dtype, quantization, say)


def pipeline_of(model: Model) -> Generation:
    """The pipeline of a model that is loaded."""
    return (TextToImage if model.description.takes_text else ClassToImage)(model)


def refuse_text(directory: str | Path, what: str) -> None:
    """Refuses a model of texts for what is done with models of classes only.

    Args:
      directory: model directory, or the name of a shipped model.
      what: cannot be done, such as "tune".

    Raises:
      InputError: it takes texts.
    """
    if model_directory.describe(directory).takes_text:
        raise InputError(
            f"{what} is for models of classes, and {directory} takes texts; sample it with "
            "sample.py, measure it with python -m flowturbo_jax evaluate"
        )
