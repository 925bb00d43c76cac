"""Exact samples of a mixture of Gaussians as a data set: "mixture:DIR"."""

import hashlib

import numpy as np

from flowturbo_jax import mixtures, model_directory
from flowturbo_jax.data.source import DataSource, Example
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models import MixtureConfig

COUNT = 1_000_000  # more than a run takes, so that hardly a sample comes twice


def open_mixture(argument: str, image_size: int) -> DataSource:
    """Opens the samples of a model of the family mixture; each is drawn when it is read.

    Args:
      argument: its model directory; what follows "mixture:" in a name.
      image_size: 0, or the side of the model's images.

    Returns:
      A million samples `[H, W, C]` float32, of which example i depends on the mixture and i alone,
      the classes in turn. Most values are in [-1, 1]; a Gaussian has no end. The fingerprint is
      that of the mixture's parameters.

    Raises:
      InputError: there is no such model, it is of another family or size, or it moves the latents
        of an autoencoder.
    """
    if not argument:
        raise InputError(
            "'mixture:' needs the name of a model directory, such as mixture:runs/mixture/model."
        )
    model = model_directory.load(argument)
    description = model.description
    if description.family != "mixture":
        raise InputError(
            f"{argument} is a model of the family {description.family!r}; only a mixture, as "
            "flowturbo_jax.mixtures.fit makes it, can be drawn from exactly"
        )
    if model.vae is not None:
        raise InputError(f"{argument} moves latents of a VAE; 'mixture:' has images only")
    config, params = description.predictor, model.predictor_params
    if image_size not in (0, config.input_size):
        raise InputError(
            f"{argument} makes images of {config.input_size} pixels, not {image_size}; leave "
            "image_size out"
        )
    content = f"{COUNT} {config} {model.fingerprints['predictor']}"
    return DataSource(
        f"mixture:{argument}",
        MixtureExamples(config, params),
        config.shape,
        description.class_names,
        hashlib.sha256(content.encode()).hexdigest(),
    )


class MixtureExamples:
    """Exact samples by index: `{"data": [H, W, C] float32, "label": [] int32}`.

    Args:
      config: of the mixture.
      params: its parameters.
    """

    def __init__(self, config: MixtureConfig, params: Params) -> None:
        self._config = config
        self._params = {name: np.asarray(array) for name, array in params.items()}

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < COUNT:
            raise IndexError(f"example {index} of {COUNT}")
        label = np.asarray([index % self._config.num_classes], np.int32)
        generator = np.random.default_rng(index)
        data = mixtures.draw(self._config, self._params, label, generator)
        return {"data": data[0], "label": label[0, ...]}

    def name(self, index: int) -> str:
        return f"sample {index}"
