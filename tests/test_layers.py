"""The structure of the code: imports point down, and some names have one place."""

import ast
import graphlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "flowturbo_jax"


class Layer(NamedTuple):
    """Files that may import any lower layer, and each other by a (from, to) pair in `peers`."""

    files: tuple[str, ...]
    peers: tuple[tuple[str, str], ...] = ()


ANY = (("*", "*"),)  # cycles are refused everywhere, by find_cycle
LAYERS = (  # lowest first; patterns are relative to the package, but for the two entry scripts
    Layer(("interfaces.py",)),
    Layer(("models/*", "images.py"), peers=(("models/*", "models/*"),)),
    Layer(
        ("path.py", "spacing.py", "schedule.py", "blocks.py", "guidance.py", "multistep.py"),
        peers=(("*", "path.py"), ("schedule.py", "spacing.py")),
    ),
    Layer(("sampler.py", "objective.py", "inpainting.py")),
    Layer(
        (
            "train_state.py",
            "checkpoint.py",
            "run_checkpoints.py",
            "run_folder.py",
            "growing_arrays.py",
            "plots.py",
            "markdown.py",
            "stopping.py",
            "throughput.py",
            "data/*",
            "parallel.py",
            "model_description.py",
            "model_directory.py",
            "learnt_solver.py",
            "solver_files.py",
            "model_files.py",
            "quantization.py",
            "logbook.py",
            "recipe.py",
            "train_config.py",
            "sample_config.py",
            "metrics/*",
            "name_tables.py",
            "convert.py",
            "architecture.py",
            "clip_architecture.py",
            "unet_architecture.py",
            "weights/*",
            "cost.py",
            "class_names.py",
            "tokenizer.py",
            "tokenizer_files.py",
            "hub.py",
            "mixtures.py",
            "masks.py",
            "pictures.py",
        ),
        peers=ANY,
    ),
    Layer(
        (
            "pipelines/*",
            "conditioning.py",
            "tasks.py",
            "training_autoencoder.py",
            "training_step.py",
            "training_watch.py",
            "trainer.py",
        ),
        peers=ANY,
    ),
    Layer(("demo/*",), peers=ANY),
    Layer(("commands/*", "__main__.py", "__init__.py", "../train.py", "../sample.py"), peers=ANY),
)
CORE, MODELS = (2, 3), "models/*"  # they meet in pipelines/ and trainer.py only

NEVER_IMPORTED = {
    "torch": "the product runs without PyTorch",
    "torchvision": "the product runs without PyTorch",
    "diffusers": "the product runs without PyTorch",
    "transformers": "the product runs without PyTorch",
    "jax._src": "it is private to JAX and changes without notice",
}
NOT_IN_THE_PACKAGE = {"train", "sample", "configs", "tests"}  # absent once installed
PARALLEL_ONLY = {
    "pmap",
    "local_device_count",
    "device_count",
    "process_count",
    "process_index",
}
COLLECTIVES = {"psum", "pmean", "pmax", "pmin", "all_gather", "axis_index", "ppermute"}
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "misc"}
LINE_LIMIT = 350


class Import(NamedTuple):
    """One imported dotted name, and the line that imports it."""

    name: str
    line: int


def layer_of(file: str) -> int | None:
    """The layer of a file, named relative to the package."""
    for index, layer in enumerate(LAYERS):
        if any(fnmatchcase(file, pattern) for pattern in layer.files):
            return index
    return None


def imports_of(tree: ast.AST, file: str) -> Iterator[Import]:
    """Every import in the file, lazy ones and literal import_module calls included.

    `from a import b` yields `a.b`, since b may be a module; relative imports become absolute.
    """
    package = [PACKAGE, *Path(file).parent.parts]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, node.lineno)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                base = [*base, *(module.split(".") if module else ())]
                for alias in names:
                    yield Import(".".join([*base, alias.name]), node.lineno)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                called = getattr(function, "attr", getattr(function, "id", None))
                if called in {"import_module", "__import__", "importorskip"}:
                    yield Import(name, node.lineno)


def file_of(name: str, files: set[str]) -> str | None:
    """The file of the package that a dotted name means, given the package's files."""
    parts = name.split(".")[1:]
    for length in (len(parts), len(parts) - 1):  # the last part may be a name inside the module
        stem = "/".join(parts[: max(length, 0)])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py" if stem else "__init__.py"):
            if candidate in files:
                return candidate
    return None


