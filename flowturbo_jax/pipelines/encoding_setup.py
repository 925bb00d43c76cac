"""What encoding needs before the first image: its options, and an autoencoder."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flowturbo_jax import model_directory
from flowturbo_jax.data.latent_manifest import MOMENTS_DTYPES
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models import VAEConfig
from flowturbo_jax.pipelines import conversion

MAX_COUNT = 2**31 - 1  # of batch size, shard size and threads; what libraries can count


class Autoencoder(NamedTuple):
    """An autoencoder's config and parameters."""

    config: VAEConfig
    params: Params


@dataclasses.dataclass(frozen=True)
class Options:
    """How to encode, validated at construction.

    Attributes:
      batch_size: images at once, over all devices; each is encoded twice, as it is and mirrored.
      shard_size: images in each file.
      dtype: of the autoencoder's matrix products, "float32" or "bfloat16".
      moments: dtype in which moments are stored, "float16" or "float32".
      unreadable_limit: the largest fraction of the images that may be unreadable, in [0, 1].
      threads: how many read, decode and crop images.
    """

    batch_size: int = 8
    shard_size: int = 4096
    dtype: str = "float32"
    moments: str = "float16"
    unreadable_limit: float = 0.001
    threads: int = 4

    def __post_init__(self):
        for name in ("batch_size", "shard_size", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
            if getattr(self, name) > MAX_COUNT:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{name} is {getattr(self, name)}; take a smaller {flag}")
        model_directory.network_dtype(self.dtype)
        if self.moments not in MOMENTS_DTYPES:
            known = " or ".join(MOMENTS_DTYPES)
            raise InputError(f"moments are to be {self.moments!r}; they are stored in {known}")
        limit = self.unreadable_limit
        if not (math.isfinite(limit) and 0 <= limit <= 1):
            raise InputError(f"unreadable_limit is {limit}; it must be in 0 to 1")


def read_autoencoder(reference: str, report: Callable[[str], Any] = str) -> Autoencoder:
    """Reads the autoencoder of a model directory, or published weights.

    Args:
      reference: a model directory, the folder of a diffusers AutoencoderKL, or `hf://owner/name`.
      report: told in a line what was found.

    Raises:
      InputError: there is no autoencoder, or it is damaged.
    """
    try:
        directory = model_directory.resolve(reference)
    except InputError:
        return Autoencoder(*conversion.load_vae(reference, report))
    description = model_directory.describe(directory)
    if description.vae is None:
        raise InputError(
            f"{reference} has no VAE: its latents are pixels; give a model that has one"
        )
    module = model_directory.modules(description)["vae"]
    params = model_directory.load_network(directory, "vae", module, description)
    return Autoencoder(description.vae, params)
