"""Compiled programs that outlive their process: a second one loads them instead of compiling.

Two things are kept in one folder. JAX's persistent cache has what the compiler made. To find it
there takes the traced program, so that is stored too, by `jax.export`, under all it depends on.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import linen as nn
from jax import export

VARIABLE = "FLOWTURBO_CACHE"
OFF = "off"
KEPT_DAYS = 60  # what is older goes when the cache is turned on
DIGEST = 32  # bytes of the sha256 in front of each stored program
PACKAGE = __name__.partition(".")[0]
# What tracing uses; those that are not there count too.
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "einops", "ml_dtypes", "qwix")
# What XLA's fused attention is called; JAX does not promise that another version knows it, which
# does not matter here, since the versions are part of the key.
CUSTOM_CALLS = ("__cudnn$fmhaSoftmax",)
# What JAX raises where a program cannot be exported, or a file is no program.
UNSTORABLE = (ArithmeticError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
UNREADABLE = (*UNSTORABLE, AttributeError, struct.error)
# By default JAX keeps only what took a second to compile: many programs do not.
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}

_imported = time.time()
_folder: Path | None = None
_before: dict[str, Any] = {}  # JAX's settings, to go back to


def enable(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs from now on, for later processes.

    A persistent cache that JAX was given already (JAX_COMPILATION_CACHE_DIR) stays as it is.

    Args:
      folder: where, or "off"; if None what the environment variable FLOWTURBO_CACHE says, or
        flowturbo_jax in the user's cache folder.

    Returns:
      The folder; None where the cache is off, or the folder cannot be used, which is logged.
    """
    global _folder
    _disable()
    if folder is None:
        folder = os.environ.get(VARIABLE, "")
    if str(folder) == OFF:
        return None
    try:
        folder = (Path(folder) if str(folder) else _default()).expanduser().absolute()
        for part in (folder, folder / "programs", folder / "xla"):
            _own(part)
        _prune(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = getattr(error, "strerror", None) or error
        logging.warning("compiled programs are not kept: %s; set %s", reason, VARIABLE)
        return None
    if jax.config.jax_compilation_cache_dir is None:
        for name, value in {"jax_compilation_cache_dir": str(folder / "xla"), **SETTINGS}.items():
            _before[name] = getattr(jax.config, name)
            jax.config.update(name, value)
    _folder = folder
    return folder


def enabled() -> bool:
    """Whether programs are kept."""
    return _folder is not None


def _disable() -> None:
    """Back to how JAX was."""
    global _folder
    _folder = None
    for name in list(_before):
        jax.config.update(name, _before.pop(name))


def _own(folder: Path) -> None:
    """Makes a folder that nobody else can write, since programs of it are run.

    Raises:
      OSError: it cannot be written, or others can write it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise OSError(None, f"others can write {folder}")
    with tempfile.TemporaryFile(dir=folder):
        pass


def _prune(folder: Path) -> None:
    """Removes what was made long ago: another version of the library will not find it."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for part in ("programs", "xla"):
        for file in (folder / part).iterdir():
            with contextlib.suppress(OSError):  # another process removes it too
                if file.stat().st_mtime < oldest:
                    file.unlink()


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Does, beside what happens inside, what loading a program will take."""
    if not enabled():
        yield
        return
    with ThreadPoolExecutor(1) as beside:
        # JAX imports it to load a program on a CPU: 0.2 s, a tenth of compiling a small one.
        beside.submit(importlib.import_module, "scipy.linalg")
        yield


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / PACKAGE


def can_store(arguments: Any, networks: tuple[nn.Module | None, ...]) -> bool:
    """Whether a program of these networks and arguments may be stored and loaded.

    It may where the key says all it depends on: networks of this library, whose source has not
    changed since it was imported, and arrays on the default device.
    """
    known = all(map(_is_ours, networks)) and source_digest() is not None
    return enabled() and known and on_default_device(arguments)


def on_default_device(arguments: Any) -> bool:
    """Whether all of JAX's arrays in a pytree are on the device that programs are made for."""
    default = jax.config.jax_default_device or jax.devices()[0]
    arrays = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array)]
    return all(leaf.devices() == {default} for leaf in arrays)


