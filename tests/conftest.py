"""How every test runs: which devices, which strictness, no network.

The tests run on four virtual CPU devices, on any machine. On a GPU machine, with the CUDA jaxlib:

    FLOWTURBO_TEST_PLATFORM=cuda,cpu python -m pytest -m gpu

Nothing here reaches into a subprocess a test starts, except the environment variables.
"""

import atexit
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# JAX reads both variables at its first use. JAX_PLATFORMS itself is not the switch, because GPU
# machines often export it, and there too a plain run has to mean the CPU.
os.environ["JAX_PLATFORMS"] = os.environ.get("FLOWTURBO_TEST_PLATFORM", "cpu")
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
if DEVICE_COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_COUNT_FLAG}=4".strip()

if "FLOWTURBO_CACHE" not in os.environ:  # commands keep their programs here, not at the user's
    os.environ["FLOWTURBO_CACHE"] = tempfile.mkdtemp(prefix="flowturbo-tests-")
    for folder in ("", "-xla"):
        atexit.register(shutil.rmtree, os.environ["FLOWTURBO_CACHE"] + folder, ignore_errors=True)

import jax  # noqa: E402  (after the environment is set)
import jaxtyping  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

QUICKLY = "jax_disable_most_optimizations"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Checks every annotation of the library at run time; it must precede the first import of it.
jaxtyping.install_import_hook("flowturbo_jax", "typecheck.check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips gpu tests where there is no GPU; without such tests JAX starts no backend here."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not any(device.platform == "gpu" for device in jax.devices()):
        reason = "no GPU among jax.devices(); on a GPU machine set FLOWTURBO_TEST_PLATFORM=cuda,cpu"
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=reason))


class NetworkAccessError(RuntimeError):
    """A test tried to reach another machine. Not an OSError, which libraries catch and retry."""


def _refuse_other_machines(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        if ipaddress.ip_address(name).is_loopback:
            return
    except ValueError:  # a host name: even its look-up would leave the machine
        pass
    raise NetworkAccessError(
        f"a test tried to reach {name!r}; tests use no network: put the data in tests/fixtures"
    )


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Lets Python sockets reach this machine only."""
    internet = (socket.AF_INET, socket.AF_INET6)
    connect, connect_ex, look_up = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def guarded_connect(self, address):
        if self.family in internet:
            _refuse_other_machines(address[0])
        return connect(self, address)

    def guarded_connect_ex(self, address):
        if self.family in internet:
            _refuse_other_machines(address[0])
        return connect_ex(self, address)

    def guarded_look_up(host, *args, **kwargs):
        _refuse_other_machines(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module() -> Iterator[None]:
    """Frees what a file compiled: a process may map 65,530 pieces of memory, a program takes some.

    With those of all test files in one process, XLA's compiler crashes for want of one.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles without most optimisations: in most tests that takes longer than what it makes.

    Files marked slow run for long, so they compile as users do, and so do single tests marked slow
    (`optimised_where_it_runs_long`). Results differ in rounding only.
    """
    marks = getattr(request.module, "pytestmark", [])
    marks = marks if isinstance(marks, list) else [marks]
    jax.config.update(QUICKLY, not any(mark.name in ("slow", "gpu") for mark in marks))
    yield
    jax.config.update(QUICKLY, False)


@pytest.fixture(autouse=True)
def optimised_where_it_runs_long(request: pytest.FixtureRequest) -> Iterator[None]:
    """A single slow test compiles as users do."""
    before = jax.config.values[QUICKLY]
    if request.node.get_closest_marker("slow"):
        jax.config.update(QUICKLY, False)
    yield
    jax.config.update(QUICKLY, before)


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Keeps what a file compiles, for files whose tests build the same programs again and again."""
    settings = {
        "jax_compilation_cache_dir": os.environ["FLOWTURBO_CACHE"] + "-xla",
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def programs_are_kept_by_one_test_only() -> Iterator[None]:
    """A command that runs in this process turns that on; the next test begins without."""
    yield
    if "flowturbo_jax.pipelines.program_cache" in sys.modules:
        sys.modules["flowturbo_jax.pipelines.program_cache"].enable("off")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of stored inputs and expected outputs."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture
def float64() -> Iterator[None]:
    """For one test only: rounding far below the errors that are measured."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """No run-time check of annotations: what the library itself says of wrong types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
