"""Model directories: `model.json` beside Orbax directories, read and written in one place."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn

from flowturbo_jax.checkpoint import load_params, remove_draft, save_params
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_description import Description, Preset
from flowturbo_jax.models import VAE, family
from flowturbo_jax.models.attention import for_device

SHIPPED = Path(__file__).parent / "pretrained"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model directory.

    Attributes:
      description: what model.json says.
      predictor: module `(x, t, condition) -> velocity`.
      predictor_params: its parameters, float32.
      refiner: module `(x, v, t, condition) -> offset`, or None.
      refiner_params: its parameters, or None.
      vae: the autoencoder behind the latents, or None where they are pixels.
      vae_params: its parameters, or None.
    """

    description: Description
    predictor: nn.Module
    predictor_params: Params
    refiner: nn.Module | None
    refiner_params: Params | None
    vae: VAE | None = None
    vae_params: Params | None = None

    @functools.cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """`fingerprint` of each network's parameters; None for one that is not there."""
        networks = {
            "predictor": self.predictor_params,
            "refiner": self.refiner_params,
            "vae": self.vae_params,
        }
        return {
            name: None if params is None else fingerprint(params)
            for name, params in networks.items()
        }


def resolve(name: str | Path) -> Path:
    """The folder of a model: a path, or the name of a model that ships with the library.

    Raises:
      InputError: there is no such folder, or no model.json in it.
    """
    shipped = sorted(path.name for path in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    directory = Path(name)
    if not directory.exists() and str(name) in shipped:
        directory = SHIPPED / str(name)
    if not directory.is_dir():
        raise InputError(
            f"no model directory at {str(name)!r}; give the path of one, the name of a shipped "
            f"model ({', '.join(shipped) or 'none here'}), or make one of published weights: "
            "python -m flowturbo_jax convert --help"
        )
    if not (directory / "model.json").is_file():
        inside = directory / "model"
        hint = f"; did you mean {str(inside)!r}?" if (inside / "model.json").is_file() else ""
        raise InputError(f"{str(name)!r} is no model directory: it has no model.json{hint}")
    return directory


def describe(name: str | Path) -> Description:
    """Reads only the description of a model directory.

    Raises:
      InputError: as `resolve`, or its model.json is wrong.
    """
    directory = resolve(name)
    try:
        return Description.from_json((directory / "model.json").read_text())
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{directory}: {error}") from error


def network_dtype(name: str) -> Any:
    """The dtype of a name.

    Raises:
      InputError: it is neither float32 nor bfloat16.
    """
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load(name: str | Path, dtype: str = "float32") -> Model:
    """Loads a model directory, or a shipped model by its name.

    Args:
      name: path or shipped name.
      dtype: of the networks' matrix products, "float32" or "bfloat16".

    Raises:
      InputError: something is missing, damaged, or does not fit the description.
    """
    directory, description = resolve(name), describe(name)
    loaded: dict[str, Any] = {"refiner": None, "refiner_params": None}
    for network, module in modules(description, dtype, fast_attention=True).items():
        loaded[network] = module
        loaded[f"{network}_params"] = load_network(directory, network, module, description)
    return Model(description, **loaded)


def modules(
    description: Description, dtype: str = "float32", fast_attention: bool = False
) -> dict[str, nn.Module]:
    """The modules of the networks there are, by name: predictor, refiner, vae.

    Args:
      description: which networks.
      dtype: of their matrix products, "float32" or "bfloat16".
      fast_attention: use a fused kernel where the device has one. Its gradients differ from run to
        run, which training does not want.

    Raises:
      InputError: the dtype is unknown.
    """
    kind = family(description.family)
    build = {"predictor": kind.predictor, "refiner": kind.refiner, "vae": VAE}
    options: dict[str, Any] = {"dtype": network_dtype(dtype)}
    built = {}
    for network, config in description.networks.items():
        attention = {}
        if fast_attention and hasattr(config, "head_size"):
            chosen, why = for_device(jax.devices()[0], options["dtype"], config.head_size)
            slower = chosen != "cudnn" and jax.default_backend() == "gpu" and dtype == "bfloat16"
            log = logging.warning if slower else logging.info
            log("attention of the %s by %s: %s", network, chosen, why)
            attention = {"attention": chosen}
        built[network] = build[network](config, **options, **attention)
    return built


def load_network(
    directory: Path, network: str, module: nn.Module, description: Description
) -> Params:
    """Loads one network's parameters, after checking that not a bit of their files has changed.

    Args:
      directory: of the model, as `resolve` gives it.
      network: "predictor", "refiner" or "vae".
      module: the one whose parameters they are; see `modules`.
      description: what model.json says.

    Raises:
      InputError: they are damaged, incomplete, or do not fit.
    """
    place = directory / network
    config = getattr(description, network)
    if place.is_dir() and _digest(place, config) != description.files_sha256.get(network):
        raise InputError(
            f"the {network} in {directory} is damaged or incomplete: its files and "
            "hyper-parameters do not have the sha256 that model.json names; restore a copy"
        )
    return load_params(place, abstract_params(module))


def _digest(directory: Path, config: Any) -> str:
    """sha256 over hyper-parameters and over names and contents of a folder's files.

    Hyper-parameters at their default do not count, so that a new one changes no old checksum.
    """
    set_fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(set_fields, sort_keys=True).encode())
    # Files that begin with a dot are the operating system's, such as .DS_Store.
    files = [path for path in directory.rglob("[!.]*") if path.is_file()]
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def abstract_params(module: nn.Module) -> Params:
    """Names, shapes and dtypes of a module's parameters, without computing them."""
    return jax.eval_shape(module.initialise, jax.random.key(0))


