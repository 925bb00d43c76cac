"""What samples are compared with: statistics of real images, in files other groups read too.

A file is numpy's .npz with `mu`, `sigma` (pooled features) and, of Inception, `mu_s`, `sigma_s`
(spatial features), as ADM's evaluator writes it. Ours add `features`, the rows that precision and
recall need, and `info`, JSON text that says which network they are of. ADM's reference batches hold
images in `arr_0` instead of features.
"""

import contextlib
import hashlib
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics.frechet import Statistics
from flowturbo_jax.metrics.network import FeatureNetwork

# What numpy, zipfile and the decompressors raise for files that are damaged or no such files.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    RuntimeError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
UNKNOWN_COUNT = 0  # statistics of a file that does not say of how many images


class Reference(NamedTuple):
    """Statistics of real images.

    Attributes:
      name: what a card calls them.
      fingerprint: sha256 of the file, or over source and network, in hexadecimal.
      pooled: of the pooled features `[D]`.
      spatial: of the spatial features; None where there are none.
      features: `[M, D]` rows for precision and recall; None where there are none.
      network: fingerprint of the feature network; None where the file does not say.
    """

    name: str
    fingerprint: str
    pooled: Statistics
    spatial: Statistics | None
    features: np.ndarray | None
    network: str | None


def write_reference(path: str | Path, reference: Reference, info: Mapping[str, Any]) -> None:
    """Writes a reference to a file, whole or not at all.

    Args:
      path: ends in .npz.
      reference: what to write.
      info: more to store about it, anything JSON holds.

    Raises:
      InputError: the name does not end in .npz, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path} is no name for statistics; it must end in .npz")
    known = {
        "name": reference.name,
        "network": reference.network,
        "count": reference.pooled.count,
        **info,
    }
    arrays = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.savez(file, info=np.asarray(json.dumps(known)), **arrays)
        os.replace(draft, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another --out") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def read_reference(path: str | Path, network: FeatureNetwork) -> Reference:
    """Reads statistics from a file, ours, ADM's or pytorch-fid's.

    Args:
      path: the .npz file.
      network: the one whose features samples will be compared by. It is also run on the images of
        an ADM reference batch, for precision and recall.

    Raises:
      InputError: it is no such file, a key is missing, a shape is wrong, a value is not finite, or
        it holds the statistics of another network.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    info = _info(path, arrays)
    spatial_keys = ("mu_s", "sigma_s") if {"mu_s", "sigma_s"} & arrays.keys() else ()
    if missing := [key for key in ("mu", "sigma", *spatial_keys) if key not in arrays]:
        raise InputError(
            f"{path} has no {' and no '.join(missing)} (it holds {', '.join(arrays) or 'nothing'})"
            "; statistics need both: make them with python -m flowturbo_jax statistics"
        )
    stored = info.get("network")
    if stored is not None and stored != network.fingerprint:
        raise InputError(
            f"{path} holds statistics of another feature network ({info.get('features', stored)}), "
            f"not of {network.name}; make them anew with python -m flowturbo_jax statistics"
        )
    count = info.get("count", UNKNOWN_COUNT)
    pooled = _statistics(path, arrays["mu"], arrays["sigma"], count)
    if network.dimensions is not None and len(pooled.mean) != network.dimensions:
        raise InputError(
            f"{path} has statistics of {len(pooled.mean)} features, {network.name} has "
            f"{network.dimensions}; they are of another feature network"
        )
    spatial = None
    if spatial_keys:
        spatial = _statistics(path, arrays["mu_s"], arrays["sigma_s"], count)
    features = _features(path, arrays, len(pooled.mean), network)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = info.get("name") or path.name
    return Reference(str(name), digest, pooled, spatial, features, stored)


def _features(
    path: Path, arrays: dict[str, np.ndarray], dimensions: int, network: FeatureNetwork
) -> np.ndarray | None:
    """Rows of real features; those of an ADM reference batch are taken of its images."""
    if "features" in arrays:
        features = arrays["features"]
        if features.ndim != 2 or features.shape[1] != dimensions or features.dtype.kind != "f":
            raise InputError(
                f"features of {path} are {features.dtype}{list(features.shape)}, its mean has "
                f"{dimensions}; they must be floats [M, {dimensions}]"
            )
        if not np.isfinite(features).all():
            raise InputError(f"{path} has features that are not finite")
        return features
    if "arr_0" not in arrays:
        return None
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(f"arr_0 of {path} is {images.dtype}{list(images.shape)}, not images")
    features = network.extract(images).pooled
    if features.shape[1] != dimensions:
        raise InputError(
            f"the images of {path} have {features.shape[1]} features by {network.name}, its mean "
            f"has {dimensions}; they are of another feature network"
        )
    return features


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file; give the .npz of the statistics")
    try:
        # Opened here, because numpy leaves a file open that is none of its own.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:  # runs no code
            return {key: stored[key] for key in stored.files}
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; check the name of the statistics") from error
    except MemoryError as error:
        raise InputError(f"{path} holds, or claims, more than fits into memory") from error
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"{path} is no .npz file of plain arrays ({reason})") from error


def _info(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if "info" not in arrays:
        return {}
    try:
        info = json.loads(str(arrays.pop("info")[()]))
        count = info.get("count", UNKNOWN_COUNT)
        if type(count) is not int or count < 0:
            raise ValueError(f"count is {count!r}")
    except (ValueError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"info of {path} cannot be read: {error}; make the file anew") from error
    return info


def _statistics(path: Path, mean: np.ndarray, covariance: np.ndarray, count: int) -> Statistics:
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path} has a mean of {list(mean.shape)} and a covariance of "
            f"{list(covariance.shape)}; they must be [D] and [D, D]"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise InputError(f"{path} has statistics of {mean.dtype} and {covariance.dtype}, no floats")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path} has statistics that are not finite")
    _refuse_no_covariance(path, covariance)
    return Statistics(mean, covariance, count)


def _refuse_no_covariance(path: Path, matrix: np.ndarray) -> None:
    """Refuses now what `frechet_distance`, by the same bounds, would refuse at the very end."""
    scale = np.abs(matrix).max()
    if np.abs(matrix - matrix.T).max() > 1e-5 * scale:
        raise InputError(f"{path} has a covariance that is not symmetric, so it is none")
    if scale > 0:
        try:  # exists if no eigenvalue is below the bound, and is quicker than they are
            np.linalg.cholesky(matrix / scale + 1e-4 * np.eye(len(matrix)))
        except np.linalg.LinAlgError as error:
            raise InputError(
                f"{path} has a covariance with a negative eigenvalue, so it is none"
            ) from error
