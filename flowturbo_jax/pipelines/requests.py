"""What callers of a pipeline may ask for, checked before anything runs."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax.class_names import label_of
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import Description


def check_batch_size(batch_size: Any) -> None:
    """Refuses what is no number of images.

    Raises:
      InputError: it is no whole number of at least 1.
    """
    whole = isinstance(batch_size, numbers.Integral) and not isinstance(batch_size, bool)
    if not whole or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; it must be a positive whole number")


def seeds_and_indices(seeds: Any, first_index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The seed and the index of each image, `[count]` uint32 both.

    Args:
      seeds: one seed, whose images have the indices first_index, first_index + 1, ...; or `[count]`
        seeds, each image being the first of its seed.
      first_index: where the indices of a single seed start.
      count: number of images.

    Raises:
      InputError: a seed or index is no whole number in [0, 2^32), or the counts disagree.
    """
    if not isinstance(first_index, numbers.Integral) or not 0 <= first_index <= 2**32 - count:
        raise InputError(f"first_index is {first_index!r}; it must be a whole number in [0, 2^32)")
    seeds = np.asarray(seeds)
    if seeds.dtype.kind not in "iu" or (seeds < 0).any() or (seeds >= 2**32).any():
        raise InputError(f"seeds are {seeds.tolist()}; they must be whole numbers in [0, 2^32)")
    if seeds.ndim == 0:
        indices = first_index + np.arange(count)
    elif seeds.shape == (count,):
        indices = np.zeros(count)
    else:
        raise InputError(f"{seeds.size} seeds for {count} labels; give one, or one per label")
    seeds = np.broadcast_to(seeds, (count,))
    return seeds.astype(np.uint32), indices.astype(np.uint32)


def check_labels(labels: Any, description: Description) -> np.ndarray | jax.Array:
    """Labels as an array; JAX would silently clamp those out of range.

    Args:
      labels: class numbers, or names; what JAX traces is taken as it is.
      description: of the model.

    Raises:
      InputError: they are neither, none, or out of range.
    """
    if isinstance(labels, jax.core.Tracer):
        return labels
    classes = description.predictor.num_classes
    if isinstance(labels, np.ndarray) and labels.dtype.kind == "U":
        labels = labels.tolist()
    if isinstance(labels, list | tuple) and any(isinstance(label, str) for label in labels):
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, str | numbers.Integral):
                raise InputError(f"label {label!r} is neither a class number nor a name")
        labels = [label_of(label, description.class_names) for label in labels]
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels are {labels.dtype}{list(labels.shape)}; wanted is a list of class numbers "
            "or names"
        )
    wrong = labels[(labels < 0) | (labels >= max(classes, 1))]
    if len(wrong):
        raise InputError(
            f"label {wrong[0]} is out of range; this model has "
            + (f"the classes 0 to {classes - 1}" if classes else "no classes: use label 0")
        )
    return labels.astype(np.int32)  # not JAX's, which compiles a conversion per length


def check_noise(noise: jax.Array, description: Description) -> None:
    """Refuses noise that is not of the model's latents.

    Raises:
      InputError: it is not float32 `[B, H, W, C]` with the model's H, W and C.
    """
    height, width, channels = description.predictor.shape
    if noise.shape[1:] != (height, width, channels) or noise.dtype != jnp.float32:
        raise InputError(
            f"noise is {noise.dtype}{list(noise.shape)}; this model wants "
            f"float32[B, {height}, {width}, {channels}]"
        )


def check_images(images: jax.Array, description: Description) -> None:
    """Refuses images that the model cannot encode.

    Raises:
      InputError: they are not uint8 `[B, H, W, C]`, or a side is not divisible by the VAE's factor.
    """
    vae = description.vae
    channels = description.predictor.shape[-1] if vae is None else vae.in_channels
    factor = 1 if vae is None else vae.downsampling
    if (
        images.ndim != 4
        or images.dtype != jnp.uint8
        or images.shape[-1] != channels
        or any(side % factor for side in images.shape[1:3])
    ):
        raise InputError(
            f"images are {images.dtype}{list(images.shape)}; this model encodes "
            f"uint8[B, H, W, {channels}] with H and W divisible by {factor}"
        )


def check_model_images(images: jax.Array | np.ndarray, description: Description) -> None:
    """Refuses images that are not as the model makes them.

    Raises:
      InputError: they are not uint8 `[B, H, W, C]` with the model's H, W and C, or there are none.
    """
    shape = description.image_shape
    if images.ndim != 4 or images.shape[1:] != shape or images.dtype != np.uint8 or not len(images):
        raise InputError(
            f"images are {images.dtype}{list(images.shape)}; this model edits "
            f"uint8[B, {', '.join(map(str, shape))}]"
        )


def check_latents(latents: jax.Array, description: Description) -> None:
    """Refuses latents that the model cannot decode.

    Raises:
      InputError: they are not float32 `[B, H, W, C]` with the model's C.
    """
    channels = description.predictor.shape[-1]
    if latents.ndim != 4 or latents.dtype != jnp.float32 or latents.shape[-1] != channels:
        raise InputError(
            f"latents are {latents.dtype}{list(latents.shape)}; this model decodes "
            f"float32[B, H, W, {channels}]"
        )
