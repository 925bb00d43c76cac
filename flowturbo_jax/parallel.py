"""Every mention of devices and processes: one training step spread over all of them by `jax.pmap`.

Parameters and optimiser state are the same on every device and keep their plain shapes; batches
are split along their first axis; losses and gradients are averaged. Several processes, on one
machine or many, run the same program, each on its own devices and its own rows of every batch.
Process 0 alone writes files.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowturbo_jax.interfaces import InputError

_AXIS = "devices"
Mean = Callable[[Any], Any]
# Set by a launcher for each process it starts: their number, where JAX knows the launcher.
_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_LEAVE_SECONDS = 20
_PIECE_BYTES = 2**26  # of a tree that is handed from process to process


def join(coordinator_address: str = "", num_processes: str = "", process_id: str = "") -> None:
    """Joins the other processes of this run, if there are any; before anything uses a device.

    Without arguments, what SLURM's `srun`, Open MPI's `mpirun` or a Cloud TPU pod says of this
    process is found by JAX itself, and a process that none of them started runs alone.

    Args:
      coordinator_address: "host:port" of process 0, any free port; "auto" alone lets JAX find the
        others wherever it can, such as on a TPU pod that sets no environment.
      num_processes: how many there are, in decimal digits.
      process_id: which one this is, from 0.

    Raises:
      InputError: only some of the three are given, they make no sense, or the others do not answer.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if coordinator_address == "auto" and not (num_processes or process_id):
        _initialise()
        return
    if not any(given.values()):
        launched = max((int(os.environ.get(name) or 1) for name in _LAUNCHED), default=1)
        if launched > 1 or any("," in os.environ.get(name, "") for name in _TPU_HOSTS):
            _initialise()
        return
    if missing := [name for name, value in given.items() if not value]:
        raise InputError(f"--{missing[0]} is missing; several processes need {_flags(given)}")
    count, index = (_number(name, given[name]) for name in ("num_processes", "process_id"))
    if not index < count:
        raise InputError(
            f"--process_id is {index}, but there are {count} processes; take 0 to {count - 1}"
        )
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator_address is {coordinator_address!r}; it must be host:port of process 0"
        )
    # Without detection: a launcher that JAX knows would otherwise hand each process one device.
    _initialise(
        coordinator_address=coordinator_address,
        num_processes=count,
        process_id=index,
        cluster_detection_method="deactivate",
    )


def _initialise(**options: Any) -> None:
    try:
        # A process that fails waits so long for the others to leave, instead of five minutes.
        jax.distributed.initialize(shutdown_timeout_seconds=_LEAVE_SECONDS, **options)
    except (RuntimeError, ValueError) as error:  # a timeout is a RuntimeError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot join the other processes: {reason:.300}; give all of them "
            "--coordinator_address, --num_processes and --process_id"
        ) from error
    check_same(str(jax.local_device_count()), "number of devices")


def _flags(names: Any) -> str:
    return ", ".join(f"--{name}" for name in names)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--{name} is {text!r}; it must be a whole number")
    return int(text)


def part() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes files and says things."""
    return jax.process_index() == 0


class together:
    """Ends in every process if what is inside fails in any; no process passes it before all have.

    Args:
      what: is done inside, for the message of those in which it went well.

    Raises:
      InputError: it failed in another process. In those where it failed, its own error goes on.
    """

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        failed = _gather(np.asarray(error is not None))
        if error is None and failed.any():
            others = ", ".join(str(index) for index in np.flatnonzero(failed))
            raise InputError(f"{self._what} failed in process {others}; its message says why")


def anywhere(flag: bool) -> bool:
    """Whether a flag is set in any process; all processes have to ask."""
    return bool(_gather(np.asarray(flag)).any())


def check_same(text: str, what: str) -> None:
    """Refuses a run whose processes were not started alike.

    Args:
      text: what has to be the same in all.
      what: it is, for the message.

    Raises:
      InputError: (in every process) it is not.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    if (_gather(digest) != digest).any():
        raise InputError(f"the processes of this run do not have the same {what}; start them alike")