def may_import(importer: str, imported: str) -> bool:
    above, below = layer_of(importer), layer_of(imported)
    if above is None or below is None:
        return True  # reported once, as an unlisted file
    if above in CORE and fnmatchcase(imported, MODELS):
        return False
    peers = LAYERS[above].peers
    return below < above or (
        below == above
        and any(fnmatchcase(importer, a) and fnmatchcase(imported, b) for a, b in peers)
    )


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def read_package(root: Path) -> dict[str, ast.Module]:
    """The parsed files of the package and the entry scripts, named relative to the package."""
    package = root / PACKAGE
    paths = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    paths |= {f"../{path.name}": path for path in root.glob("*.py")}
    return {file: ast.parse(path.read_text(), path) for file, path in sorted(paths.items())}


def layer_violations(root: Path) -> list[str]:
    """Imports that point up, sideways where not listed, in a circle, or nowhere; unlisted files."""
    trees = read_package(root)
    files, graph, found = set(trees), {}, []
    for file, tree in trees.items():
        if layer_of(file) is None:
            found.append(f"{file}: in no layer; choose one for it in LAYERS, tests/test_layers.py")
        for name, line in imports_of(tree, file):
            where, top = f"{file}:{line} imports {name}", name.split(".")[0]
            if top in NOT_IN_THE_PACKAGE and not file.startswith("../"):
                found.append(f"{where}: {top} is not part of the installed package")
            if top != PACKAGE:
                continue
            imported = file_of(name, files)
            if imported is None:
                found.append(f"{where}: there is no such module")
                continue
            graph.setdefault(file, set()).add(imported)
            if not may_import(file, imported):
                found.append(
                    f"{where}: {file} (layer {layer_of(file)}) may not import "
                    f"{imported} (layer {layer_of(imported)})"
                )
    if cycle := find_cycle(graph):
        found.append(f"import cycle: {' <- '.join(cycle)}")
    return found


def forbidden_imports(root: Path) -> list[str]:
    """Imports that no Python file of the project may have, tests and configs included."""
    found = []
    for path in python_files(root):
        tree = ast.parse(path.read_text(), path)
        names = list(imports_of(tree, path.name))
        names += [
            Import("jax._src", node.lineno)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "_src"
        ]
        for name, line in names:
            for banned, reason in NEVER_IMPORTED.items():
                if f"{name}.".startswith(f"{banned}."):
                    found.append(f"{path.relative_to(root)}:{line} imports {name}: {reason}")
    return found


def parallel_violations(root: Path) -> list[str]:
    """Devices, processes and named axes mentioned outside parallel.py."""
    found = []
    for file, tree in read_package(root).items():
        if file == "parallel.py":
            continue
        found += [
            f"{file}:{node.lineno} {mention}: this belongs in parallel.py"
            for node in ast.walk(tree)
            if (mention := parallel_mention(node))
        ]
    return found


def parallel_mention(node: ast.AST) -> str | None:
    match node:
        case ast.Attribute(attr=name) if name in PARALLEL_ONLY:
            return name
        case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "jax":
            return next((alias.name for alias in names if alias.name in PARALLEL_ONLY), None)
        case ast.Call(func=function, args=args, keywords=keywords):
            called = getattr(function, "attr", getattr(function, "id", None))
            values = [keyword.value for keyword in keywords if keyword.arg == "axis_name"]
            values += args if called in COLLECTIVES else []
            literals = [value.value for value in values if isinstance(value, ast.Constant)]
            return next((f"axis name {name!r}" for name in literals if isinstance(name, str)), None)
        case (
            ast.Assign(targets=[ast.Name("axis_name")], value=ast.Constant(str(name)))
            | ast.AnnAssign(target=ast.Name("axis_name"), value=ast.Constant(str(name)))
        ):
            return f"axis name {name!r}"
    return None


def python_files(root: Path) -> list[Path]:
    """The project's Python files: not those of a virtual environment in its folder."""
    folders = (PACKAGE, "configs", "docs", "tests")
    inside = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return sorted([*root.glob("*.py"), *inside])


def shape_violations(root: Path) -> list[str]:
    """Vague names, long files, and folders that the installed package would lack."""
    found = []
    for path in python_files(root):
        name = path.relative_to(root)
        if VAGUE_NAMES & {word for part in name.with_suffix("").parts for word in part.split("_")}:
            found.append(f"{name}: name it after what it holds")
        if name.parts[0] != PACKAGE:
            continue
        if (lines := len(path.read_text().splitlines())) > LINE_LIMIT:
            found.append(f"{name}: {lines} lines, at most {LINE_LIMIT}; it holds two ideas")
        if not (path.parent / "__init__.py").exists():
            found.append(f"{name}: its folder has no __init__.py, so it would not be installed")
    return found


def test_imports_point_down():
    violations = layer_violations(ROOT)
    assert not violations, "\n".join(violations)


def test_nothing_imports_pytorch_or_private_jax():
    violations = forbidden_imports(ROOT)
    assert not violations, "\n".join(violations)


