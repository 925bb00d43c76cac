"""Images and captions, batch by batch, to what a cache of latents stores of them."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float16, Int

from flowturbo_jax import model_directory, parallel
from flowturbo_jax.data import CaptionedExample, Example
from flowturbo_jax.data.latent_manifest import MOMENTS_DTYPES
from flowturbo_jax.interfaces import Images, Params
from flowturbo_jax.models import VAE, CLIPText
from flowturbo_jax.pipelines.encoding_setup import Autoencoder, Options, TextEncoder


class Image(NamedTuple):
    """An image as it was read: the example, or why there is none."""

    index: int
    example: Example | CaptionedExample | None
    reason: str = ""


class Encoded(NamedTuple):
    """What is stored of an image.

    Attributes:
      image: that was encoded.
      moments: `[2, h, w, 2c]` in the dtype of Options.moments.
      states: `[K, L, D]` float16 of its captions, or None.
    """

    image: Image
    moments: np.ndarray
    states: np.ndarray | None


Encode = Callable[[Iterable[Image]], Iterator[Encoded]]
MapBatch = Callable[[list[Image]], Any]  # what it gives is on its way from a device


def both_moments(
    vae: VAE, dtype: Any, params: Params, images: Images
) -> Float[Array, "batch 2 rows columns moments"]:
    """Moments of images and of their mirror images; pure.

    Args:
      vae: the autoencoder.
      dtype: of the result.
      params: its parameters, of which the encoder's half is used.
      images: `[B, H, W, 3]` float32 in [-1, 1].

    Returns:
      `[B, 2, h, w, 2c]`: the image and its mirror image; mean and logvar, not scaled.
    """
    # The mirror image is encoded itself: mirrored latents are others, off by the down-sampling's
    # padding, which is on one side only.
    both = jnp.concatenate([images, images[:, :, ::-1]])
    moments = vae.apply({"params": params}, both, method="encode")
    joined = jnp.concatenate(moments, axis=-1).astype(dtype)
    return rearrange(joined, "(mirrored b) h w c -> b mirrored h w c", mirrored=2)


def text_states(
    encoder: CLIPText, params: Params, ids: Int[Array, "batch captions tokens"]
) -> Float16[Array, "batch captions tokens width"]:
    """States of the captions of images; pure.

    Args:
      encoder: the text encoder.
      params: its parameters.
      ids: `[B, K, L]` int32.

    Returns:
      `[B, K, L, D]`, in the dtype in which they are stored.
    """
    states = encoder.apply({"params": params}, rearrange(ids, "b k l -> (b k) l"))
    return rearrange(states, "(b k) l d -> b k l d", b=len(ids)).astype(jnp.float16)


def encoder_of(autoencoder: Autoencoder, text: TextEncoder | None, options: Options) -> Encode:
    """What turns images into what is stored of them, one after the other.

    All batches have one shape, so that each network compiles once.

    Args:
      autoencoder: encodes the images.
      text: encodes their captions; None where they have none.
      options: how.
    """
    moments_of = _moments_of(autoencoder, options)
    states_of = None if text is None else _states_of(text, options)

    def batches(images: Iterable[Image]) -> Iterator[tuple[list[Image], Any, Any]]:
        images = iter(images)
        while batch := list(itertools.islice(images, options.batch_size)):
            yield batch, moments_of(batch), None if states_of is None else states_of(batch)

    def encode(images: Iterable[Image]) -> Iterator[Encoded]:
        for batch, moments, states in _one_late(batches(images)):
            stored = np.asarray(moments)
            texts = itertools.repeat(None) if states is None else np.asarray(states)
            yield from map(Encoded, batch, stored, texts)  # the last batch is padded

    return encode


def _moments_of(autoencoder: Autoencoder, options: Options) -> MapBatch:
    vae = VAE(autoencoder.config, model_directory.network_dtype(options.dtype))
    compiled = parallel.map_batch(partial(both_moments, vae, MOMENTS_DTYPES[options.moments]))
    params = parallel.replicate({"encoder": autoencoder.params["encoder"]})

    def moments_of(batch: list[Image]) -> Any:
        pixels = np.zeros((options.batch_size, *batch[0].example["data"].shape), np.float32)
        for row, image in enumerate(batch):
            pixels[row] = image.example["data"]
        return compiled(params, pixels)

    return moments_of


def _states_of(text: TextEncoder, options: Options) -> MapBatch:
    module = CLIPText(text.config, model_directory.network_dtype(options.dtype))
    compiled = parallel.map_batch(partial(text_states, module))
    params = parallel.replicate(text.params)
    tokenizer, count = text.tokenizer, options.captions_per_image

    def states_of(batch: list[Image]) -> Any:
        captions = [itertools.cycle(image.example["captions"]) for image in batch]
        texts = [text for own in captions for text in itertools.islice(own, count)]
        ids = np.zeros((options.batch_size, count, tokenizer.length), np.int32)
        ids[: len(batch)] = rearrange(tokenizer(texts), "(b k) l -> b k l", k=count)
        return compiled(params, ids)

    return states_of


def _one_late(items: Iterable[Any]) -> Iterator[Any]:
    """The same items; each is handed on after the next is begun, so that devices need not wait."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
