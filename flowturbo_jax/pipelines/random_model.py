"""Models of the published sizes with random weights: as slow as the real ones."""

from typing import Any

import jax
import numpy as np

from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_description import Description
from flowturbo_jax.model_directory import Model, abstract_params, modules
from flowturbo_jax.models import CLIPTextConfig, SiTConfig, UNetConfig, VAEConfig
from flowturbo_jax.models.unet_config import SIZES as TEXT_SIZES
from flowturbo_jax.tokenizer import Tokenizer

LATENT_CHANNELS, CLASSES = 4, 1000  # SiT models.py: the published models are for ImageNet
IMAGE_SIZE, TEXT_IMAGE_SIZE = 256, 512  # of models of classes and of texts, if nobody says
TEXT_ENCODERS: dict[str, dict[str, Any]] = {  # Stable Diffusion's text_encoder/config.json
    "SD 1.x U-Net": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_layers": 12,
        "num_heads": 12,
        "activation": "quick_gelu",
    },
    "SD 2.x U-Net": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_layers": 23,
        "num_heads": 16,
        "activation": "gelu",
    },
}
VOCABULARY = 49408  # tokens of CLIP, the last of which ends a text
LEARNT = ("a photo of a cat", "a handwritten seven")  # what the stand-in for its tokenizer knows


def default_size(size: str) -> int:
    """Side of the images of a model of a published size, in pixels, if nobody says."""
    return TEXT_IMAGE_SIZE if size in TEXT_SIZES else IMAGE_SIZE


def describe(size: str, image_size: int = 256, vae: bool = True, seed: int = 0) -> Description:
    """What `random_model` makes of the same arguments; nothing is computed, no device is touched.

    Raises:
      InputError: no such size, or the image's side does not fit.
    """
    if size in TEXT_SIZES:
        return _describe_of_texts(size, image_size, vae, seed)
    if not size.startswith("SiT"):
        known = ", ".join(TEXT_SIZES)
        raise InputError(f"unknown size {size!r}; known are SiT's, such as SiT-XL/2, and {known}")
    factor = VAEConfig().downsampling
    if image_size < factor or image_size % factor:
        raise InputError(f"the image size is {image_size}; it must be a multiple of {factor}")
    predictor = SiTConfig.named(
        size,
        input_size=image_size // factor,
        in_channels=LATENT_CHANNELS,
        num_classes=CLASSES,
    )
    return Description(
        family="sit",
        predictor=predictor,
        refiner=predictor.refiner(),
        vae=VAEConfig() if vae else None,
        class_names=tuple(f"class {label}" for label in range(CLASSES)),
        guidance="official",
        guidance_scale=1.5,
        guided_channels=3,
        source={"weights": f"random, seed {seed}"},
    )


def _describe_of_texts(size: str, image_size: int, vae: bool, seed: int) -> Description:
    """A text-to-image U-Net at FlowTurbo's settings, with the text encoder of its size."""
    fields = TEXT_SIZES[size]
    least = UNetConfig((64, 64), **fields).downsampling
    step = least * VAEConfig().downsampling
    if image_size < step or image_size % step:
        raise InputError(f"the image size is {image_size}; it must be a multiple of {step}")
    side = image_size // VAEConfig().downsampling
    predictor = UNetConfig((side, side), **fields)
    return Description(
        family="unet",
        predictor=predictor,
        refiner=predictor.refiner(),
        vae=VAEConfig() if vae else None,
        class_names=(),
        guidance="paired",
        guidance_scale=1.5,
        guided_channels=None,
        source={"weights": f"random, seed {seed}"},
        text_encoder=CLIPTextConfig(
            vocab_size=VOCABULARY, end_token=VOCABULARY - 1, **TEXT_ENCODERS[size]
        ),
    )


def random_model(
    size: str, image_size: int = 256, vae: bool = True, dtype: str = "float32", seed: int = 0
) -> Model:
    """A predictor, its refiner and perhaps a VAE; of texts a text encoder and a tokenizer, too.

    Args:
      size: such as "SiT-XL/2", or "SD 1.x U-Net".
      image_size: side of the images, in pixels; a multiple of 8 times the patch, or of 64.
      vae: with the Stable Diffusion VAE's decoder, or latents alone.
      dtype: of the networks' matrix products.
      seed: of the weights, 0 or more.

    Returns:
      The model; its parameters are normal numbers of a size that keeps every layer's result finite.

    Raises:
      InputError: as `describe`, or no such dtype.
    """
    return filled(describe(size, image_size, vae, seed), dtype, seed)


def filled(description: Description, dtype: str = "float32", seed: int = 0) -> Model:
    """A model of any description, as `random_model` makes those of the published sizes."""
    loaded: dict[str, Any] = {}
    if description.takes_text:
        loaded["tokenizer"] = Tokenizer.learn(LEARNT, 1000, description.text_encoder.max_length)
    built = modules(description, dtype, fast_attention=True)
    for index, (network, module) in enumerate(built.items()):
        loaded[network] = module
        loaded[f"{network}_params"] = _random(abstract_params(module), [seed, index])
    return Model(description, **loaded)


def _random(shapes: Params, seed: list[int]) -> Params:
    """Numbers for every parameter: kernels keep the variance of their input, scales are near 1."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name != "kernel":
            return np.float32(0.02) * values + np.float32(name == "scale")
        inputs = (
            leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2:-1]
        )  # of a convolution, or not
        return values / np.sqrt(np.prod(inputs), dtype=np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)
