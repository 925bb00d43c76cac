"""Features of FID's Inception v3, from published weights."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from flowturbo_jax import convert, hub, model_directory, parallel
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.metrics.network import FeatureNetwork, Features, byte_images, softmax
from flowturbo_jax.models import Inception, InceptionConfig
from flowturbo_jax.models.inception import FEATURES, SPATIAL_FEATURES
from flowturbo_jax.weights import open_weights


def inception_network(
    reference: str | Path, batch_size: int = 64, dtype: str = "float32"
) -> FeatureNetwork:
    """The feature network of FID, sFID, precision and recall, and the Inception Score.

    `extract` takes images of any size with 1 or 3 channels and runs on all local devices, in
    batches of one shape: a program is compiled for each size of image. `pooled` is pool3,
    `[N, 2048]`; `spatial` is `[N, 2023]`, in the order row, column, channel. `probabilities` are
    those of the 1008 classes, without the bias of the last layer.

    Args:
      reference: pytorch-fid's pt_inception-2015-12-05-6726825d.pth, torch-fidelity's
        weights-inception-2015-12-05-6526a30b.pth, or the same tensors in another file, local or
        `hf://owner/name/file`. Equal tensors have one fingerprint.
      batch_size: images per call of the network, divisible by the number of devices here.
      dtype: of the convolutions, "float32" or "bfloat16"; published scores are of float32.

    Raises:
      InputError: the file cannot be had, is damaged, or holds another network, such as
        torchvision's with 1000 classes; batch_size does not split; the dtype is unknown.

    Source: pytorch-fid inception.py; ADM evaluator.py: the Inception Score's softmax(pool3 W).
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be 1 or more")
    parallel.check_batch_size(batch_size, devices=jax.local_devices())
    network = Inception(InceptionConfig(), model_directory.network_dtype(dtype))
    params = _read(reference)
    matrix = params["fc"]["kernel"].astype(np.float64)
    run = parallel.map_batch(partial(_features, network))
    return FeatureNetwork(
        name="Inception v3 (FID), pool3 2048" + ("" if dtype == "float32" else f", {dtype}"),
        fingerprint=model_directory.fingerprint(params),
        extract=partial(_extract, run, parallel.replicate(params), batch_size),
        probabilities=lambda pooled: softmax(np.asarray(pooled).astype(np.float64) @ matrix),
        dimensions=FEATURES,
    )


def _read(reference: str | Path) -> Params:
    """The parameters in a file, float32."""
    try:
        state, _ = convert.with_known_names("inception", open_weights(hub.fetch(reference)).tensors)
        return convert.params_from_state("inception", InceptionConfig(), state, np.float32)
    except InputError as error:
        raise InputError(f"inception: {error}") from error


def _features(network: Inception, params: Params, images: jax.Array) -> Features:
    """Features of one device's share of a batch of bytes."""
    found = network.apply({"params": params}, images.astype(jnp.float32) / 255)
    return Features(found.pool3, rearrange(found.spatial, "n h w c -> n (h w c)"))


def _extract(run: Any, params: Params, batch_size: int, images: jax.Array | np.ndarray) -> Features:
    """Features of any number of images, by a program for `batch_size` of them."""
    images = byte_images(images)
    if images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise InputError(
            f"Inception takes images [N, H, W, 1] or [N, H, W, 3], got shape {images.shape}."
        )
    pooled = np.empty((len(images), FEATURES), np.float32)
    spatial = np.empty((len(images), SPATIAL_FEATURES), np.float32)
    for first in range(0, len(images), batch_size):
        batch = np.repeat(images[first : first + batch_size], 3 // images.shape[3], axis=3)
        filling = ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0))
        found = run(params, np.pad(batch, filling))
        part = slice(first, first + len(batch))
        pooled[part] = np.asarray(found.pooled)[: len(batch)]
        spatial[part] = np.asarray(found.spatial)[: len(batch)]
    return Features(pooled, spatial)
