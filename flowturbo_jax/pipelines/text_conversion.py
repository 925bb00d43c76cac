"""From a diffusers text-to-image pipeline to a model directory: networks and tokenizer.

Nothing in the files is executed, and PyTorch is not needed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flowturbo_jax import (
    clip_architecture,
    convert,
    hub,
    model_directory,
    tokenizer_files,
    unet_architecture,
)
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_description import Description
from flowturbo_jax.models import CLIPText, UNetConfig
from flowturbo_jax.pipelines.conversion import (
    PAPER_SCALE,
    Read,
    Sources,
    free_place,
    params_of,
    read_vae,
    source_of,
    verified,
)
from flowturbo_jax.pipelines.velocity_check import check_direction
from flowturbo_jax.tokenizer import Tokenizer, check_fits
from flowturbo_jax.weights import open_folder
from flowturbo_jax.weights.json_file import read_json

INDEX = "model_index.json"
TOKENIZER_FILES = (  # as `tokenizer_files` reads them
    tokenizer_files.CONFIG,
    (tokenizer_files.TOKENIZER, (tokenizer_files.VOCABULARY, tokenizer_files.MERGES)),
    (tokenizer_files.SPECIAL, ()),
    (tokenizer_files.ADDED, ()),
)
PARTS: dict[str, Any] = {  # of a pipeline on the hub
    "unet": hub.DIFFUSERS_FILES,
    "vae": hub.DIFFUSERS_FILES,
    "text_encoder": hub.TRANSFORMERS_FILES,
    "tokenizer": TOKENIZER_FILES,
}
CLASSES = {  # what each part of a pipeline has to be
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
CHECKED_SIDE = 32  # latent pixels of the one evaluation that tells velocity from noise


@dataclasses.dataclass(frozen=True)
class PipelineSources:
    """What to convert. References are local folders, or `hf://owner/name`.

    Attributes:
      pipeline: folder with model_index.json, unet/, vae/, text_encoder/ and tokenizer/.
      refiner: folder of a refiner's U-Net (config.json and weights), or None.
      vae: folder of another autoencoder than the pipeline's, or None.
      guidance: default mode of the model; "paired" if None.
      guidance_scale: default scale of the model; 1.5 if None.
      check_direction: evaluate the U-Net once, to refuse weights that predict noise.
    """

    pipeline: str
    refiner: str | None = None
    vae: str | None = None
    guidance: str | None = None
    guidance_scale: float | None = None
    check_direction: bool = True


def convert_pipeline(
    sources: PipelineSources,
    out: str | Path,
    force: bool = False,
    report: Callable[[str], Any] = str,
) -> Description:
    """Writes a model directory of a published pipeline, whole or not at all.

    Args:
      sources: what to convert.
      out: the model directory.
      force: replace a model directory that stands there.
      report: told in a line each what was found.

    Returns:
      What model.json says.

    Raises:
      InputError: a file is missing, damaged, hostile, or of another model; or `out` is taken.
    """
    out = free_place(out, force)
    folder = hub.fetch_parts(sources.pipeline, INDEX, PARTS)
    _check_index(folder)
    networks = _read_all(folder, sources, report)
    tokenizer = _tokenizer(folder, networks["text_encoder"].config)
    description = _describe(sources, networks)
    params = {name: params_of(name, "unet", network) for name, network in networks.items()}
    if sources.check_direction:
        _check_direction(description, params, tokenizer)
    model_directory.save(
        out,
        description,
        params["predictor"],
        params.get("refiner"),
        params["vae"],
        params["text_encoder"],
        tokenizer,
    )
    return model_directory.describe(out)


def _check_index(folder: Path) -> None:
    """Refuses a folder that is no pipeline, or has parts of other kinds than are known."""
    if not folder.is_dir():
        raise InputError(f"there is no folder at {folder}; give that of a diffusers pipeline")
    if not (folder / INDEX).is_file():
        raise InputError(
            f"{folder} has no {INDEX}; give the folder of a diffusers pipeline, with unet/, vae/, "
            "text_encoder/ and tokenizer/ in it"
        )
    index = read_json(folder / INDEX)
    if index.get("text_encoder_2") not in (None, [None, None]):
        raise InputError("the pipeline has a second text encoder; supported are SD 1.x and 2.x")
    for part, known in CLASSES.items():
        said = index.get(part)
        name = said[1] if isinstance(said, list) and len(said) == 2 else None
        if name not in known:
            raise InputError(
                f"the pipeline's {part} is {str(name)[:60]!r}; supported is {' or '.join(known)}"
            )
        if not (folder / part).is_dir():
            raise InputError(f"{folder} has no folder {part}; get the whole pipeline")


def _read_all(
    folder: Path, sources: PipelineSources, report: Callable[[str], Any]
) -> dict[str, Read]:
    """Opens and understands every network; whatever can be wrong with shapes is found here."""
    networks = {"predictor": _read_unet(folder / "unet", "predictor", report)}
    predictor: UNetConfig = networks["predictor"].config
    if sources.refiner is not None:
        networks["refiner"] = _read_unet(
            hub.fetch_folder(sources.refiner), "refiner", report, predictor
        )
        predictor.check_refiner(networks["refiner"].config)
    vae = sources.vae if sources.vae is not None else str(folder / "vae")
    networks["vae"] = read_vae(Sources(predictor="", vae=vae), report)
    networks["text_encoder"] = _read_text_encoder(folder / "text_encoder", report)
    return networks


def _read_unet(
    folder: Path, role: str, report: Callable[[str], Any], predictor: UNetConfig | None = None
) -> Read:
    try:
        given, weights = open_folder(folder, part="unet")
        config = unet_architecture.unet_config(given, refiner=role == "refiner")
        if predictor is not None:  # the size it was trained at need not be this model's
            config = config.resized(*predictor.sample_size)
        digest = verified(weights.path, None)
        state, _ = convert.with_known_names("unet", weights.tensors)
    except InputError as error:
        raise InputError(f"{role}: {error}") from error
    size = config.size_name or f"a U-Net of widths {', '.join(map(str, config.block_out_channels))}"
    report(f"{role}: {size} from {weights.path.name}")
    return Read(config, state, source_of(weights, digest))


def _read_text_encoder(folder: Path, report: Callable[[str], Any]) -> Read:
    try:
        given, weights = open_folder(folder, part="text_encoder")
        config = clip_architecture.clip_config(given)
        digest = verified(weights.path, None)
        state, _ = convert.with_known_names("clip", weights.tensors)
    except InputError as error:
        raise InputError(f"text_encoder: {error}") from error
    report(
        f"text_encoder: {config.num_layers} layers of width {config.hidden_size} from "
        f"{weights.path.name}"
    )
    return Read(config, state, source_of(weights, digest))


def _tokenizer(folder: Path, config: Any) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_folder(folder / "tokenizer")
        check_fits(tokenizer, config)
    except InputError as error:
        raise InputError(f"tokenizer: {error}") from error
    return tokenizer


def _describe(sources: PipelineSources, networks: Mapping[str, Read]) -> Description:
    refiner = networks.get("refiner")
    guidance, scale = sources.guidance or "paired", sources.guidance_scale
    if guidance == "none" and scale not in (None, 1.0):
        raise InputError(f"guidance 'none' has no scale, but {scale} was given; leave one out")
    if scale is None:
        scale = 1.0 if guidance == "none" else PAPER_SCALE
    return Description(
        family="unet",
        predictor=networks["predictor"].config,
        refiner=None if refiner is None else refiner.config,
        class_names=(),
        guidance=guidance,
        guidance_scale=scale,
        guided_channels=None,
        source={name: network.source for name, network in networks.items()},
        vae=networks["vae"].config,
        text_encoder=networks["text_encoder"].config,
    )


def _check_direction(
    description: Description, params: Mapping[str, Params], tokenizer: Tokenizer
) -> None:
    """Refuses a U-Net that predicts noise, as Stable Diffusion's own do."""
    modules, config = model_directory.modules(description), description.predictor
    encoder: CLIPText = modules["text_encoder"]
    ids = jnp.asarray(tokenizer([""]))
    states = jax.jit(encoder.apply)({"params": params["text_encoder"]}, ids)
    step = config.downsampling
    side = max(CHECKED_SIDE // step * step, step)
    small = config.resized(*(min(side, size) for size in config.sample_size))
    check_direction(modules["predictor"], params["predictor"], small, states)
