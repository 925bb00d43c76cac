"""Networks in bfloat16: off by rounding, with their parameters rounded once."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from half_precision import errors

from flowturbo_jax import ClassToImage


@pytest.mark.parametrize("schedule", ["H3", "H1P5R3"])
def test_bfloat16_is_off_by_rounding(schedule):
    params = (
        golden.params("sit/sit", golden.SIT),
        golden.params("refiner/refiner", golden.REFINER),
    )
    noise = jax.random.normal(jax.random.key(0), (8, *golden.SIT.shape))
    found = errors(golden.SIT, params, schedule, noise, jnp.arange(8))
    assert found["bfloat16"] < 0.05
    # The rounding of layers' inputs and outputs is most of it; sums inside layers differ.
    assert 0.5 < found["bfloat16"] / found["7 bits"] < 2
    # Three mantissa bits more: an eighth of the rounding, within the scatter of a few samples.
    assert 4 < found["7 bits"] / found["10 bits"] < 16


def test_parameters_lie_on_the_device_once_in_the_networks_dtype(tmp_path):
    directory = tiny.save_model(tmp_path / "model")
    pipe = ClassToImage.load(directory, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {jnp.dtype(jnp.bfloat16)}
    full = ClassToImage.load(directory)
    assert {leaf.dtype for leaf in jax.tree.leaves(full.params)} == {jnp.dtype(jnp.float32)}


def test_rounding_parameters_early_changes_no_bit(tmp_path):
    """A network casts each kernel to its dtype anyway, so doing it once is the same."""
    pipe = ClassToImage.load(tiny.save_model(tmp_path / "model"), dtype="bfloat16")
    noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    labels = jnp.array([1, 2])
    model = pipe.model
    rounded = pipe.sample_latents(noise, labels, schedule="H1P1R1")
    pipe.params = jax.tree.map(jnp.asarray, (model.predictor_params, model.refiner_params))
    kept = pipe.sample_latents(noise, labels, schedule="H1P1R1")
    np.testing.assert_array_equal(rounded, kept)
