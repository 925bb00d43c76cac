"""Models of the published sizes with random weights: as slow as the real ones."""

import jax
import numpy as np

from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_description import Description
from flowturbo_jax.model_directory import Model, abstract_params, modules
from flowturbo_jax.models import SiTConfig, VAEConfig

LATENT_CHANNELS, CLASSES = 4, 1000  # SiT models.py: the published models are for ImageNet


def describe(size: str, image_size: int = 256, vae: bool = True, seed: int = 0) -> Description:
    """What `random_model` makes of the same arguments; nothing is computed, no device is touched.

    Raises:
      InputError: no such size, or the image's side does not fit.
    """
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


def random_model(
    size: str, image_size: int = 256, vae: bool = True, dtype: str = "float32", seed: int = 0
) -> Model:
    """A predictor, its refiner and perhaps a VAE.

    Args:
      size: such as "SiT-XL/2".
      image_size: side of the images, in pixels; a multiple of 8 times the patch.
      vae: with the Stable Diffusion VAE's decoder, or latents alone.
      dtype: of the networks' matrix products.
      seed: of the weights, 0 or more.

    Returns:
      The model; its parameters are normal numbers of a size that keeps every layer's result finite.

    Raises:
      InputError: as `describe`, or no such dtype.
    """
    description = describe(size, image_size, vae, seed)
    loaded = {}
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
