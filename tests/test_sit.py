"""The SiT predictor and the refiner: reference outputs, and what their options may not change."""

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from flowturbo_jax.models import FAMILIES, SiT, SiTConfig, layers


@pytest.fixture(scope="module")
def params():
    return golden.params("sit/sit", golden.SIT)


@pytest.fixture(scope="module")
def inputs():
    stored = golden.arrays("sit/sit_forward")
    return tuple(jnp.asarray(stored[name]) for name in ("x", "t", "y"))


def random_params(config):
    """Parameters away from the fresh ones, whose output is zero; the position table stays."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(SiT(config).initialise, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract)
    side = config.input_size // config.patch_size
    return {**params, "position_table": layers.position_table(side, config.hidden_size)}


def random_inputs(config, batch=3):
    rng = np.random.default_rng(1)
    side, channels = config.input_size, config.in_channels * config.in_channels_scale
    x = jnp.asarray(rng.normal(size=(batch, side, side, channels)), jnp.float32)
    labels = jnp.asarray(rng.integers(max(config.num_classes, 1), size=batch), jnp.int32)
    t = jnp.asarray(rng.uniform(size=batch), jnp.float32)
    return x, t, labels if config.num_classes else None


@pytest.mark.parametrize(
    ("weights", "config", "arrays", "output"),
    [
        ("sit/sit", golden.SIT, "sit/sit_forward", "out"),
        ("sit/sit_micro", golden.MICRO, "sit/sit_micro_train_forward", "out_model"),
    ],
)
def test_predictor_matches_the_reference(weights, config, arrays, output):
    stored = golden.arrays(arrays)
    network = golden.predictor(golden.params(weights, config), config)
    out = network(*(jnp.asarray(stored[name]) for name in ("x", "t", "y")))
    assert golden.deviation(out, stored[output]) < golden.FORWARD
    assert golden.deviation(out, stored[f"{output}_f64"]) < golden.FORWARD


@pytest.mark.parametrize(
    ("weights", "output"), [("refiner/refiner", "out"), ("refiner/refiner_ema", "out_ema")]
)
def test_refiner_matches_the_reference(weights, output):
    stored = golden.arrays("refiner/refiner_forward")
    network = golden.refiner(golden.params(weights, golden.REFINER))
    out = network(*(jnp.asarray(stored[name]) for name in ("x", "v", "t", "y")))
    assert golden.deviation(out, stored[output]) < golden.FORWARD


@pytest.mark.parametrize(
    ("weights", "config"),
    [("sit/sit", golden.SIT), ("sit/sit_micro", golden.MICRO), ("refiner/refiner", golden.REFINER)],
)
def test_computed_position_table_is_the_stored_one(weights, config):
    stored = golden.weights(weights)["pos_embed"]
    computed = layers.position_table(config.input_size // config.patch_size, config.hidden_size)
    # Both are sines in float64, rounded once: at most one unit in the last place of 1.
    np.testing.assert_allclose(computed, stored, rtol=0, atol=6e-8)


def test_time_features_are_cosines_then_sines_of_t_itself():
    features = np.asarray(layers.time_features(jnp.asarray([0.0, 1.12]), 256), np.float64)
    frequencies = 10_000.0 ** (-np.arange(128) / 128)
    np.testing.assert_array_equal(features[0], [1.0] * 128 + [0.0] * 128)
    expected = np.concatenate([np.cos(1.12 * frequencies), np.sin(1.12 * frequencies)])
    np.testing.assert_allclose(features[1], expected, rtol=0, atol=2e-7)  # float32 angles near 1


def test_one_time_for_all_is_that_time_for_each(params, inputs):
    x, _, labels = inputs
    network = golden.predictor(params)
    one, each = network(x, jnp.asarray(0.3), labels), network(x, jnp.full(len(x), 0.3), labels)
    np.testing.assert_array_equal(one, each)
    assert golden.deviation(one, network(x, jnp.asarray(0.31), labels)) > 1e-3


def test_each_sample_sees_its_own_time_and_label_only(params, inputs):
    x, t, labels = inputs
    network = golden.predictor(params)
    both = network(x, t, labels)
    alone = network(x[1:2], t[1:2], labels[1:2])
    np.testing.assert_allclose(both[1:2], alone, rtol=0, atol=golden.FORWARD)
    changed = network(x, t.at[0].set(0.77), labels.at[0].set(9))
    assert golden.deviation(both[0], changed[0]) > 1e-3
    np.testing.assert_allclose(both[1:], changed[1:], rtol=0, atol=golden.FORWARD)


def test_null_label_is_a_row_of_its_own(params, inputs):
    x, t, _ = inputs
    assert golden.SIT.null_label == 10
    network = golden.predictor(params)
    rows = [network(x[:1], t[:1], jnp.asarray([label])) for label in (8, 9, 10)]
    distances = [golden.deviation(a, b) for a, b in ((rows[0], rows[2]), (rows[1], rows[2]))]
    assert min(distances) > 1e-3


@pytest.fixture(scope="module")
def output_and_gradient():
    """Of the network as it is."""
    return value_and_gradient(SiT(golden.MICRO))


def value_and_gradient(network):
    def loss_and_output(params):
        out = network.apply({"params": params}, *random_inputs(network.config))
        return jnp.mean(jnp.square(out)), out

    compiled = jax.jit(
        jax.grad(loss_and_output, has_aux=True), compiler_options=golden.QUICK_COMPILE
    )
    grads, out = compiled(random_params(network.config))
    return out, grads


@pytest.mark.parametrize("options", [{"unroll": True}, {"remat": True}])
def test_option_changes_neither_the_output_nor_the_gradient(output_and_gradient, options):
    out, grads = value_and_gradient(SiT(golden.MICRO, **options))
    expected_out, expected_grads = output_and_gradient
    # The same sums, which XLA may fuse in another order: float32 keeps 6e-8 of each term.
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=golden.FORWARD)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads))
    errors = jax.tree.map(golden.deviation, grads, expected_grads)
    assert max(jax.tree.leaves(errors)) < 1e-5 * largest


@pytest.mark.parametrize("options", [{"unroll": True}, {"remat": True}, {"dtype": jnp.bfloat16}])
def test_option_changes_no_parameter(options):
    changed = jax.eval_shape(SiT(golden.MICRO, **options).initialise, jax.random.key(0))
    assert changed == jax.eval_shape(SiT(golden.MICRO).initialise, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype(jnp.float32)}


def test_position_table_gets_no_gradient(output_and_gradient):
    _, grads = output_and_gradient
    np.testing.assert_array_equal(grads["position_table"], np.zeros((1, 16, 24)))
    assert float(jnp.abs(grads["patch_embedding"]["kernel"]).max()) > 1e-3


def test_every_option_changes_the_program():
    def program(**options):
        network = SiT(golden.MICRO, **options)
        params = jax.eval_shape(network.initialise, jax.random.key(0))
        return str(jax.make_jaxpr(network.apply)({"params": params}, *random_inputs(golden.MICRO)))

    options = [{}, {"unroll": True}, {"remat": True}, {"dtype": jnp.bfloat16}]
    assert len({program(**option) for option in options}) == 4


def test_blocks_are_stacked_on_a_first_axis_and_differ():
    fresh = golden.fresh_params(golden.MICRO)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(fresh["blocks"])} == {golden.MICRO.depth}
    kernel = fresh["blocks"]["attention"]["qkv"]["kernel"]
    assert golden.deviation(kernel[0], kernel[1]) > 1e-2


def test_program_size_does_not_depend_on_the_depth():
    def lines(depth):
        config = dataclasses.replace(golden.MICRO, depth=depth)
        network = SiT(config)
        abstract = jax.eval_shape(network.initialise, jax.random.key(0))
        return str(
            jax.make_jaxpr(network.apply)({"params": abstract}, *random_inputs(config))
        ).count("\n")

    assert lines(2) == lines(40)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_network_returns_the_dtype_of_x_and_stays_close(params, inputs, dtype):
    x, t, labels = inputs
    exact = golden.predictor(params)(x, t, labels)
    out = golden.apply(SiT(golden.SIT, dtype=jnp.bfloat16), params, x.astype(dtype), t, labels)
    assert out.dtype == dtype
    # bfloat16 keeps 8 bits: 0.4 % per rounding, a few roundings deep, on outputs of up to 4.9.
    assert golden.deviation(out.astype(jnp.float32), exact) < 0.04 * float(jnp.abs(exact).max())


def test_float32_network_means_float32_whatever_the_default_precision():
    def program(precision):
        with jax.default_matmul_precision(precision):
            network = SiT(golden.MICRO)
            params = jax.eval_shape(network.initialise, jax.random.key(0))
            return str(
                jax.make_jaxpr(network.apply)({"params": params}, *random_inputs(golden.MICRO))
            )

    assert program("bfloat16") == program("highest")
    assert "HIGHEST" in program("default")


def test_fresh_predictor_answers_zero():
    x, t, labels = random_inputs(golden.MICRO)
    out = golden.predictor(golden.fresh_params(golden.MICRO), golden.MICRO)(x, t, labels)
    np.testing.assert_array_equal(out, np.zeros((3, *golden.MICRO.shape)))


def test_fresh_refiner_keeps_the_old_velocity():
    x, t, labels = random_inputs(golden.SIT)
    offset = golden.refiner(golden.fresh_params(golden.REFINER))(x, 2 * x, t, labels)
    np.testing.assert_array_equal(offset, np.zeros_like(x))


def test_refiner_adds_no_parameter_and_no_name_to_its_network():
    refiner, (x, t, labels) = FAMILIES["sit"].refiner(golden.REFINER), random_inputs(golden.SIT)
    key = jax.random.key(0)
    fresh = jax.eval_shape(refiner.initialise, key)
    assert fresh == jax.eval_shape(SiT(golden.REFINER).initialise, key)
    assert fresh == jax.eval_shape(refiner.init, key, x, x, t, labels)["params"]


def test_position_table_that_was_loaded_is_the_one_used(params, inputs):
    moved = {**params, "position_table": jnp.zeros_like(params["position_table"])}
    assert (
        golden.deviation(golden.predictor(moved)(*inputs), golden.predictor(params)(*inputs)) > 0.1
    )


def test_unconditional_model_has_no_labels():
    config = dataclasses.replace(golden.MICRO, num_classes=0)
    params = random_params(config)
    assert "label_embedding" not in params
    assert config.null_label is None
    x, t, labels = random_inputs(config)
    out = golden.predictor(params, config)(x, t, labels)
    assert (labels, out.shape) == (None, x.shape)
    assert float(jnp.abs(out).max()) > 1e-3


def test_model_without_a_null_class_has_a_row_per_class_only():
    config = dataclasses.replace(golden.MICRO, null_class=False)
    abstract = jax.eval_shape(SiT(config).initialise, jax.random.key(0))
    table = abstract["label_embedding"]["embedding"]
    assert (table.shape, config.null_label) == ((10, 24), None)


def test_unused_output_channels_do_not_matter(params, inputs):
    config = dataclasses.replace(golden.SIT, learn_sigma=False)

    def keep(array):
        half = rearrange(array, "... (p q c) -> ... p q c", p=2, q=2)[..., : config.in_channels]
        return rearrange(half, "... p q c -> ... (p q c)")

    linear = jax.tree.map(keep, params["final"]["linear"])
    halved = {**params, "final": {**params["final"], "linear": linear}}
    expected = golden.predictor(params)(*inputs)
    # The same products with half of the columns; XLA may tile them differently.
    np.testing.assert_allclose(
        golden.predictor(halved, config)(*inputs), expected, rtol=0, atol=golden.FORWARD
    )


def test_patches_of_other_sizes_return_to_their_place():
    config = SiTConfig(
        input_size=12,
        patch_size=4,
        in_channels=3,
        hidden_size=48,
        depth=2,
        num_heads=3,
        num_classes=5,
        learn_sigma=False,
    )
    # Gates of zero keep the tokens apart, so that an output patch sees its own input patch only.
    params = random_params(config)
    params["blocks"]["modulation"] = jax.tree.map(np.zeros_like, params["blocks"]["modulation"])
    assert params["final"]["linear"]["kernel"].shape == (48, 4 * 4 * 3)
    network = golden.predictor(params, config)
    x, t, labels = random_inputs(config)
    moved = np.abs(
        np.asarray(network(x.at[:, 5, 9, 1].add(1.0), t, labels)) - network(x, t, labels)
    )
    assert moved.shape == (3, 12, 12, 3)
    assert moved[:, 4:8, 8:12].min() > 0
    moved[:, 4:8, 8:12] = 0
    np.testing.assert_array_equal(moved, np.zeros_like(moved))
