"""Networks of a model directory as files that the published code reads."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from flowturbo_jax import convert, model_directory, model_files, unet_architecture
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import UNetConfig
from flowturbo_jax.weights.files import DIFFUSERS_WEIGHTS

CONFIG, WEIGHTS = "config.json", DIFFUSERS_WEIGHTS[0]  # what diffusers calls them
NETWORKS = ("predictor", "refiner", "vae", "text_encoder")


def export(
    model_dir: str | Path, network: str, out: str | Path, force: bool = False
) -> dict[str, np.ndarray]:
    """Writes one network of a model directory as safetensors, under the official names.

    Args:
      model_dir: model directory, or the name of a shipped model.
      network: "predictor", "refiner", "vae" or "text_encoder".
      out: the file, ending in .safetensors; of a U-Net also the folder, with a config.json beside
        its weights as diffusers has it. Parents are made.
      force: replace the file, or such a folder's files, that stand there.

    Returns:
      The state dict written.

    Raises:
      InputError: there is no such network, or `out` is taken or cannot be written.
    """
    out, model = Path(out), model_directory.load(model_dir)
    if network not in NETWORKS:
        raise InputError(f"network is {network!r}; it must be one of {', '.join(NETWORKS)}")
    config = model.description.networks.get(network)
    if config is None:
        known = ", ".join(model.description.networks)
        raise InputError(f"{model_dir} has no {network}; it has {known}")
    folder = isinstance(config, UNetConfig) and not out.suffix
    if not folder and out.suffix != ".safetensors":
        or_folder = "" if not isinstance(config, UNetConfig) else ", and its folder in nothing"
        raise InputError(f"--out is {out.name!r}; an exported file ends in .safetensors{or_folder}")
    out = Path(os.path.realpath(out)) if folder else out  # a link stays, and "." has a name
    _check_free(out, folder, force)
    kind = convert.kind_of(network, model.description.family)
    state = convert.state_from_params(kind, config, getattr(model, f"{network}_params"))
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            draft.mkdir()
            text = json.dumps(unet_architecture.diffusers_config(config), indent=2)
            (draft / CONFIG).write_text(f"{text}\n")
        weights = draft / WEIGHTS if folder else draft
        save_file(state, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # the library makes it private
        model_files.replace(draft, out) if folder else os.replace(draft, out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {error}; choose another --out") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(draft, ignore_errors=True) if folder else draft.unlink(missing_ok=True)
    return state


def _check_free(out: Path, folder: bool, force: bool) -> None:
    """Refuses a place that is taken, or that --force would lose other things of."""
    try:
        taken = out.exists()
        others = {file.name for file in out.iterdir()} - {CONFIG, WEIGHTS} if out.is_dir() else ()
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    if others or (folder and taken and not out.is_dir()):
        what = "a folder with other files" if others else "a file"
        raise InputError(f"{out} is {what}; choose another --out")
    if taken and not force:
        raise InputError(f"{out} exists; choose another --out, or replace it with --force")
