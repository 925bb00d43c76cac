"""The text-to-image U-Net: parity with diffusers, prepared conditions, options, sizes, names."""

import json
from functools import cache, partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from flowturbo_jax import convert, unet_architecture
from flowturbo_jax.interfaces import InputError, Timeless
from flowturbo_jax.models import FAMILIES, UNet, UNetConfig, layers, unet_blocks
from flowturbo_jax.models.unet import TextConditions

# The reference's own float32 run is off its float64 run by 1.1e-5; ours by as much.
VELOCITY = 5e-5
FOLDERS = {"unet_4ch": "instaflow/pipeline/unet", "unet_8ch": "unet/unet_8ch"}
CASES = [("unet_4ch", 0), ("unet_4ch", 1), ("unet_8ch", 0)]  # the second is not square
TINY = UNetConfig(
    (8, 4),
    in_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_heads=(2, 4),
    cross_attention=(True, False),
    cross_attention_dim=12,
    norm_num_groups=4,
)


@cache
def network(name: str):
    folder = golden.FOLDER / FOLDERS[name]
    given = json.loads((folder / "config.json").read_text())
    config = unet_architecture.unet_config(given, refiner=name == "unet_8ch")
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    params = convert.params_from_state("unet", config, state, np.float32)
    return config, jax.tree.map(jnp.asarray, params)


def stored(name: str, case: int) -> dict[str, np.ndarray]:
    """The arrays of one case: maps `[B, H, W, C]`, and `t` in flow time.

    The reference's times 1000, 437.5 and 0 are 0, 0.5625 and 1 here, and back, without rounding.
    """
    with np.load(golden.FOLDER / "unet" / f"{name}.npz") as file:
        arrays = {key[2:]: file[key] for key in file.files if key.startswith(f"{case}_")}
    maps = {k: rearrange(a, "b c h w -> b h w c") for k, a in arrays.items() if a.ndim == 4}
    return {**arrays, **maps, "t": 1 - arrays["t"] / np.float32(1000)}


def inputs_of(arrays, dtype=jnp.float32):
    return [jnp.asarray(arrays[key], dtype) for key in ("sample", "t", "encoder_hidden_states")]


@partial(jax.jit, static_argnums=0, compiler_options=golden.QUICK_COMPILE)
def apply(unet, params, *inputs):
    return unet.apply({"params": params}, *inputs)


