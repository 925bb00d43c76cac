"""From published files to a model directory: read, check, name, write."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowturbo_jax import architecture, class_names, convert, hub, model_directory
from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_description import Description
from flowturbo_jax.models import SiTConfig, VAEConfig
from flowturbo_jax.pipelines.velocity_check import check_direction, check_objective
from flowturbo_jax.weights import Weights, open_folder, open_weights, sha256_of
from flowturbo_jax.weights.json_file import read_json
from flowturbo_jax.weights.tensor import Tensor

OFFICIAL_CHANNELS = 3  # FlowTurbo models_assemble.py, forward_with_cfg: of 4 latent channels
PAPER_SCALE = 1.5  # the FID tables
STABLE_DIFFUSION_FACTOR = 8  # image pixels per latent pixel, where no VAE says otherwise


@dataclasses.dataclass(frozen=True)
class Sources:
    """What to convert. References are local paths, or `hf://owner/name/file`.

    Attributes:
      predictor: weights of a SiT.
      refiner: weights of its refiner, or None.
      vae: folder of a diffusers AutoencoderKL, or None.
      which: of a training checkpoint, "ema" or "model".
      predictor_config: JSON file of hyper-parameters that shapes do not tell, or None.
      refiner_config: likewise of the refiner.
      size: the published size the predictor must have, such as "SiT-XL/2", or None.
      image_size: the side its images must have, in pixels, or None.
      sha256: expected of a network's weights file, by the network's name.
      class_names: file with one name per line, or None: ImageNet's for 1000 classes.
      guidance: default mode of the model; None for what the weights are known to want.
      guidance_scale: default scale of the model; likewise.
      guided_channels: what the official mode guides; likewise.
      check_direction: evaluate the predictor once, to refuse weights that predict noise.
    """

    predictor: str
    refiner: str | None = None
    vae: str | None = None
    which: str = "ema"
    predictor_config: str | None = None
    refiner_config: str | None = None
    size: str | None = None
    image_size: int | None = None
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    class_names: str | None = None
    guidance: str | None = None
    guidance_scale: float | None = None
    guided_channels: int | None = None
    check_direction: bool = True


class Read(NamedTuple):
    """One network's file, opened and understood; its tensors are still on disk."""

    config: Any
    state: Mapping[str, Tensor]
    source: dict[str, Any]