def save(
    directory: Path,
    description: Description,
    predictor_params: Params,
    refiner_params: Params | None,
    vae_params: Params | None = None,
) -> None:
    """Writes a model directory whole or not at all; one that stands there is replaced.

    Args:
      directory: where; its parents are made.
      description: what model.json is to say; its files_sha256 is filled in.
      predictor_params: parameters of the predictor.
      refiner_params: parameters of the refiner, or None.
      vae_params: parameters of the autoencoder, or None.

    Raises:
      InputError: a network and its parameters do not come together, or the place holds something
        that is not a model directory.
    """
    networks = {"predictor": predictor_params, "refiner": refiner_params, "vae": vae_params}
    networks = {network: params for network, params in networks.items() if params is not None}
    if networks.keys() != description.networks.keys():
        raise InputError(
            f"there are parameters of {', '.join(networks)}, but the description has "
            f"{', '.join(description.networks)}; each needs both"
        )
    directory = Path(directory).absolute()
    check_place(directory)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(networks))
    parent = next(parent for parent in directory.parents if parent.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise InputError(
            f"cannot write {directory}: it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB "
            "are free; make room, or choose another place"
        )
    draft = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        for network, params in networks.items():
            save_params(draft / network, params)
        sha256 = {name: _digest(draft / name, getattr(description, name)) for name in networks}
        text = dataclasses.replace(description, files_sha256=sha256).to_json()
        (draft / "model.json").write_text(text)
        draft.chmod(0o755)  # mkdtemp makes it private
        _replace(draft, directory)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # Orbax reports a full disk as a ValueError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot write {directory}: {reason:.200}") from error
    finally:
        if draft is not None and draft.exists():
            remove_draft(draft)


def write_schedules(directory: Path, schedules: Mapping[str, Preset]) -> None:
    """Puts presets into the model.json of a model directory, in place of those there.

    Args:
      directory: of the model, as `resolve` gives it.
      schedules: by name; see `model_description.PRESET_NAMES`.

    Raises:
      InputError: the model cannot do what a preset says, or model.json cannot be written.
    """
    text = dataclasses.replace(describe(directory), schedules=dict(schedules)).to_json()
    draft = directory / f".model-{os.getpid()}.json"
    try:
        draft.write_text(text)
        os.replace(draft, directory / "model.json")
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {directory / 'model.json'}: {error.strerror}; copy the model to a place "
            "that can be written to"
        ) from error


def check_place(directory: Path) -> None:
    """Refuses a place where `save` could not write.

    Raises:
      InputError: something else than a model directory stands there, or it cannot be made.
    """
    directory = Path(directory).absolute()
    try:
        if directory.exists():
            if not (directory / "model.json").is_file():
                raise InputError(
                    f"{directory} exists and is no model directory; choose another place"
                )
        else:
            os.lstat(directory)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {directory}: {reason}; choose another place") from error
    parent = next(parent for parent in directory.parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise InputError(
            f"cannot write {directory}: {error.strerror} in {parent}; choose another place"
        ) from error


def _replace(draft: Path, directory: Path) -> None:
    """Puts the draft in the directory's place; what stood there comes back if that fails."""
    if not directory.exists():
        os.replace(draft, directory)
        return
    retired = draft.with_name(f"{draft.name}-old")
    os.replace(directory, retired)
    try:
        os.replace(draft, directory)
    except BaseException:
        os.replace(retired, directory)
        raise
    shutil.rmtree(retired)


def fingerprint(params: Params) -> str:
    """sha256 over names, shapes and float32 values of parameters, in hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf, dtype="<f4")
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
