"""What model.json says: the networks of a model, its defaults, and where its weights came from."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from flowturbo_jax.guidance import MODES, check_interval
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import CLIPTextConfig, VAEConfig, family
from flowturbo_jax.schedule import Schedule

FORMAT = 1
PRESET_NAMES = ("fast", "balanced", "best")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A way to sample that was found for a model, under one of the `PRESET_NAMES`.

    Attributes:
      schedule: text of the schedule.
      guidance: "none", "official" or "paired".
      guidance_interval: first and last flow time of guidance; None for all of the time.
    """

    schedule: str
    guidance: str
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self):
        object.__setattr__(self, "schedule", str(Schedule.parse(self.schedule)))
        if self.guidance not in MODES:
            raise InputError(f"guidance is {self.guidance!r}; it must be one of {', '.join(MODES)}")
        object.__setattr__(self, "guidance_interval", check_interval(self.guidance_interval))
        if self.guidance == "none" and self.guidance_interval is not None:
            raise InputError("guidance 'none' has no guidance_interval; leave one out")


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
      vae: config of the autoencoder behind the latents; None where the latents are pixels.
      schedules: the presets that `tune` found, by name.
      text_encoder: config of what turns token ids into the states that a predictor of text takes;
        None for one of classes.
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
    vae: VAEConfig | None = None
    schedules: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    text_encoder: CLIPTextConfig | None = None

    def __post_init__(self):
        if self.guidance not in MODES:
            raise InputError(f"guidance is {self.guidance!r}; it must be one of {', '.join(MODES)}")
        if self.guidance != "none" and not self.can_guide:
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
        for name, preset in self.schedules.items():
            self._check_preset(name, preset)
        if self.refiner is not None:
            self.predictor.check_refiner(self.refiner)
        if len(self.class_names) != self.predictor.num_classes:
            raise InputError(
                f"{len(self.class_names)} class names for {self.predictor.num_classes} classes"
            )
        if self.vae is not None and self.vae.latent_channels != self.predictor.shape[-1]:
            raise InputError(
                f"the VAE has {self.vae.latent_channels} latent channels, the predictor moves "
                f"{self.predictor.shape[-1]}; they are of different models"
            )

        if (self.text_encoder is not None) != self.takes_text:
            raise InputError("a text encoder belongs to a predictor of text, and to no other")
        if self.takes_text and self.text_encoder.hidden_size != self.predictor.text_width:
            raise InputError(
                f"the text encoder gives states of width {self.text_encoder.hidden_size}, the "
                f"predictor takes {self.predictor.text_width}; they are of different models"
            )

    def _check_preset(self, name: str, preset: Preset) -> None:
        if name not in PRESET_NAMES:
            raise InputError(f"schedules has {name!r}; known are {', '.join(PRESET_NAMES)}")
        if preset.guidance != "none" and not self.can_guide:
            raise InputError(f"schedule {name!r} is guided, but the predictor has no null class")
        if Schedule.parse(preset.schedule).needs_refiner and self.refiner is None:
            raise InputError(f"schedule {name!r} refines, but there is no refiner")

    @property
    def networks(self) -> dict[str, Any]:
        """The config of each network there is, by name: predictor, refiner, vae, text_encoder."""
        named = {"predictor": self.predictor, "refiner": self.refiner, "vae": self.vae}
        named["text_encoder"] = self.text_encoder
        return {name: config for name, config in named.items() if config is not None}

    @property
    def takes_text(self) -> bool:
        """Whether the condition is a text, not a class."""
        return self.predictor.takes_text

    @property
    def can_guide(self) -> bool:
        """Whether there is a condition that says nothing: a null class, or an empty text."""
        return self.takes_text or self.predictor.null_label is not None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape [H, W, C] of the images."""
        height, width, channels = self.predictor.shape
        if self.vae is None:
            return (height, width, channels)
        factor = self.vae.downsampling
        return (height * factor, width * factor, self.vae.out_channels)

    def resized(self, height: int, width: int) -> "Description":
        """The same networks for images of another size.

        Args:
          height: of the images, in pixels.
          width: likewise.

        Raises:
          InputError: the networks cannot make images of that size.
        """
        if not hasattr(self.predictor, "resized"):
            raise InputError(f"models of the family {self.family!r} make images of one size")
        step = self.size_step
        if height < step or width < step or height % step or width % step:
            raise InputError(
                f"the image size is {height} x {width}; both sides must be multiples of {step}"
            )
        factor = 1 if self.vae is None else self.vae.downsampling
        size = (height // factor, width // factor)
        refiner = None if self.refiner is None else self.refiner.resized(*size)
        return dataclasses.replace(self, predictor=self.predictor.resized(*size), refiner=refiner)

    @property
    def size_step(self) -> int:
        """What the sides of images of a model of many sizes are multiples of, in pixels."""
        return self.predictor.downsampling * (1 if self.vae is None else self.vae.downsampling)

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
        fields.setdefault("vae", None)  # written before there was one
        fields.setdefault("schedules", {})  # likewise
        fields.setdefault("text_encoder", None)  # likewise
        missing, unknown = sorted(names - fields.keys()), sorted(fields.keys() - names)
        if missing or unknown:
            raise InputError(f"model.json has the wrong keys: missing {missing}, unknown {unknown}")
        kind = family(str(fields["family"]))
        configs = {"predictor": kind.config, "refiner": kind.refiner_config, "vae": VAEConfig}
        configs["text_encoder"] = CLIPTextConfig
        for network, config in configs.items():
            if network != "predictor" and fields[network] is None:
                continue
            try:
                stored = dict(fields[network])
                fields[network] = config(
                    **{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
                )
            except (TypeError, ValueError) as error:
                raise InputError(f"model.json, {network}: {error}") from error
        classes = fields["class_names"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise InputError("model.json: class_names must be a list of names")
        for key in ("source", "files_sha256", "schedules"):
            if not isinstance(fields[key], dict):
                raise InputError(f"model.json: {key} must be an object")
        try:
            presets = {name: _read_preset(preset) for name, preset in fields["schedules"].items()}
        except (TypeError, AttributeError, InputError) as error:
            raise InputError(f"model.json, schedules: {error}") from error
        return cls(**{**fields, "class_names": tuple(classes), "schedules": presets})


def _read_preset(fields: Any) -> Preset:
    interval = fields.get("guidance_interval")
    return Preset(**{**fields, "guidance_interval": None if interval is None else tuple(interval)})