def test_devices_and_axis_names_live_in_parallel():
    violations = parallel_violations(ROOT)
    assert not violations, "\n".join(violations)


def test_files_are_short_and_named_after_what_they_hold():
    violations = shape_violations(ROOT)
    assert not violations, "\n".join(violations)


@pytest.fixture
def tree(tmp_path):
    """Writes a small project that breaks no rule, changed by the files given."""

    def write(**changes: str) -> Path:
        sources = {
            "__init__.py": "from flowturbo_jax.interfaces import Flow\n",
            "interfaces.py": "Flow = tuple\n",
            "images.py": "from flowturbo_jax import interfaces\n",
            "path.py": "from .interfaces import Flow\n",
            "blocks.py": "import jax\nfrom flowturbo_jax import path\n",
            "guidance.py": "",
            "schedule.py": "",
            "sampler.py": "from flowturbo_jax.blocks import heun\nfrom .images import decode\n",
            "parallel.py": "import jax\nrun = jax.pmap(f, axis_name='devices')\n",
            "logbook.py": "",
            "models/__init__.py": "from flowturbo_jax.models.sit import SiT\n",
            "models/sit.py": "from ..interfaces import Flow\n",
            "trainer.py": "from flowturbo_jax import models, parallel, sampler\n",
            "../train.py": "import flowturbo_jax as ft\nfrom flowturbo_jax.trainer import train\n",
            **changes,
        }
        for file, source in sources.items():
            path = tmp_path / PACKAGE / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return tmp_path

    return write


def all_violations(root: Path) -> list[str]:
    return [
        *layer_violations(root),
        *forbidden_imports(root),
        *parallel_violations(root),
        *shape_violations(root),
    ]


def test_a_tree_that_keeps_the_rules_has_no_violations(tree):
    assert all_violations(tree()) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("path.py", "from flowturbo_jax.sampler import sample", "path.py (layer 2) may not import"),
        ("path.py", "from . import sampler", "may not import sampler.py (layer 3)"),
        ("path.py", "def f():\n    import flowturbo_jax.trainer", "path.py:2 imports"),
        ("path.py", "import flowturbo_jax", "may not import __init__.py (layer 7)"),
        (
            "path.py",
            "import importlib\nimportlib.import_module('flowturbo_jax.logbook')",
            "path.py:2",
        ),
        ("guidance.py", "from flowturbo_jax.blocks import heun", "may not import blocks.py"),
        ("blocks.py", "from flowturbo_jax.models.sit import SiT", "may not import models/sit.py"),
        ("sampler.py", "from flowturbo_jax.models import sit", "may not import models/sit.py"),
        ("models/sit.py", "from .. import path", "may not import path.py"),
        ("models/sit.py", "from flowturbo_jax import images", "may not import images.py"),
        ("images.py", "from flowturbo_jax.models import sit", "may not import models/sit.py"),
        ("models/sit.py", "from flowturbo_jax.models import SiT", "import cycle: models/"),
        ("logbook.py", "import flowturbo_jax.nowhere.thing", "there is no such module"),
        ("logbook.py", "import train", "train is not part of the installed package"),
        ("surprise.py", "", "surprise.py: in no layer; choose one"),
        ("../extra.py", "", "../extra.py: in no layer; choose one"),
        ("logbook.py", "def f():\n    import torch.nn", "logbook.py:2 imports torch.nn"),
        ("../tests/test_a.py", "import pytest\npytest.importorskip('diffusers')", "PyTorch"),
        ("../configs/a.py", "from transformers import CLIP", "configs/a.py:1 imports"),
        ("logbook.py", "from jax._src import core", "private to JAX"),
        ("logbook.py", "import jax\njax._src.core", "logbook.py:2 imports jax._src"),
        ("logbook.py", "import jax\njax.device_count()", "logbook.py:2 device_count"),
        ("../train.py", "from jax import pmap", "../train.py:1 pmap"),
        ("logbook.py", "import jax\njax.vmap(f, axis_name='b')", "axis name 'b'"),
        ("logbook.py", "from jax import lax\nlax.pmean(x, 'b')", "axis name 'b'"),
        ("models/sit.py", "class M:\n    axis_name: str = 'b'", "models/sit.py:2 axis name 'b'"),
        ("models/image_utils.py", "", "models/image_utils.py: name it after what it holds"),
        ("metrics/fid.py", "", "no __init__.py"),
        ("logbook.py", "x = 1\n" * 351, "351 lines, at most 350"),
    ],
)
def test_a_broken_rule_is_found(tree, file, source, message):
    assert any(message in violation for violation in all_violations(tree(**{file: source})))
