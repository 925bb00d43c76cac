"""Networks, and the tables of those a model directory may name."""

from typing import Any, NamedTuple

from flax import linen as nn

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models.clip import CLIPText, CLIPTextConfig
from flowturbo_jax.models.inception import Inception, InceptionConfig
from flowturbo_jax.models.mixture import Mixture, MixtureConfig
from flowturbo_jax.models.refiner import Refiner
from flowturbo_jax.models.sit import SiT, SiTConfig
from flowturbo_jax.models.text_predictor import TextPredictor
from flowturbo_jax.models.unet import UNet
from flowturbo_jax.models.unet_config import UNetConfig
from flowturbo_jax.models.vae import VAE, VAEConfig

__all__ = [
    "FAMILIES",
    "NETWORKS",
    "VAE",
    "CLIPText",
    "CLIPTextConfig",
    "Family",
    "Inception",
    "InceptionConfig",
    "Mixture",
    "MixtureConfig",
    "Refiner",
    "SiT",
    "SiTConfig",
    "TextPredictor",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "family",
]


class Family(NamedTuple):
    """One kind of network: how it is described, and how it is built.

    Attributes:
      config: frozen dataclass of hyper-parameters with `shape`, `num_classes`, `null_label`,
        `takes_text`, `size_name`, `refiner()` and `check_refiner()`, validated at construction.
      network: module class taking that config and options such as dtype.
      refiner_config: dataclass of what `refiner()` gives.
      refiner_network: module class taking that, with two inputs side by side.
      fitted: the predictor's parameters are not trained by gradients.
    """

    config: type
    network: type[nn.Module]
    refiner_config: type = SiTConfig
    refiner_network: type[nn.Module] = SiT
    fitted: bool = False

    def predictor(self, config: Any, **options: Any) -> nn.Module:
        """The predictor module `(x, t, condition) -> velocity`."""
        return self.network(config, **options)

    def refiner(self, config: Any, **options: Any) -> Refiner:
        """The refiner module `(x, v, t, condition) -> offset`."""
        return Refiner(self.refiner_network(config, **options))


FAMILIES = {
    "sit": Family(SiTConfig, SiT),
    "mixture": Family(MixtureConfig, Mixture, fitted=True),
    "unet": Family(UNetConfig, UNet, UNetConfig, UNet),
}
# Every kind of network that weights are converted for.
NETWORKS = {"sit": SiT, "vae": VAE, "inception": Inception, "clip": CLIPText, "unet": UNet}


def family(name: str) -> Family:
    """The family of that name.

    Raises:
      InputError: no family has that name.
    """
    if name not in FAMILIES:
        raise InputError(f"unknown model family {name!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