def convert_model(
    sources: Sources, out: str | Path, force: bool = False, report: Callable[[str], Any] = str
) -> Description:
    """Writes a model directory of published weights, whole or not at all.

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
    networks = _read_all(sources, report)
    description = _describe(sources, networks)
    modules, params = model_directory.modules(description), {}
    for name, network in networks.items():
        params[name] = params_of(name, description.family, network)
        if name == "predictor" and sources.check_direction:
            check_direction(modules[name], params[name], network.config)
    model_directory.save(
        out, description, params["predictor"], params.get("refiner"), params.get("vae")
    )
    return model_directory.describe(out)


def free_place(out: str | Path, force: bool) -> Path:
    """Where a model directory is to be written; InputError if that cannot be, or it is taken."""
    out = Path(out)
    model_directory.check_place(out)
    if out.exists() and not force:
        raise InputError(f"{out} exists; choose another --out, or replace it with --force")
    return out


def params_of(name: str, family: str, network: Read) -> Params:
    """The parameters of a network that was read, in float32.

    Args:
      name: "predictor", "refiner", "vae" or "text_encoder".
      family: of predictor and refiner.
      network: its config and its state dict under known names.

    Raises:
      InputError: tensors are missing, extra, misshapen or not finite.
    """
    kind = convert.kind_of(name, family)
    try:
        return convert.params_from_state(kind, network.config, network.state, np.float32)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def load_vae(reference: str, report: Callable[[str], Any] = str) -> tuple[VAEConfig, Params]:
    """Reads a published autoencoder without writing anything.

    Args:
      reference: folder of a diffusers AutoencoderKL, or `hf://owner/name`.
      report: told in a line what was found.

    Returns:
      Its config, and its parameters in float32.

    Raises:
      InputError: as `convert_model`.
    """
    network = read_vae(Sources(predictor="", vae=reference), report)
    return network.config, params_of("vae", "", network)


def _read_all(sources: Sources, report: Callable[[str], Any]) -> dict[str, Read]:
    """Opens and understands every file; whatever can be wrong with shapes is found here."""
    for name in ("refiner", "vae"):
        orphan = name in sources.sha256 or getattr(sources, f"{name}_config", None) is not None
        if getattr(sources, name) is None and orphan:
            raise InputError(f"a sha256 or config of the {name} is given, but no --{name}")
    networks = {"predictor": _read_sit(sources, "predictor", report)}
    predictor = networks["predictor"].config
    if sources.size is not None:
        SiTConfig.named(sources.size, input_size=8, in_channels=4, num_classes=0)  # if it is known
        if predictor.size_name != sources.size:
            found = predictor.size_name or (
                f"{predictor.depth} blocks of width {predictor.hidden_size} on patches of "
                f"{predictor.patch_size}"
            )
            raise InputError(f"the predictor is {found}, not {sources.size}")
    if sources.refiner is not None:
        networks["refiner"] = _read_sit(sources, "refiner", report, predictor)
        predictor.check_refiner(networks["refiner"].config)
    if sources.vae is not None:
        networks["vae"] = read_vae(sources, report)
    if sources.image_size is not None:
        _check_image_size(sources.image_size, predictor, networks.get("vae"))
    return networks


def _check_image_size(size: int, predictor: SiTConfig, vae: Read | None) -> None:
    factor = STABLE_DIFFUSION_FACTOR if vae is None else vae.config.downsampling
    step = factor * predictor.patch_size
    if size < 1 or size % step:
        raise InputError(
            f"--image-size {size} is not divisible by {step}: the VAE's {factor} times the patch "
            f"size {predictor.patch_size}"
        )
    if size != predictor.input_size * factor:
        raise InputError(
            f"the predictor is for {predictor.input_size * factor} pixel images, not {size}"
        )


def _read_sit(
    sources: Sources, role: str, report: Callable[[str], Any], predictor: SiTConfig | None = None
) -> Read:
    reference, config_file = getattr(sources, role), getattr(sources, f"{role}_config")
    try:
        file = hub.fetch(reference)
        digest = verified(file, sources.sha256.get(role))
        weights = open_weights(file, sources.which)
        check_objective(file, weights)
        state, dropped = convert.with_known_names("sit", weights.tensors)
        given = {} if config_file is None else read_json(config_file)
        config = architecture.sit_config(
            state, given, refiner=role == "refiner", reversed_time=bool(dropped), like=predictor
        )
    except InputError as error:
        raise InputError(f"{role}: {error}") from error
    part = f", its {weights.origin!r}" if weights.origin else ""
    report(f"{role}: {_name(config)} from {file.name}{part}")
    if role == "predictor" and sources.vae is None and config.in_channels not in (1, 3):
        report("no --vae is given: this model will sample latents, and cannot show images")
    if dropped:
        report(
            f"{role}: trained by REPA, with a reversed clock; left out, since only training uses "
            f"them: {', '.join(dropped)}"
        )
    source = source_of(weights, digest) | {"weights": weights.origin, "dropped": dropped}
    return Read(config, state, source)


def read_vae(sources: Sources, report: Callable[[str], Any]) -> Read:
    """Opens the folder of an autoencoder."""
    try:
        folder = hub.fetch_folder(sources.vae)
        given, weights = open_folder(folder, sources.which, part="vae")
        digest = verified(weights.path, sources.sha256.get("vae"))
        config = architecture.vae_config(given)
        state, _ = convert.with_known_names("vae", weights.tensors)
    except InputError as error:
        raise InputError(f"vae: {error}") from error
    report(f"vae: {config.downsampling} x smaller latents from {weights.path.name}")
    return Read(config, state, source_of(weights, digest))


def source_of(weights: Weights, digest: str) -> dict[str, Any]:
    """What model.json says of where a network's weights came from."""
    shards = {shard.name: sha256_of(shard) for shard in weights.shards}
    return {"file": weights.path.name, "sha256": digest} | ({"shards": shards} if shards else {})


def verified(file: Path, expected: str | None) -> str:
    """The file's sha256, after comparing it with the expected one."""
    if expected is not None:
        if file.name.endswith(".index.json"):
            raise InputError(
                f"{file.name} is an index of several files, so one sha256 says nothing; leave it "
                "out, model.json will hold that of each"
            )
        hub.check_sha256(file, expected)
        return expected.lower()
    return sha256_of(file)


def _describe(sources: Sources, networks: Mapping[str, Read]) -> Description:
    predictor: SiTConfig = networks["predictor"].config
    vae: VAEConfig | None = networks["vae"].config if "vae" in networks else None
    can_guide = predictor.null_label is not None
    official = can_guide and not predictor.reversed_time
    guidance = sources.guidance or ("official" if official else "paired" if can_guide else "none")
    scale = sources.guidance_scale
    if guidance == "none" and scale not in (None, 1.0):
        raise InputError(f"guidance 'none' has no scale, but {scale} was given; leave one out")
    if scale is None:
        scale = PAPER_SCALE if can_guide else 1.0
    channels = sources.guided_channels
    if channels is None and official and predictor.in_channels > OFFICIAL_CHANNELS:
        channels = OFFICIAL_CHANNELS  # whatever the default mode is: it may be asked for
    return Description(
        family="sit",
        predictor=predictor,
        refiner=networks["refiner"].config if "refiner" in networks else None,
        class_names=_class_names(sources, predictor.num_classes),
        guidance=guidance,
        guidance_scale=scale,
        guided_channels=channels,
        source={name: network.source for name, network in networks.items()},
        vae=vae,
    )


def _class_names(sources: Sources, count: int) -> tuple[str, ...]:
    if sources.class_names is not None:
        return class_names.read_class_names(sources.class_names, count)
    if count == architecture.IMAGENET_CLASSES:
        return class_names.imagenet_class_names()
    return tuple(f"class {label}" for label in range(count))


def _name(config: SiTConfig) -> str:
    side = config.input_size
    size = config.size_name or f"SiT of width {config.hidden_size}"
    return f"{size}, {config.depth} blocks, {side} x {side} x {config.in_channels} latents"
