"""Model directories: `model.json` beside Orbax directories, read and written in one place."""

import dataclasses
import functools
import hashlib
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
from flowturbo_jax.model_files import check_place, digest_of, replace
from flowturbo_jax.models import VAE, CLIPText, family
from flowturbo_jax.models.attention import Chosen, for_device
from flowturbo_jax.tokenizer import Tokenizer, check_fits

SHIPPED = Path(__file__).parent / "pretrained"
TOKENIZER = "tokenizer"  # the folder of its files
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
      text_encoder: module `(ids) -> states` of a model that takes text, or None.
      text_encoder_params: its parameters, or None.
      tokenizer: what turns its texts into ids, or None.
      directory: where it was loaded from, and its solvers are; None for a model made otherwise.
    """

    description: Description
    predictor: nn.Module
    predictor_params: Params
    refiner: nn.Module | None
    refiner_params: Params | None
    vae: VAE | None = None
    vae_params: Params | None = None
    text_encoder: CLIPText | None = None
    text_encoder_params: Params | None = None
    tokenizer: Tokenizer | None = None
    directory: Path | None = None

    @functools.cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """`fingerprint` of each network's parameters; None for one that is not there."""
        networks = {
            "predictor": self.predictor_params,
            "refiner": self.refiner_params,
            "vae": self.vae_params,
        }
        if self.text_encoder is not None:
            networks["text_encoder"] = self.text_encoder_params
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
    if description.takes_text:
        loaded["tokenizer"] = load_tokenizer(directory, description)
    return Model(description, **loaded, directory=directory)


def modules(
    description: Description, dtype: str = "float32", fast_attention: bool = False
) -> dict[str, nn.Module]:
    """The modules of the networks there are, by name: predictor, refiner, vae, text_encoder.

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
    build["text_encoder"] = CLIPText
    options: dict[str, Any] = {"dtype": network_dtype(dtype)}
    built = {}
    for network, config in description.networks.items():
        attention = {}
        if fast_attention and hasattr(config, "head_sizes"):
            attention = {"attention": _attention(network, options["dtype"], config.head_sizes)}
        built[network] = build[network](config, **options, **attention)
    return built


def _attention(network: str, dtype: Any, head_sizes: tuple[int, ...]) -> Chosen:
    """What the attention of a network is to be computed by, each head size for itself."""
    chosen = {size: for_device(jax.devices()[0], dtype, size) for size in head_sizes}
    for implementation, why in dict.fromkeys(chosen.values()):
        slower = implementation != "cudnn" and jax.default_backend() == "gpu"
        log = logging.warning if slower and dtype == jnp.bfloat16 else logging.info
        log("attention of the %s by %s: %s", network, implementation, why)
    names = {size: implementation for size, (implementation, _) in chosen.items()}
    # One name where it is the same for all: there is nothing to tell apart.
    return next(iter(names.values())) if len(set(names.values())) == 1 else tuple(names.items())


def load_network(
    directory: Path, network: str, module: nn.Module, description: Description
) -> Params:
    """Loads one network's parameters, after checking that not a bit of their files has changed.

    Args:
      directory: of the model, as `resolve` gives it.
      network: "predictor", "refiner", "vae" or "text_encoder".
      module: the one whose parameters they are; see `modules`.
      description: what model.json says.

    Raises:
      InputError: they are damaged, incomplete, or do not fit.
    """
    place = directory / network
    config = getattr(description, network)
    if place.is_dir() and digest_of(place, config) != description.files_sha256.get(network):
        raise InputError(
            f"the {network} in {directory} is damaged or incomplete: its files and "
            "hyper-parameters do not have the sha256 that model.json names; restore a copy"
        )
    return load_params(place, abstract_params(module))


def load_tokenizer(directory: Path, description: Description) -> Tokenizer:
    """Loads the tokenizer of a model that takes text, after checking its files.

    Raises:
      InputError: it is damaged, incomplete, or does not fit the text encoder.
    """
    place = directory / TOKENIZER
    if digest_of(place, None) != description.files_sha256.get(TOKENIZER):
        raise InputError(
            f"the tokenizer in {directory} is damaged or incomplete: its files do not have the "
            "sha256 that model.json names; restore a copy"
        )
    tokenizer = Tokenizer.from_folder(place)
    check_fits(tokenizer, description.text_encoder)
    return tokenizer


@functools.lru_cache(maxsize=64)
def abstract_params(module: nn.Module) -> Params:
    """Names, shapes and dtypes of a module's parameters, without computing them."""
    return jax.eval_shape(module.initialise, jax.random.key(0))


def save(
    directory: Path,
    description: Description,
    predictor_params: Params,
    refiner_params: Params | None,
    vae_params: Params | None = None,
    text_encoder_params: Params | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a model directory whole or not at all; one that stands there is replaced.

    Args:
      directory: where; its parents are made.
      description: what model.json is to say; its files_sha256 is filled in.
      predictor_params: parameters of the predictor.
      refiner_params: parameters of the refiner, or None.
      vae_params: parameters of the autoencoder, or None.
      text_encoder_params: parameters of the text encoder, or None.
      tokenizer: of a model that takes text, or None.

    Raises:
      InputError: a network and its parameters do not come together, or the place holds something
        that is not a model directory.
    """
    networks = {"predictor": predictor_params, "refiner": refiner_params, "vae": vae_params}
    networks["text_encoder"] = text_encoder_params
    networks = {network: params for network, params in networks.items() if params is not None}
    if networks.keys() != description.networks.keys():
        raise InputError(
            f"there are parameters of {', '.join(networks)}, but the description has "
            f"{', '.join(description.networks)}; each needs both"
        )
    if (tokenizer is not None) != description.takes_text:
        raise InputError("a tokenizer belongs to a model that takes text, and to no other")
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
        sha256 = {name: digest_of(draft / name, getattr(description, name)) for name in networks}
        if tokenizer is not None:
            tokenizer.save(draft / TOKENIZER)
            sha256[TOKENIZER] = digest_of(draft / TOKENIZER, None)
        text = dataclasses.replace(description, files_sha256=sha256).to_json()
        (draft / "model.json").write_text(text)
        draft.chmod(0o755)  # mkdtemp makes it private
        replace(draft, directory)
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


def fingerprint(params: Params) -> str:
    """sha256 over names, shapes and float32 values of parameters, in hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf, dtype="<f4")
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def text_fingerprint(params: Params, tokenizer: Tokenizer) -> str:
    """sha256 over all that text states depend on beside the text, in hexadecimal.

    Args:
      params: parameters of the text encoder.
      tokenizer: what makes its ids.
    """
    return hashlib.sha256(f"{fingerprint(params)} {tokenizer.fingerprint}".encode()).hexdigest()