def _is_ours(network: nn.Module | None) -> bool:
    """Whether the classes of a network, and of those inside it, are this library's."""
    if network is None:
        return True
    inside = [value for value in vars(network).values() if isinstance(value, nn.Module)]
    ours = type(network).__module__.partition(".")[0] == PACKAGE
    return ours and all(_is_ours(module) for module in inside if module is not network.parent)


def program(
    function: Callable[..., Any], arguments: tuple[Any, ...], selected: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compiles a function for these arguments, or loads what an earlier process compiled.

    Args:
      function: a pure function of arrays, traced only where it is not stored.
      arguments: pytrees of arrays, of which shapes, dtypes and structure count.
      selected: what else the traced program depends on, as values whose `repr` tells them apart.

    Returns:
      The compiled program, which takes such arguments.
    """
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves]
    file = None if _folder is None else _folder / "programs" / _key(tree, shapes, selected)
    traced = None if file is None else _read(file)

    def flat(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(tree, leaves))

    if traced is None and file is not None:
        traced = _export(flat, shapes, file)
    compiled = jax.jit(flat if traced is None else traced.call).lower(*shapes).compile()
    return lambda *arguments: compiled(*jax.tree.leaves(arguments))


def _key(tree: Any, shapes: list[jax.ShapeDtypeStruct], selected: Mapping[str, Any]) -> str:
    """The name of a stored program: sha256 of all that tracing it depends on."""
    device = jax.devices()[0]
    # What a context manager has set shows as an attribute only, and some settings have none.
    known = jax.config.values
    settings = {name: repr(getattr(jax.config, name, known[name])) for name in sorted(known)}
    parts = {
        "selected": {name: repr(value) for name, value in selected.items()},
        "tree": str(tree),
        "shapes": [(shape.shape, np.dtype(shape.dtype).name) for shape in shapes],
        "device": (device.platform, device.device_kind, device.client.platform_version),
        "versions": {name: _version(name) for name in LIBRARIES},
        "source": source_digest(),
        "settings": {name: value for name, value in settings.items() if "cache" not in name},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_digest() -> str | None:
    """sha256 over the library's source: another version never loads what this one traced.

    None where it is not known, because a file has changed since it was imported, or there is none.
    """
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    try:
        if not files or any(file.stat().st_mtime > _imported for file in files):
            return None
        return _digest_of(root, tuple(files))
    except OSError:
        return None


@functools.cache
def _digest_of(root: Path, files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _export(
    function: Callable[..., Any], shapes: list[jax.ShapeDtypeStruct], file: Path
) -> export.Exported | None:
    """Traces a program and stores it; None where JAX cannot, which is logged."""
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    try:
        traced = export.export(jax.jit(function), disabled_checks=checks)(*shapes)
        content = traced.serialize()
    except UNSTORABLE as error:
        logging.warning("a program is not kept: %s", str(error).partition("\n")[0])
        return None
    _write(file, content)
    return traced


def _read(file: Path) -> export.Exported | None:
    """A stored program; None where there is none, or it is damaged."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    try:
        if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
            return export.deserialize(bytearray(content[DIGEST:]))
    except UNREADABLE as error:
        logging.warning("a stored program cannot be read: %s", str(error).partition("\n")[0])
    logging.warning("a stored program is damaged and is made anew: %s", file)
    return None


def _write(file: Path, content: bytes | bytearray) -> None:
    """Stores a program, whole or not at all; without room it is not kept, which is logged."""
    draft = None
    try:
        handle, draft = tempfile.mkstemp(prefix=".draft-", dir=file.parent)
        with os.fdopen(handle, "wb") as out:
            out.write(hashlib.sha256(content).digest() + content)
        os.replace(draft, file)
    except OSError as error:
        logging.warning("a program is not kept: %s: %s", file, error.strerror or error)
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
