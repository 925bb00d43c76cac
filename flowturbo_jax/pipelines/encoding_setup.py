"""What encoding needs before the first image: its options, and the networks."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flowturbo_jax import model_directory
from flowturbo_jax.data.latent_manifest import MOMENTS_DTYPES
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models import CLIPTextConfig, VAEConfig
from flowturbo_jax.pipelines import conversion
from flowturbo_jax.tokenizer import Tokenizer

MAX_COUNT = 2**31 - 1  # of anything in Options; what libraries can count
GIVE_TEXT_ENCODER = "give a model directory that takes text as --text-encoder"


class Autoencoder(NamedTuple):
    """An autoencoder's config and parameters."""

    config: VAEConfig
    params: Params


class TextEncoder(NamedTuple):
    """A text encoder's config, its parameters and its tokenizer."""

    config: CLIPTextConfig
    params: Params
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """How to encode, validated at construction.

    Attributes:
      batch_size: images at once, over all devices; each is encoded twice, as it is and mirrored.
      shard_size: images in each file.
      dtype: of the networks' matrix products, "float32" or "bfloat16".
      moments: dtype in which moments are stored, "float16" or "float32".
      unreadable_limit: the largest fraction of the images that may be unreadable, in [0, 1].
      threads: how many read, decode and crop images.
      captions_per_image: of how many captions text states are stored; an image that has fewer
        repeats them. Of data without captions none are.
    """

    batch_size: int = 8
    shard_size: int = 4096
    dtype: str = "float32"
    moments: str = "float16"
    unreadable_limit: float = 0.001
    threads: int = 4
    captions_per_image: int = 1

    def __post_init__(self):
        for name in ("batch_size", "shard_size", "threads", "captions_per_image"):
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


def read_text_encoder(reference: str | None, vae: str) -> TextEncoder:
    """Reads the text encoder and the tokenizer of a model directory.

    Args:
      reference: a model directory that takes text; None for the one that has the autoencoder.
      vae: where the autoencoder comes from, as `read_autoencoder` takes it.

    Raises:
      InputError: there is no text encoder, or it is damaged.
    """
    try:
        directory = model_directory.resolve(vae if reference is None else reference)
    except InputError as error:
        if reference is not None:
            raise
        raise InputError(f"{vae} is no model directory; {GIVE_TEXT_ENCODER}") from error
    description = model_directory.describe(directory)
    if not description.takes_text:
        raise InputError(f"{directory} is a model of classes; {GIVE_TEXT_ENCODER}")
    module = model_directory.modules(description)["text_encoder"]
    params = model_directory.load_network(directory, "text_encoder", module, description)
    tokenizer = model_directory.load_tokenizer(directory, description)
    return TextEncoder(description.text_encoder, params, tokenizer)
