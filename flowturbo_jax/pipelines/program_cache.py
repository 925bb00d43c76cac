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
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax import export

VARIABLE = "FLOWTURBO_CACHE"
OFF = "off"
DIGEST = 32  # bytes of the sha256 in front of each stored program
# What XLA's fused attention is called; JAX does not promise that another version knows it, which
# does not matter here, since the versions are part of the key.
CUSTOM_CALLS = ("__cudnn$fmhaSoftmax",)

_folder: Path | None = None


def enable(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs from now on, for later processes.

    A persistent cache that JAX was given already (JAX_COMPILATION_CACHE_DIR) stays where it is.

    Args:
      folder: where; if None that of the environment variable FLOWTURBO_CACHE, which may also say
        "off", or flowturbo_jax in the user's cache folder.

    Returns:
      The folder; None where the cache is off, or the folder cannot be written, which is logged.
    """
    global _folder
    if folder is None:
        folder = os.environ.get(VARIABLE, "") or _default()
    if str(folder) == OFF:
        _folder = None
        return None
    folder = Path(folder).expanduser().absolute()
    try:
        for part in ("programs", "xla"):
            (folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "programs"):
            pass
    except OSError as error:
        reason = error.strerror or error
        logging.warning("programs are not kept: %s: %s; set %s", folder, reason, VARIABLE)
        return None
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    # By default JAX keeps only what took a second to compile: many programs do not.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _folder = folder
    return folder


def enabled() -> bool:
    """Whether programs are kept."""
    return _folder is not None


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Does, beside what happens inside, what loading a program will take."""
    if not enabled():
        yield
        return
    with ThreadPoolExecutor(1) as beside:
        # JAX imports it to load a program on a CPU: 0.2 s, a tenth of compiling a small one.
        beside.submit(importlib.import_module, "scipy.linalg")
        source_digest()
        yield


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "flowturbo_jax"


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
    traced = None
    file = None if _folder is None else _folder / "programs" / _key(tree, shapes, selected)
    if file is not None:
        traced = _read(file)
    if traced is None:
        traced = export.export(
            jax.jit(lambda *leaves: function(*jax.tree.unflatten(tree, leaves))),
            disabled_checks=[export.DisabledSafetyCheck.custom_call(n) for n in CUSTOM_CALLS],
        )(*shapes)
        if file is not None:
            _write(file, traced.serialize())
    compiled = jax.jit(traced.call).lower(*shapes).compile()
    return lambda *arguments: compiled(*jax.tree.leaves(arguments))


def _key(tree: Any, shapes: list[jax.ShapeDtypeStruct], selected: Mapping[str, Any]) -> str:
    """The name of a stored program: sha256 of all that tracing it depends on."""
    device = jax.devices()[0]
    parts = {
        "selected": {name: repr(value) for name, value in selected.items()},
        "tree": str(tree),
        "shapes": [(shape.shape, np.dtype(shape.dtype).name) for shape in shapes],
        "device": (device.platform, device.device_kind),
        "versions": {name: importlib.metadata.version(name) for name in _libraries()},
        "source": source_digest(),
        "settings": [
            jax.config.jax_enable_x64,
            jax.config.jax_default_matmul_precision,
            jax.config.jax_default_prng_impl,
            jax.config.jax_threefry_partitionable,
        ],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _libraries() -> list[str]:
    """The libraries that a program is traced with."""
    optional = [name for name in ("qwix",) if name in sys.modules]
    return ["jax", "jaxlib", "flax", *optional]


@functools.cache
def source_digest() -> str:
    """sha256 over the library's source: another version of it never loads what this one traced."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _read(file: Path) -> export.Exported | None:
    """A stored program; None where there is none, or it is damaged."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
        logging.warning("a stored program is damaged and is made anew: %s", file)
        return None
    return export.deserialize(bytearray(content[DIGEST:]))


def _write(file: Path, content: bytes | bytearray) -> None:
    """Stores a program, whole or not at all; without room it is not kept, which is logged."""
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        draft.write_bytes(hashlib.sha256(content).digest() + content)
        os.replace(draft, file)
    except OSError as error:
        logging.warning("a program is not kept: %s: %s", file, error.strerror or error)
        draft.unlink(missing_ok=True)
