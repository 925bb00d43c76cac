"""Model directories: `model.json` beside Orbax directories, read and written in one place."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flowturbo_jax.checkpoint import load_params, save_params
from flowturbo_jax.guidance import MODES
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models import family

FORMAT = 1
SHIPPED = Path(__file__).parent / "pretrained"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Description:
    """The contents of model.json.

    Attributes:
      family: key of `models.FAMILIES`.
      predictor: the family's config of the predictor.
      refiner: the family's config of the refiner, or None.
      class_names: name of each label.
      guidance: default mode, the one the refiner was trained for: "none", "official" or "paired".
      guidance_scale: default scale.
      guided_channels: what the official mode guides; None for all channels.
      source: where the weights of each network came from, by name.
      files_sha256: over files and hyper-parameters of each network, by name; checked before they
        are read.
    """

    family: str
    predictor: Any
    refiner: Any | None
    class_names: tuple[str, ...]
    guidance: str
    guidance_scale: float
    guided_channels: int | None
    source: Mapping[str, Any]

    files_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.guidance not in MODES:
            raise InputError(f"guidance is {self.guidance!r}; it must be one of {', '.join(MODES)}")
        if self.guidance != "none" and self.predictor.null_label is None:
            raise InputError(f"guidance is {self.guidance!r}, but the predictor has no null class")
        scale, channels = self.guidance_scale, self.guided_channels
        if (
            not isinstance(scale, int | float)
            or isinstance(scale, bool)
            or not math.isfinite(scale)
        ):
            raise InputError(f"guidance_scale is {scale!r}; it must be a finite number")
        known = range(1, self.predictor.shape[-1] + 1)
        if channels is not None and (type(channels) is not int or channels not in known):
            raise InputError(
                f"guided_channels is {channels!r}; it must be null or 1 to {known.stop - 1}"
            )
        if self.refiner is not None:
            self.predictor.check_refiner(self.refiner)
        if len(self.class_names) != self.predictor.num_classes:
            raise InputError(
                f"{len(self.class_names)} class names for {self.predictor.num_classes} classes"
            )

    def to_json(self) -> str:
        """The text of model.json."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Description":
        """Reads the text of model.json.

        Raises:
          InputError: it is not JSON, of another format, or a key is missing, unknown or wrong.
        """
        try:
            fields = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise InputError(f"model.json is not JSON ({error})") from error
        if fields.pop("format", None) != FORMAT:
            raise InputError(f"model.json is not of format {FORMAT}; convert or train it anew")
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - fields.keys()), sorted(fields.keys() - names)
        if missing or unknown:
            raise InputError(f"model.json has the wrong keys: missing {missing}, unknown {unknown}")
        config = family(str(fields["family"])).config
        for network in ("predictor", "refiner"):
            if network == "refiner" and fields[network] is None:
                continue
            try:
                fields[network] = config(**fields[network])
            except TypeError as error:
                raise InputError(f"model.json, {network}: {error}") from error
        classes = fields["class_names"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise InputError("model.json: class_names must be a list of names")
        for key in ("source", "files_sha256"):
            if not isinstance(fields[key], dict):
                raise InputError(f"model.json: {key} must be an object")
        return cls(**{**fields, "class_names": tuple(classes)})


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model directory.

    Attributes:
      description: what model.json says.
      predictor: module `(x, t, condition) -> velocity`.
      predictor_params: its parameters, float32.
      refiner: module `(x, v, t, condition) -> offset`, or None.
      refiner_params: its parameters, or None.
    """

    description: Description
    predictor: nn.Module
    predictor_params: Params
    refiner: nn.Module | None
    refiner_params: Params | None

    @functools.cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """`fingerprint` of both networks' parameters; None for a refiner that is not there."""
        refiner = self.refiner_params
        return {
            "predictor": fingerprint(self.predictor_params),
            "refiner": None if refiner is None else fingerprint(refiner),
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
            f"no model directory at {str(name)!r}; give the path of one, or the name of a shipped "
            f"model ({', '.join(shipped) or 'none here'})"
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
    options = {"dtype": network_dtype(dtype)}
    directory, description = resolve(name), describe(name)
    kind = family(description.family)
    predictor = kind.predictor(description.predictor, **options)
    predictor_params = _load_checked(directory, "predictor", predictor, description)
    if description.refiner is None:
        return Model(description, predictor, predictor_params, None, None)
    refiner = kind.refiner(description.refiner, **options)
    refiner_params = _load_checked(directory, "refiner", refiner, description)
    return Model(description, predictor, predictor_params, refiner, refiner_params)


def _load_checked(
    directory: Path, network: str, module: nn.Module, description: Description
) -> Params:
    """Loads one network's parameters, after checking that not a bit of their files has changed."""
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
) -> None:
    """Writes a model directory whole or not at all; one that stands there is replaced.

    Args:
      directory: where; its parents are made.
      description: what model.json is to say; its files_sha256 is filled in.
      predictor_params: parameters of the predictor.
      refiner_params: parameters of the refiner, or None.

    Raises:
      InputError: refiner and its parameters do not come together, or the place holds something
        that is not a model directory.
    """
    if (description.refiner is None) != (refiner_params is None):
        raise InputError("a refiner needs both its config and its parameters")
    directory = Path(directory).absolute()
    if directory.exists() and not (directory / "model.json").is_file():
        raise InputError(f"{directory} exists and is no model directory; choose another place")
    directory.parent.mkdir(parents=True, exist_ok=True)
    networks = {"predictor": predictor_params}
    if refiner_params is not None:
        networks["refiner"] = refiner_params
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        for network, params in networks.items():
            save_params(draft / network, params)
        sha256 = {name: _digest(draft / name, getattr(description, name)) for name in networks}
        text = dataclasses.replace(description, files_sha256=sha256).to_json()
        (draft / "model.json").write_text(text)
        draft.chmod(0o755)  # mkdtemp makes it private
        _replace(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
