"""The kind of a weights file, by its first bytes, and one clear line for every other kind."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.regular_file import open_regular

HEAD = 512  # bytes looked at; a tar file names itself at 257
SAFETENSORS_HEADER = 100_000_000  # bytes; the safetensors library writes no longer ones
# torch.save before PyTorch 1.6: a pickle of protocol 2 of the number 0x1950a86a20f9469cfc6c.
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
RESAVE = 'torch.save(torch.load("old.pt", map_location="cpu", weights_only=True), "new.pt")'

OTHER_KINDS: tuple[tuple[Callable[[bytes], object], str], ...] = (
    (lambda head: not head, "is empty: the download failed; get it again"),
    (
        lambda head: head.startswith(b"version https://git-lfs"),
        "is a Git LFS pointer, which only stands for the file: run 'git lfs pull', or download the "
        "file itself",
    ),
    (
        re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|\?xml)", re.IGNORECASE).match,
        "is a web page, not weights: the download failed, or it needs a login; open the link in a "
        "browser and save the file itself",
    ),
    (
        lambda head: head.startswith(LEGACY_TORCH),
        f"is in the format PyTorch wrote before 1.6; save it anew with a recent one: {RESAVE}",
    ),
    (
        re.compile(rb"\x80[\x02-\x05]").match,
        "is a bare Python pickle, which is not read because it can run commands; give a .pt file "
        "that torch.save wrote, or .safetensors",
    ),
    (
        lambda head: head[257:262] == b"ustar",
        "is a tar archive: unpack it and give the weights file inside; a .pt file of PyTorch 0.1 "
        f"must be saved anew with a recent one: {RESAVE}",
    ),
    (lambda head: head.startswith(b"\x1f\x8b"), "is compressed with gzip: unpack it with gunzip"),
    (
        lambda head: head.startswith(b"\x93NUMPY"),
        "is a numpy array, not a set of named weights; give a .pt or .safetensors file",
    ),
    (
        lambda head: head.startswith(b"\x89HDF\r\n"),
        "is an HDF5 file of Keras, which is not read; give a .pt or .safetensors file",
    ),
    (
        lambda head: head.startswith(b"PK\x05\x06"),
        "is an empty zip file: the download failed; get it again",
    ),
    (
        re.compile(rb"\s*[{\[]").match,
        "is a JSON file, not weights; of JSON files only the index of a sharded model is read, "
        "whose name ends in .index.json",
    ),
)


def kind_of(path: Path) -> Literal["torch", "safetensors"]:
    """The kind of a weights file; its name does not matter.

    Raises:
      InputError: there is no such file, or it is of another kind; the message says which.
    """
    # os.path's tests, unlike those of Path, answer no where a name is too long or out of bounds.
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give the weights file inside it")
    if not os.path.exists(path):
        raise InputError(f"there is no weights file at {path}; check the name")
    with open_regular(path) as file:
        try:
            head = file.read(HEAD)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    # A safetensors file is the length of its header, 8 bytes, then the header, which is JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= SAFETENSORS_HEADER:
        return "safetensors"
    for is_kind, message in OTHER_KINDS:
        if is_kind(head):
            raise InputError(f"{path} {message}")
    raise InputError(
        f"{path} is neither a PyTorch zip file nor a safetensors file, or it is damaged: it begins "
        f"with {head[:8]!r}"
    )
