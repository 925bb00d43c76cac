"""The layers of FID's Inception v3, as a table.

Source: torchvision inception.py, whose names these are; pytorch-fid inception.py.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Conv(NamedTuple):
    """A convolution, batch norm and ReLU.

    Attributes:
      name: the official name inside its block.
      features: output channels.
      kernel: rows and columns.
      strides: along both.
      padding: "SAME" or "VALID".
    """

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    strides: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """A 3x3 pool: "average", not counting padding, or "max"; a stride of 2 has no padding."""

    kind: str
    strides: int = 1


Fork = tuple[Conv, ...]  # both read the same maps, and their outputs lie side by side
Branch = tuple[Conv | Pool | Fork, ...]  # one after another
Block = tuple[Branch, ...]  # every branch reads the block's input; outputs lie side by side


def _reducing(name: str, features: int) -> Conv:
    """A 3x3 convolution that halves the sides."""
    return Conv(name, features, (3, 3), 2, "VALID")


def _block_a(pool_features: int) -> Block:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        (Pool("average"), Conv("branch_pool", pool_features)),
    )


def _block_b() -> Block:
    return (
        (_reducing("branch3x3", 384),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            _reducing("branch3x3dbl_3", 96),
        ),
        (Pool("max", 2),),
    )


def _block_c(width: int) -> Block:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (Pool("average"), Conv("branch_pool", 192)),
    )


def _block_d() -> Block:
    return (
        (Conv("branch3x3_1", 192), _reducing("branch3x3_2", 320)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            _reducing("branch7x7x3_4", 192),
        ),
        (Pool("max", 2),),
    )


def _block_e(pool: str) -> Block:
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), _cross("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            _cross("branch3x3dbl_3"),
        ),
        (Pool(pool), Conv("branch_pool", 192)),
    )


def _cross(name: str) -> Fork:
    return (Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))


STEM: Branch = (
    _reducing("Conv2d_1a_3x3", 32),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    Pool("max", 2),
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    Pool("max", 2),
)
BLOCKS: dict[str, Block] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),  # pytorch-fid inception.py: so does the TensorFlow network
}


def convolutions() -> Iterator[str]:
    """The path of every convolution in the parameters, such as "Mixed_5b/branch1x1"."""
    for block, branches in {"": (STEM,), **BLOCKS}.items():
        for branch in branches:
            for conv in _convs(branch):
                yield f"{block}/{conv.name}" if block else conv.name


def _convs(branch: Branch) -> Iterator[Conv]:
    for step in branch:
        if isinstance(step, Conv):
            yield step
        elif not isinstance(step, Pool):
            yield from step