@cache
def tiny_params(config=TINY):
    """Away from the fresh ones, whose output is zero."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(UNet(config).initialise, jax.random.key(0))
    return jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(a.dtype), abstract)


def tiny_inputs(size=TINY.sample_size, batch=2, config=TINY):
    rng = np.random.default_rng(1)
    channels = config.in_channels * config.in_channels_scale
    x = jnp.asarray(rng.normal(size=(batch, *size, channels)), jnp.float32)
    t = jnp.asarray(rng.uniform(size=batch), jnp.float32)
    return x, t, jnp.asarray(rng.normal(size=(batch, 5, config.text_width)), jnp.float32)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_velocity_matches_the_reference(name, case):
    config, params = network(name)
    arrays = stored(name, case)
    out = apply(UNet(config), params, *inputs_of(arrays))
    assert golden.deviation(out, arrays["out"]) < VELOCITY
    assert golden.deviation(out, arrays["out_f64"]) < VELOCITY


@pytest.mark.parametrize(("name", "case"), [("unet_4ch", 0), ("unet_8ch", 0)])
def test_float64_reaches_the_reference_to_1e_9(name, case):
    with jax.enable_x64(True):
        config, params = network(name)
        params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
        arrays = stored(name, case)
        out = apply(UNet(config, dtype=jnp.float64), params, *inputs_of(arrays, jnp.float64))
        assert golden.deviation(out, arrays["out_f64"]) < 1e-9


@pytest.mark.parametrize("name", FOLDERS)
def test_time_is_embedded_as_in_the_reference(name):
    config, params = network(name)
    arrays = stored(name, 0)
    t = jnp.asarray(arrays["t"])
    features = layers.time_features(1000 * (1 - t), config.block_out_channels[0])
    # Both round angles of up to 1000 to float32, by up to 3e-5, at frequencies that round by 6e-8.
    assert golden.deviation(features, arrays["time_proj"]) < 1e-4
    embedded = UNet(config).apply(
        {"params": params}, t, method=lambda net, t: net.time_embedding(t)
    )
    assert golden.deviation(embedded, arrays["time_embedding"]) < 1e-4


@pytest.mark.parametrize("name", FOLDERS)
def test_official_weights_survive_the_round_trip_bit_for_bit(name):
    config, params = network(name)
    state = convert.state_from_params("unet", config, params)
    theirs = load_file(golden.FOLDER / FOLDERS[name] / "diffusion_pytorch_model.safetensors")
    assert set(state) == set(theirs)
    for key, array in state.items():
        np.testing.assert_array_equal(array, theirs[key].astype(np.float32), err_msg=key)


@pytest.mark.parametrize(
    "fields",
    [
        {"linear_projection": True, "transformer_layers": 2},
        {"block_out_channels": (8,), "attention_heads": (1,), "cross_attention": (True,)},
        {"layers_per_block": 2, "cross_attention": (False, True)},
        {
            "block_out_channels": (16, 8, 8),
            "attention_heads": (2, 2, 2),
            "cross_attention": (False,) * 3,
        },
    ],
)
def test_any_shape_of_network_converts_both_ways(fields):
    config = UNetConfig(**{**vars(TINY), "sample_size": (8, 8), **fields})
    params = tiny_params(config)
    state = convert.state_from_params("unet", config, params)
    back = convert.params_from_state("unet", config, state)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    x, t, states = tiny_inputs((4, 8), config=config)
    out = jax.eval_shape(UNet(config).apply, {"params": params}, x, t, states)
    assert out.shape == (2, 4, 8, 3)


def test_prepared_conditions_answer_as_text_states_do():
    unet, params = UNet(TINY), tiny_params()
    x, _, states = tiny_inputs()
    times = jnp.asarray([0.0, 0.3, 0.95])
    prepared = unet.apply({"params": params}, times, states, 2, method="prepare")
    assert prepared.time.shape == (3, 2, TINY.time_width)
    assert isinstance(prepared.keys_values, Timeless)
    shapes = [leaf.shape for leaf in jax.tree.leaves(prepared.keys_values)]
    # Of the one transformer on the way down, that in the middle, and the two on the way up.
    assert shapes == [(2, 5, 2, 4)] * 2 + [(2, 5, 4, 4)] * 2 + [(2, 5, 2, 4)] * 4
    for index, t in enumerate(times):
        given = TextConditions(prepared.time[index], prepared.keys_values.value)
        ours = apply(unet, params, x, t, given)
        # The same sums in another program.
        assert golden.deviation(ours, apply(unet, params, x, jnp.full(2, t), states)) < 1e-5
        unused = apply(unet, params, x, jnp.zeros(()), given)
        np.testing.assert_array_equal(unused, ours)


def test_each_sample_sees_its_own_time_and_text_only():
    unet, params, (x, t, states) = UNet(TINY), tiny_params(), tiny_inputs()
    both = apply(unet, params, x, t, states)
    for changed in ((t.at[0].set(0.77), states), (t, states.at[0].add(1.0))):
        out = apply(unet, params, x, *changed)
        assert golden.deviation(out[0], both[0]) > 1e-3
        np.testing.assert_allclose(out[1], both[1], rtol=0, atol=1e-5)
    one = apply(unet, params, x, jnp.asarray(0.3), states)
    np.testing.assert_array_equal(one, apply(unet, params, x, jnp.full(2, 0.3), states))


def value_and_gradient(unet):
    @partial(jax.jit, compiler_options=golden.QUICK_COMPILE)
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        out = unet.apply({"params": params}, *tiny_inputs())
        return jnp.mean(jnp.square(out)), out

    grads, out = gradient(tiny_params())
    return out, grads


@pytest.fixture(scope="module")
def output_and_gradient():
    return value_and_gradient(UNet(TINY))


def test_every_parameter_gets_a_gradient(output_and_gradient):
    for path, leaf in jax.tree_util.tree_leaves_with_path(output_and_gradient[1]):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-7, path


def test_remat_changes_the_program_but_neither_output_nor_gradient(output_and_gradient):
    out, grads = value_and_gradient(UNet(TINY, remat=True))
    np.testing.assert_allclose(out, output_and_gradient[0], rtol=0, atol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    errors = jax.tree.map(golden.deviation, grads, output_and_gradient[1])
    assert max(jax.tree.leaves(errors)) < 1e-5 * largest
    program = jax.make_jaxpr(UNet(TINY, remat=True).apply)
    recomputed = str(program({"params": tiny_params()}, *tiny_inputs())).count("remat2[")
    assert recomputed == 8 + 4  # residual layers and transformers


def test_a_batch_by_vmap_is_the_batch():
    unet, params, inputs = UNet(TINY), tiny_params(), tiny_inputs()

    def one(x, t, states):
        return apply(unet, params, x[None], t, states[None])[0]

    expected = apply(unet, params, *inputs)
    np.testing.assert_allclose(jax.vmap(one)(*inputs), expected, rtol=0, atol=1e-5)


def test_bfloat16_network_returns_the_dtype_of_x_and_stays_close():
    config, params = network("unet_8ch")
    arrays = stored("unet_8ch", 0)
    x, t, states = inputs_of(arrays)
    half = UNet(config, dtype=jnp.bfloat16)
    out = apply(half, params, x, t, states)
    assert out.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4 % per rounding, a few dozen layers deep.
    error = np.linalg.norm(out - arrays["out"]) / np.linalg.norm(arrays["out"])
    assert 2**-10 < error < 10 * 2**-8
    out = jax.eval_shape(half.apply, {"params": params}, x.astype(jnp.bfloat16), t, states)
    assert out.dtype == jnp.bfloat16


def test_time_is_embedded_in_float32_in_a_bfloat16_network():
    config, params = network("unet_4ch")
    t = jnp.asarray([0.5, 0.501])
    embed = lambda net, t: net.time_embedding(t)  # noqa: E731
    exact = UNet(config).apply({"params": params}, t, method=embed)
    half = UNet(config, dtype=jnp.bfloat16).apply({"params": params}, t, method=embed)
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))
    # In bfloat16 500 and 499 are 2 apart at most: one step would be lost.
    assert golden.deviation(exact[0], exact[1]) > 1e-2


@pytest.mark.parametrize("options", [{"remat": True}, {"dtype": jnp.bfloat16}])
def test_option_changes_no_parameter(options):
    changed = jax.eval_shape(UNet(TINY, **options).initialise, jax.random.key(0))
    assert changed == jax.eval_shape(UNet(TINY).initialise, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype(jnp.float32)}


def test_only_self_attention_takes_another_implementation(monkeypatch):
    seen, params = [], tiny_params()

    def attend(q, k, v, implementation="xla"):
        seen.append((k.shape[1], implementation))
        return q

    monkeypatch.setattr(unet_blocks, "attend", attend)
    unet = UNet(TINY, attention="cudnn")
    jax.eval_shape(unet.apply, {"params": params}, *tiny_inputs())
    fine, coarse, text = (32, "cudnn"), (8, "cudnn"), (5, "xla")
    assert seen == [fine, text, coarse, text, fine, text, fine, text]


def test_float32_network_means_float32_whatever_the_default_precision():
    def program(precision):
        with jax.default_matmul_precision(precision):
            inputs = tiny_inputs()
            return str(jax.make_jaxpr(UNet(TINY).apply)({"params": tiny_params()}, *inputs))

    assert program("bfloat16") == program("highest")
    assert "HIGHEST" in program("default")


def test_fresh_predictor_answers_zero_and_a_fresh_refiner_keeps_the_velocity():
    family, key = FAMILIES["unet"], jax.random.key(0)
    inputs = tiny_inputs()
    for network in (family.predictor(TINY), family.refiner(TINY.refiner())):
        last = jax.jit(lambda key, net: net.initialise(key)["conv_out"], static_argnums=1)
        for leaf in jax.tree.leaves(last(key, network)):
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    fresh = {**tiny_params(), "conv_out": last(key, UNet(TINY))}
    out = apply(UNet(TINY), fresh, *inputs)
    np.testing.assert_array_equal(out, np.zeros_like(out))


def test_refiner_adds_no_parameter_and_no_name_to_its_network():
    refiner, key = FAMILIES["unet"].refiner(TINY.refiner(), remat=True), jax.random.key(0)
    x, t, states = tiny_inputs()
    fresh = jax.eval_shape(refiner.initialise, key)
    assert fresh == jax.eval_shape(UNet(TINY.refiner()).initialise, key)
    assert fresh == jax.eval_shape(refiner.init, key, x, x, t, states)["params"]
    offset = jax.eval_shape(refiner.apply, {"params": fresh}, x, x, t, states)
    assert offset.shape == x.shape


def test_latents_of_other_sizes_are_taken():
    x, t, states = tiny_inputs((2, 2))  # one pixel at the coarsest resolution
    assert jnp.isfinite(apply(UNet(TINY), tiny_params(), x, t, states)).all()
    for size in ((6, 10), (16, 2), (64, 64)):
        x, t, states = tiny_inputs(size)
        out = jax.eval_shape(UNet(TINY).apply, {"params": tiny_params()}, x, t, states)
        assert out.shape == x.shape


@pytest.mark.parametrize("shape", [(1, 3, 4, 3), (1, 4, 5, 3), (1, 4, 4, 4)])
def test_latents_that_do_not_fit_are_refused(shape):
    _, _, states = tiny_inputs(batch=1)
    with pytest.raises(InputError, match=r"wants \[B, H, W, 3\] with H and W divisible by 2"):
        UNet(TINY).apply({"params": tiny_params()}, jnp.zeros(shape), jnp.zeros(()), states)
