"""Every mention of devices: one training step spread over all of them by `jax.pmap`.

Parameters and optimiser state are the same on every device and keep their plain shapes; batches
are split along their first axis; losses and gradients are averaged.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowturbo_jax.interfaces import InputError

_AXIS = "devices"
Mean = Callable[[Any], Any]


def data_parallel(step: Callable[..., Any], devices: list[jax.Device] | None = None) -> Callable:
    """Compiles `step(state, frozen, batch, mean)` for all devices.

    Args:
      step: pure function of the state, parameters that do not change, this device's share of the
        batch, and `mean`, which averages a pytree over the devices. It returns a pytree that is the
        same on every device.
      devices: what to run on; all local devices by default.

    Returns:
      `(state, frozen, batch) -> result`, where the batch is whole, `[B, ...]`. The state's buffers
      are reused: the state given is gone afterwards.

    Raises:
      InputError: (by the returned function) B is not divisible by the number of devices.
    """
    devices = devices or jax.local_devices()
    if len(devices) == 1:
        return jax.jit(
            lambda state, frozen, batch: step(state, frozen, batch, lambda tree: tree),
            donate_argnums=0,
        )
    mapped = jax.pmap(
        lambda state, frozen, batch: step(
            state, frozen, batch, lambda tree: jax.lax.pmean(tree, _AXIS)
        ),
        axis_name=_AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=devices,
    )

    def run(state: Any, frozen: Any, batch: Any) -> Any:
        return mapped(state, frozen, jax.tree.map(lambda a: _split(a, len(devices)), batch))

    return run


def replicate(tree: Any, devices: list[jax.Device] | None = None) -> Any:
    """Puts a copy of every array on each device, once, instead of at every step."""
    devices = devices or jax.local_devices()
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    mesh = Mesh(devices, (_AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def check_batch_size(batch_size: int, devices: list[jax.Device] | None = None) -> None:
    """Refuses a batch that does not split evenly over the devices.

    Raises:
      InputError: it does not; the message names the nearest sizes that do.
    """
    _check_splits(batch_size, len(devices or jax.local_devices()))


def _check_splits(batch_size: int, count: int) -> None:
    if batch_size % count:
        lower, upper = batch_size // count * count, (batch_size // count + 1) * count
        sizes = f"{lower} or {upper}" if lower else str(upper)
        raise InputError(
            f"batch_size {batch_size} does not split over {count} devices; take {sizes}"
        )


def _split(array: Any, count: int) -> Any:
    _check_splits(array.shape[0], count)
    return array.reshape(count, -1, *array.shape[1:])
