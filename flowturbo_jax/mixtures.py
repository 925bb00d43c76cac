"""Mixtures of Gaussians: fitted to images, drawn from exactly, and their exact moments.

`models.Mixture` has the velocity of the flow to such a mixture.
"""

import numpy as np
from jaxtyping import Float, Float32, Int

from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models import MixtureConfig

# Variance added to every direction: that of rounding pixels to 17 levels, as the digits are, is
# (1 / 8)² / 12 = 0.0013. Pixels that never change, such as corners, would have none.
FLOOR = 1e-3


def fit(
    images: Float[np.ndarray, "n height width channels"],
    labels: Int[np.ndarray, " n"],
    components: int,
    seed: int = 0,
    floor: float = FLOOR,
) -> tuple[MixtureConfig, Params]:
    """Fits Gaussians of full covariance to the images of each class by expectation maximisation.

    Args:
      images: `[N, H, W, C]` float, square, in [-1, 1] for images; needs scikit-learn.
      labels: `[N]` int; every class from 0 to the largest must have images.
      components: Gaussians per class.
      seed: of the first guess, in [0, 2**32).
      floor: variance added to every direction of every Gaussian, above 0.

    Returns:
      Config and parameters of a `models.Mixture`; every class has the same weight in it, however
      many images it has.

    Raises:
      InputError: the images are not square, finite images; a class has too few of them; or there
        are no components, or no floor.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check(images, labels, components, floor)
    from sklearn.mixture import GaussianMixture  # here, because it takes most of a second

    config = MixtureConfig(
        input_size=images.shape[1],
        in_channels=images.shape[3],
        num_classes=int(labels.max()) + 1,
        components=components,
    )
    points = images.reshape(len(images), -1).astype(np.float64)
    weights, means, covariances = [], [], []
    for label in range(config.num_classes):
        found = GaussianMixture(components, reg_covar=floor, max_iter=1000, random_state=seed).fit(
            points[labels == label]
        )
        weights.append(found.weights_ / config.num_classes)
        means.append(found.means_)
        covariances.append(found.covariances_)
    eigenvalues, eigenvectors = np.linalg.eigh(np.concatenate(covariances))
    params = {
        "log_weights": np.log(np.concatenate(weights)),
        "means": np.concatenate(means),
        "eigenvalues": np.maximum(eigenvalues, floor),  # eigh rounds
        "eigenvectors": eigenvectors,
    }
    return config, {name: array.astype(np.float32) for name, array in params.items()}


def moments(
    config: MixtureConfig, params: Params, label: int | None = None
) -> tuple[Float[np.ndarray, " values"], Float[np.ndarray, "values values"]]:
    """Exact mean and covariance of a mixture, for the Fréchet distance of samples to it.

    Args:
      config: of the mixture.
      params: its parameters.
      label: only the Gaussians of that class; all of them, by their weights, if None.

    Returns:
      Mean `[D]` and covariance `[D, D]` float64.

    Raises:
      InputError: there is no such class.
    """
    weights = _weights(config, params, config.null_label if label is None else label)
    means, eigenvalues, vectors = (
        np.asarray(params[name], np.float64) for name in ("means", "eigenvalues", "eigenvectors")
    )
    mean = weights @ means
    within = np.einsum("k,kde,ke,kfe->df", weights, vectors, eigenvalues, vectors, optimize=True)
    between = np.einsum("k,kd,ke->de", weights, means - mean, means - mean, optimize=True)
    return mean, within + between


def draw(
    config: MixtureConfig,
    params: Params,
    labels: Int[np.ndarray, " n"],
    generator: np.random.Generator,
) -> Float32[np.ndarray, "n height width channels"]:
    """Draws samples of a mixture: exact ones, by no flow and no steps.

    Args:
      config: of the mixture.
      params: its parameters.
      labels: `[N]` int, each sample's class; `num_classes` means any, by their weights.
      generator: where the randomness comes from.

    Returns:
      Samples `[N, H, W, C]` float32; no value is cut off at ±1.

    Raises:
      InputError: there is no such class.
    """
    chosen = np.empty(len(labels), int)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        weights = _weights(config, params, int(label))
        chosen[rows] = generator.choice(config.gaussians, len(rows), p=weights)
    samples = generator.standard_normal((len(labels), config.dimensions))
    for k in np.unique(chosen):
        deviations = np.sqrt(params["eigenvalues"][k], dtype=np.float64)
        rows, vectors = chosen == k, np.asarray(params["eigenvectors"][k], np.float64)
        samples[rows] = params["means"][k] + (samples[rows] * deviations) @ vectors.T
    return samples.reshape(-1, *config.shape).astype(np.float32)


def _weights(config: MixtureConfig, params: Params, label: int) -> Float[np.ndarray, " gaussians"]:
    """The share of each Gaussian under a label, float64; they sum to 1."""
    if not 0 <= label <= config.null_label:
        raise InputError(
            f"label {label} is out of range; this mixture has the classes 0 to "
            f"{config.num_classes - 1}, and {config.null_label} for all of them"
        )
    weights = np.exp(np.asarray(params["log_weights"], np.float64))
    if label != config.null_label:
        weights[np.arange(config.gaussians) // config.components != label] = 0
    return weights / weights.sum()


def _check(images: np.ndarray, labels: np.ndarray, components: int, floor: float) -> None:
    if type(components) is not int or components < 1:
        raise InputError(f"components is {components!r}; it must be a positive integer")
    if not floor > 0:
        raise InputError(f"floor is {floor!r}; without variance the flow is not finite at t = 1")
    if images.ndim != 4 or images.shape[1] != images.shape[2] or not images.size:
        raise InputError(f"images are {list(images.shape)}; wanted is [N, H, W, C] with H = W")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels are {labels.dtype}{list(labels.shape)} for {len(images)} images; wanted is a "
            "whole number for each"
        )
    if not np.isfinite(images).all():
        raise InputError("images hold values that are not finite; look for NaN or infinity")
    if labels.min() < 0:
        raise InputError(f"label {labels.min()} is below 0; number the classes from 0")
    counts, least = np.bincount(labels), max(components, 2)
    if counts.min() < least:
        raise InputError(
            f"class {counts.argmin()} has {counts.min()} images; {components} components need at "
            f"least {least}: take fewer components, or more images"
        )
