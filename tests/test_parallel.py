import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import parallel
from flowturbo_jax.interfaces import InputError


def step(state, frozen, batch, mean):
    value = mean(jnp.mean(batch["x"]) * frozen)
    return {"count": state["count"] + 1, "sum": state["sum"] + value}


def start():
    return {"count": jnp.zeros((), jnp.int32), "sum": jnp.zeros(())}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_state_keeps_its_shape_and_value_on_any_number_of_devices(count):
    devices = jax.devices()[:count]
    run = parallel.data_parallel(step, devices)
    state = parallel.replicate(start(), devices)
    frozen = parallel.replicate(jnp.asarray(2.0), devices)
    for _ in range(3):
        old, state = state, run(state, frozen, {"x": np.arange(8, dtype=np.float32)})
        assert old["sum"].is_deleted()  # its buffer is reused, not held twice
    assert state["sum"].shape == ()
    assert int(state["count"]) == 3
    assert float(state["sum"]) == 3 * 2 * 3.5


def test_a_batch_that_does_not_split_names_sizes_that_do():
    with pytest.raises(InputError, match="batch_size 6 does not split over 4 devices; take 4 or 8"):
        parallel.check_batch_size(6, devices=jax.devices()[:4])
    with pytest.raises(InputError, match=r"take 4$"):
        parallel.check_batch_size(3, devices=jax.devices()[:4])
    run = parallel.data_parallel(step, jax.devices()[:4])
    with pytest.raises(InputError, match="does not split"):
        run(start(), jnp.asarray(1.0), {"x": np.zeros(6, np.float32)})