def from_first(tree: Any) -> Any:
    """Process 0's values of a tree of arrays that has the same shapes in every process."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(_leaf_from_first, tree)


def _leaf_from_first(leaf: Any) -> np.ndarray:
    from jax.experimental import multihost_utils

    leaf = np.asarray(leaf)
    # As bytes: the sum by which values travel would make 0 of -0, and of a NaN another.
    sent = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    pieces = range(0, max(len(sent), 1), _PIECE_BYTES)
    received = [multihost_utils.broadcast_one_to_all(sent[i : i + _PIECE_BYTES]) for i in pieces]
    return np.concatenate(received).astype(np.uint8).view(leaf.dtype).reshape(leaf.shape)


def _gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def data_parallel(
    step: Callable[..., Any], devices: list[jax.Device] | None = None, donate: bool = True
) -> Callable:
    """Compiles `step(state, frozen, batch, mean)` for all devices.

    Args:
      step: pure function of the state, parameters that do not change, this device's share of the
        batch, and `mean`, which averages a pytree over the devices. It returns a pytree that is the
        same on every device.
      devices: what to run on; all devices of all processes by default.
      donate: reuse the state's buffers: the state given is gone afterwards.

    Returns:
      `(state, frozen, batch) -> result`, where the batch is this process's part, `[B, ...]`.

    Raises:
      InputError: (by the returned function) B is not divisible by the number of devices here.
    """
    donated = (0,) if donate else ()
    devices = devices or jax.devices()
    if len(devices) == 1:
        return jax.jit(
            lambda state, frozen, batch: step(state, frozen, batch, lambda tree: tree),
            donate_argnums=donated,
        )
    mapped = jax.pmap(
        lambda state, frozen, batch: step(
            state, frozen, batch, lambda tree: jax.lax.pmean(tree, _AXIS)
        ),
        axis_name=_AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=donated,
        devices=devices,
    )
    here = sum(device.process_index == jax.process_index() for device in devices)

    def run(state: Any, frozen: Any, batch: Any) -> Any:
        return mapped(state, frozen, jax.tree.map(lambda a: _split(a, here), batch))

    return run


def replicate(tree: Any, devices: list[jax.Device] | None = None) -> Any:
    """Puts a copy of every array on each device here, once, instead of at every step."""
    devices = devices or jax.local_devices()
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    mesh = Mesh(devices, (_AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def check_batch_size(
    batch_size: int, micro_batches: int = 1, devices: list[jax.Device] | None = None
) -> None:
    """Refuses a batch that does not split evenly over devices, and over micro-batches on each.

    Raises:
      InputError: it does not; the message names the nearest sizes that do.
    """
    _check_splits(batch_size, len(devices or jax.devices()), micro_batches)


def alone() -> ocp.options.MultiprocessingOptions:
    """What keeps Orbax, which otherwise waits for all processes, to this one."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def total_devices() -> int:
    """How many devices there are, in all processes together."""
    return jax.device_count()


def local_devices() -> int:
    """How many devices this process has."""
    return jax.local_device_count()


def device_kind() -> str:
    """What the maker calls the devices, such as "NVIDIA H200"."""
    return jax.local_devices()[0].device_kind


def _check_splits(batch_size: int, devices: int, micro_batches: int = 1) -> None:
    count = devices * micro_batches
    if batch_size % count:
        lower, upper = batch_size // count * count, (batch_size // count + 1) * count
        sizes = f"{lower} or {upper}" if lower else str(upper)
        over = f"{devices} devices"
        if micro_batches > 1:
            over += f" and {micro_batches} accumulation_steps"
        raise InputError(f"batch_size {batch_size} does not split over {over}; take {sizes}")


def _split(array: Any, count: int) -> Any:
    _check_splits(array.shape[0], count)
    return array.reshape(count, -1, *array.shape[1:])


def map_batch(
    function: Callable[[Any, Any], Any], devices: list[jax.Device] | None = None
) -> Callable[[Any, Any], Any]:
    """Compiles `function(params, batch) -> result` for all devices of this process.

    Args:
      function: pure function of parameters and of a device's share of the batch; the first axis of
        what it returns is the batch's.
      devices: what to run on; all local devices by default.

    Returns:
      `(params, batch) -> result`, where batch and result are whole, `[B, ...]`. Parameters that
      `replicate` has put on the same devices are not moved again.

    Raises:
      InputError: (by the returned function) B is not divisible by the number of devices.
    """
    devices = devices or jax.local_devices()
    if len(devices) == 1:
        return jax.jit(function)
    mapped = jax.pmap(function, in_axes=(None, 0), devices=devices)

    def run(params: Any, batch: Any) -> Any:
        result = mapped(params, jax.tree.map(lambda a: _split(a, len(devices)), batch))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), result)

    return run
