"""Model directories: `model.json` beside Orbax directories, read and written in one place."""

import dataclasses
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
from flax import linen as nn

from flowturbo_jax.checkpoint import load_params, save_params
from flowturbo_jax.guidance import MODES
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.models import Family, family

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
      source: where the weights of each network came from, free text by name.
    """

    family: str
    predictor: Any
    refiner: Any | None
    class_names: tuple[str, ...]
    guidance: str
    guidance_scale: float
    guided_channels: int | None
    source: Mapping[str, Any]

    def __post_init__(self):
        if self.guidance not in MODES:
            raise InputError(f"guidance is {self.guidance!r}; it must be one of {', '.join(MODES)}")
        if self.refiner is not None:
            fits = (self.refiner.shape, self.refiner.num_classes, self.refiner.null_class)
            wanted = (self.predictor.shape, self.predictor.num_classes, self.predictor.null_class)
            if fits != wanted or self.refiner.in_channels_scale != 2:
                raise InputError(
                    "the refiner is for another model's shape: (latents, classes, null class) "
                    f"{fits} over [x, v], where the predictor has {wanted}"
                )
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
        if fields.keys() != names:
            missing, extra = sorted(names - fields.keys()), sorted(fields.keys() - names)
            raise InputError(f"model.json has the wrong keys: missing {missing}, unknown {extra}")
        config = family(str(fields["family"])).config
        for network in ("predictor", "refiner"):
            if fields[network] is not None:
                try:
                    fields[network] = config(**fields[network])
                except TypeError as error:
                    raise InputError(f"model.json, {network}: {error}") from error
        fields["class_names"] = tuple(fields["class_names"])
        return cls(**fields)


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
        raise InputError(f"{str(name)!r} is no model directory: it has no model.json")
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
    predictor_params = load_params(directory / "predictor", abstract_params(predictor))
    if description.refiner is None:
        return Model(description, predictor, predictor_params, None, None)
    refiner = kind.refiner(description.refiner, **options)
    refiner_params = load_params(directory / "refiner", abstract_params(refiner))
    return Model(description, predictor, predictor_params, refiner, refiner_params)


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
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        save_params(draft / "predictor", predictor_params)
        if refiner_params is not None:
            save_params(draft / "refiner", refiner_params)
        (draft / "model.json").write_text(description.to_json())
        draft.chmod(0o755)  # mkdtemp makes it private
        if directory.exists():
            retired = draft.with_name(f"{draft.name}-old")
            os.replace(directory, retired)
            os.replace(draft, directory)
            shutil.rmtree(retired)
        else:
            os.replace(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fingerprint(params: Params) -> str:
    """sha256 over names, shapes and float32 values of parameters, in hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf, dtype="<f4")
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def kind_of(description: Description) -> Family:
    """The family of a description."""
    return family(description.family)
