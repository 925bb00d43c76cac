"""Hyper-parameters of the text-to-image U-Net and of its refiner."""

import dataclasses
import math
from typing import Any, ClassVar

from flowturbo_jax.interfaces import InputError

MAX_SIZE, MAX_DEPTH = 65536, 16  # far above any model; a wrong config would hang instead
# Where a published size differs from the defaults below: Stable Diffusion's unet/config.json.
SIZES: dict[str, dict[str, Any]] = {
    "SD 1.x U-Net": {},
    "SD 2.x U-Net": {
        "attention_heads": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "linear_projection": True,
    },
}
# Hyper-parameters of one entry per resolution; those that are yes or no, and those that are few.
PER_LEVEL = ("block_out_channels", "attention_heads", "cross_attention")
FLAGS = ("cross_attention", "linear_projection")
DEPTHS = ("layers_per_block", "transformer_layers")
REFINER_SHARE, REFINER_SHARE_BELOW = 2, 4  # PAPER section 3: 320,640,1280,1280 -> 160,160,320,320


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Hyper-parameters of a U-Net, validated at construction; the defaults are SD 1.x's.

    Attributes:
      sample_size: height and width of the latents, each divisible by `downsampling`.
      in_channels: channels of the latents, and of the velocity.
      block_out_channels: width at each resolution, the finest first; each further one halves it.
      layers_per_block: residual layers at each resolution on the way down; one more on the way up.
      attention_heads: attention heads at each resolution.
      cross_attention: whether a resolution has transformers; the coarsest has one in the middle.
      cross_attention_dim: width of the text states.
      transformer_layers: blocks of every transformer.
      linear_projection: transformers begin and end with a linear layer; if not, with a 1x1
        convolution, which is the same of another layout.
      norm_num_groups: groups of every group norm.
      in_channels_scale: how many arrays of in_channels enter side by side: 1, or 2 for a refiner.
    """

    sample_size: tuple[int, int]
    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    cross_attention_dim: int = 768
    transformer_layers: int = 1
    linear_projection: bool = False
    norm_num_groups: int = 32
    in_channels_scale: int = 1

    takes_text: ClassVar[bool] = True  # its condition is text states, not labels

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            several = field.name in ("sample_size", *PER_LEVEL)
            if several and not isinstance(value, tuple):
                raise InputError(f"U-Net {field.name} is {value!r:.99}; it must be a tuple")
            for number in value if several else (value,):
                _check(field.name, number)
        self._check_lengths()
        for width, heads in zip(self.block_out_channels, self.attention_heads, strict=True):
            for name, divisor in (
                ("norm_num_groups", self.norm_num_groups),
                ("attention_heads", heads),
            ):
                if width % divisor:
                    raise InputError(
                        f"U-Net block_out_channels {width} is not divisible by {name} {divisor}"
                    )
        if self.block_out_channels[0] % 2:
            raise InputError(
                f"U-Net block_out_channels {self.block_out_channels[0]} is not divisible by 2; the "
                "first is the number of cosines and sines of the time"
            )
        for side in self.sample_size:
            if side % self.downsampling:
                raise InputError(
                    f"U-Net sample_size {side} is not divisible by {self.downsampling}, the "
                    f"downsampling of {len(self.block_out_channels)} resolutions"
                )

    def _check_lengths(self) -> None:
        levels = len(self.block_out_channels)
        if not 1 <= levels <= MAX_DEPTH:
            raise InputError(
                f"U-Net block_out_channels has {levels} widths; it needs one per resolution, 1 to "
                f"{MAX_DEPTH} of them"
            )
        lengths = {"sample_size": 2, "attention_heads": levels, "cross_attention": levels}
        for name, wanted in lengths.items():
            if len(getattr(self, name)) != wanted:
                raise InputError(
                    f"U-Net {name} has {len(getattr(self, name))} entries; it needs {wanted}"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [H, W, C] of the latents the network moves."""
        return (*self.sample_size, self.in_channels)

    @property
    def num_classes(self) -> int:
        """It knows no labels."""
        return 0

    @property
    def null_label(self) -> None:
        """It knows no labels; the dropped condition is an empty text."""
        return None

    @property
    def size_name(self) -> str | None:
        """The published size these hyper-parameters are of, such as "SD 1.x U-Net", or None."""
        for name, fields in SIZES.items():
            if self == UNetConfig(self.sample_size, **fields):
                return name
        return None

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Widths of the attention heads there are, ascending, each once."""
        levels = zip(self.block_out_channels, self.attention_heads, strict=True)
        sizes = [width // heads for width, heads in levels]
        used = {size for size, is_used in zip(sizes, self.cross_attention, strict=True) if is_used}
        return tuple(sorted({*used, sizes[-1]}))  # the middle is at the last resolution

    @property
    def text_width(self) -> int:
        """Width of the text states."""
        return self.cross_attention_dim

    @property
    def time_width(self) -> int:
        """Width of the embedded time."""
        return 4 * self.block_out_channels[0]  # diffusers unet_2d_condition.py, _set_time_proj

    @property
    def downsampling(self) -> int:
        """Pixels of the finest resolution per pixel of the coarsest, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def resized(self, height: int, width: int) -> "UNetConfig":
        """The same network for latents of another size, in latent pixels."""
        return dataclasses.replace(self, sample_size=(height, width))

    def refiner(self, **fields: Any) -> "UNetConfig":
        """The refiner's network for this predictor, narrower and over [x, v]; `fields` overrides.

        The finest resolution is half as wide and the others a quarter, rounded up to what group
        norms and heads need, with one residual layer each.

        Source: PAPER section 3, 320,640,1280,1280 -> 160,160,320,320 and layers per block 2 -> 1.
        """
        widths = []
        for level, width in enumerate(self.block_out_channels):
            share = REFINER_SHARE_BELOW if level else REFINER_SHARE
            multiple = math.lcm(2, self.norm_num_groups, self.attention_heads[level])
            widths.append(-(-width // (share * multiple)) * multiple)
        own = {
            "block_out_channels": tuple(widths),
            "layers_per_block": 1,
            "in_channels_scale": 2,
        }
        return dataclasses.replace(self, **{**own, **fields})

    def check_refiner(self, refiner: "UNetConfig") -> None:
        """Refuses a refiner that was made for another predictor.

        Raises:
          InputError: it does not take [x, v] of this predictor's latents and text states.
        """
        found = (refiner.shape, refiner.text_width)
        wanted = (self.shape, self.text_width)
        if found != wanted or refiner.in_channels_scale != 2:
            raise InputError(
                f"the refiner is for another model's shape: (latents, text width) {found} with "
                f"{refiner.in_channels_scale} inputs side by side, where the predictor wants "
                f"{wanted} with 2"
            )


def _check(name: str, value: Any) -> None:
    """Refuses a value, or an entry of a tuple, that is no hyper-parameter of that name."""
    if name in FLAGS:
        if not isinstance(value, bool):
            raise InputError(f"U-Net {name} is {value!r:.99}; it must be true or false")
        return
    limit = MAX_DEPTH if name in DEPTHS else MAX_SIZE
    if type(value) is not int or not 1 <= value <= limit:
        raise InputError(f"U-Net {name} is {value!r:.99}; it must be an integer in 1..{limit}")
