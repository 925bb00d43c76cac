"""The smallest text-to-image model: a U-Net, a text encoder, a tokenizer, and an autoencoder."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import tiny_latents

from flowturbo_jax import model_directory
from flowturbo_jax.model_directory import Description, Model
from flowturbo_jax.models import VAE, CLIPText, CLIPTextConfig, UNetConfig, family
from flowturbo_jax.tokenizer import Tokenizer

LENGTH, WIDTH = 16, 16  # token ids of a text, and of their states
UNET = {
    "sample_size": (8, 8),
    "in_channels": tiny_latents.CONFIG.latent_channels,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "attention_heads": (2, 2),
    "cross_attention": (True, False),
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
}
COLOURS = ("red", "green", "blue", "grey")
SHAPES = ("circle", "square", "cross")


def captions() -> tuple[str, ...]:
    """A text for each of 12 images."""
    return tuple(f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.learn(captions(), 600, LENGTH)


def text_config(**fields) -> CLIPTextConfig:
    defaults = {
        "vocab_size": tokenizer().vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "activation": "gelu",
        "end_token": tokenizer().end_token,
        "max_length": LENGTH,
    }
    return CLIPTextConfig(**{**defaults, **fields})


def random_params(module, seed: int = 0):
    """Parameters of which none is zero, in numpy: nothing is compiled."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        summed = np.prod(leaf.shape[:-1]) if name == "kernel" else 1 if "embed" in name else 25
        values = generator.normal(0, summed**-0.5, leaf.shape)
        return (values + (name == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, model_directory.abstract_params(module))


def description(refiner: bool = True, vae: bool = True, **fields) -> Description:
    """A model of images of 16 x 16 pixels, or without a VAE of 8 x 8.

    Args:
      refiner: have one.
      vae: have one, that of tiny_latents.
      fields: of UNetConfig, in place of those here.
    """
    config = UNetConfig(**{**UNET, **fields})
    return Description(
        family="unet",
        predictor=config,
        refiner=config.refiner() if refiner else None,
        class_names=(),
        guidance="paired",
        guidance_scale=1.5,
        guided_channels=None,
        source={},
        vae=tiny_latents.CONFIG if vae else None,
        text_encoder=text_config(hidden_size=config.text_width),
    )


def model(refiner: bool = True, vae: bool = True, seed: int = 0, **fields) -> Model:
    """A model of random weights; arguments as of `description`."""
    described, kind = description(refiner, vae, **fields), family("unet")
    predictor, encoder = kind.predictor(described.predictor), CLIPText(described.text_encoder)
    refining = kind.refiner(described.refiner) if refiner else None
    return Model(
        described,
        predictor,
        random_params(predictor, seed),
        refining,
        random_params(refining, seed + 1) if refiner else None,
        VAE(tiny_latents.CONFIG) if vae else None,
        tiny_latents.params() if vae else None,
        encoder,
        random_params(encoder, seed + 2),
        tokenizer(),
    )


def save(directory: Path, made: Model | None = None, **fields) -> Path:
    """Writes a model directory: of a model, or of `model(**fields)`."""
    made = made or model(**fields)
    params = (made.predictor_params, made.refiner_params, made.vae_params)
    text = (made.text_encoder_params, made.tokenizer)
    model_directory.save(directory, made.description, *params, *text)
    return directory
