"""The Stable Diffusion autoencoder: parity with diffusers, moments, precision, cost, bad input."""

import json
from functools import cache

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from flowturbo_jax import architecture, convert
from flowturbo_jax.cost import multiply_adds
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import abstract_params
from flowturbo_jax.models import VAE, VAEConfig
from flowturbo_jax.models.vae import Moments
from flowturbo_jax.models.vae_blocks import GroupNorm, upsample

# The reference's own float32 run is off its float64 run by 3e-6, ours by as much.
CODES = 3e-5
FOLDERS = ("tiny", "tiny_oldkeys")
CASES = [("tiny", 0), ("tiny", 1), ("tiny_oldkeys", 0)]  # the second of tiny is not square


@cache
def network(name: str):
    folder = golden.FOLDER / "vae" / name
    config = architecture.vae_config(json.loads((folder / "config.json").read_text()))
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state, dropped = convert.with_known_names("vae", state)
    assert not dropped
    return VAE(config), convert.params_from_state("vae", config, state, np.float32)


def stored(name: str, case: int) -> dict[str, jax.Array]:
    with np.load(golden.FOLDER / "vae" / f"{name}.npz") as file:
        names = [key for key in file.files if key.startswith(f"{case}_")]
        return {key[2:]: jnp.asarray(rearrange(file[key], "b c h w -> b h w c")) for key in names}


def run(name: str, x, method: str):
    vae, params = network(name)
    return jax.jit(lambda params, x: vae.apply({"params": params}, x, method=method))(params, x)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_moments_match_the_reference(name, case):
    arrays = stored(name, case)
    moments = run(name, arrays["image"], "encode")
    assert golden.deviation(moments.mean, arrays["mean"]) < CODES
    assert golden.deviation(moments.logvar, arrays["logvar"]) < CODES
    if "mean_f64" in arrays:
        assert golden.deviation(moments.mean, arrays["mean_f64"]) < CODES


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_draw_and_its_scaling_match_the_reference(name, case):
    arrays = stored(name, case)
    moments = run(name, arrays["image"], "encode")
    latents = network(name)[0].config.scale(moments.sample(arrays["eps"]))
    assert golden.deviation(latents, arrays["z_scaled"]) < CODES


@pytest.mark.parametrize(("name", "case"), CASES)
def test_decoded_images_match_the_reference(name, case):
    arrays = stored(name, case)
    assert golden.deviation(run(name, arrays["latent"], "decode"), arrays["decoded"]) < CODES
    if "decoded_scaled" in arrays:
        z = network(name)[0].config.unscale(arrays["latent"])
        assert golden.deviation(run(name, z, "decode"), arrays["decoded_scaled"]) < CODES


def test_float64_reaches_the_reference_to_1e_9():
    with jax.enable_x64(True):
        vae, params = network("tiny_oldkeys")
        vae = VAE(vae.config, dtype=jnp.float64)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        arrays = {k: jnp.asarray(a, jnp.float64) for k, a in stored("tiny_oldkeys", 0).items()}
        moments = vae.apply({"params": params}, arrays["image"], method="encode")
        decoded = vae.apply({"params": params}, arrays["latent"], method="decode")
        assert golden.deviation(moments.mean, arrays["mean_f64"]) < 1e-9
        assert golden.deviation(moments.logvar, arrays["logvar_f64"]) < 1e-9
        assert golden.deviation(decoded, arrays["decoded_f64"]) < 1e-9


@pytest.mark.parametrize("name", FOLDERS)
def test_official_weights_survive_the_round_trip_bit_for_bit(name):
    vae, params = network(name)
    state = convert.state_from_params("vae", vae.config, params)
    theirs = load_file(golden.FOLDER / "vae" / name / "diffusion_pytorch_model.safetensors")
    theirs, _ = convert.with_known_names("vae", theirs)
    assert set(state) == set(theirs)
    for key, array in state.items():
        np.testing.assert_array_equal(array, theirs[key].astype(np.float32), err_msg=key)


def test_each_half_needs_its_own_parameters_only():
    vae, params = network("tiny")
    arrays = stored("tiny", 0)
    decoder = {"decoder": params["decoder"]}
    decoded = vae.apply({"params": decoder}, arrays["latent"], method="decode")
    assert decoded.shape == arrays["image"].shape
    encoder = {"encoder": params["encoder"]}
    moments = vae.apply({"params": encoder}, arrays["image"], method="encode")
    assert moments.mean.shape == arrays["latent"].shape


def test_bfloat16_is_off_by_its_rounding():
    vae, params = network("tiny")
    arrays = stored("tiny", 0)
    half = VAE(vae.config, dtype=jnp.bfloat16)
    decoded = half.apply({"params": params}, arrays["latent"], method="decode")
    assert decoded.dtype == jnp.float32
    error = np.linalg.norm(decoded - arrays["decoded"]) / np.linalg.norm(arrays["decoded"])
    # bfloat16 rounds to 2^-9 of a value; a dozen layers in a row add up to a few times that.
    assert 2**-10 < error < 10 * 2**-8


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-3), (jnp.bfloat16, 2**-8)])
def test_group_statistics_are_exact_in_float32(dtype, bound):
    # Far from 0 E[x^2] - E[x]^2 cancels in float32, and bfloat16 rounds a mean of 500 to a multiple
    # of 2, which is more than a deviation; the results themselves round to 2^-9.
    rng = np.random.default_rng(0)
    x = jnp.asarray(500 + rng.normal(size=(2, 16, 16, 16)) * [[[[1.0, 2.0] * 8]]], dtype)
    scale, bias = rng.normal(size=(2, 16)).astype(np.float32)
    norm = GroupNorm(4, dtype)
    ours = jax.jit(norm.apply)({"params": {"scale": scale, "bias": bias}}, x)
    assert ours.dtype == dtype
    groups = rearrange(np.asarray(x, np.float64), "b h w (g c) -> b (h w c) g", g=4)
    groups = (groups - groups.mean(axis=1, keepdims=True)) / groups.std(axis=1, keepdims=True)
    exact = rearrange(groups, "b (h w c) g -> b h w (g c)", h=16, w=16) * scale + bias
    assert golden.deviation(ours, exact) < bound * np.abs(exact).max()


def large_picture(x, kernel, bias):
    """What `upsample` computes, by its definition."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout) + bias


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 5), (6, 6)])
def test_upsampling_is_a_convolution_of_the_picture_with_every_pixel_doubled(size):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = ((2, *size, 3), (3, 3, 3, 7), (1, 1, 1, 7), (2, 2 * size[0], 2 * size[1], 7))
        x, kernel, bias, probe = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
        theirs = large_picture(x, kernel, bias)
        ours = upsample(x, kernel, bias[0, 0, 0])
        assert ours.shape == theirs.shape
        assert golden.deviation(ours, theirs) < 1e-12 * jnp.abs(theirs).max()

        def slope(function, *arguments):
            return jax.grad(lambda *a: jnp.sum(function(*a) * probe), argnums=(0, 1))(*arguments)

        slopes = slope(upsample, x, kernel, bias[0, 0, 0]), slope(large_picture, x, kernel, bias)
        for ours, theirs in zip(*slopes, strict=True):
            assert golden.deviation(ours, theirs) < 1e-12 * jnp.abs(theirs).max()


def test_the_kernel_of_the_upsampling_is_folded_before_it_is_rounded():
    taps = np.full((3, 3, 1, 1), 2**-9, np.float32)  # added to 1 in bfloat16 they would vanish
    taps[1, 1] = 1
    out = upsample(jnp.ones((1, 3, 3, 1), jnp.bfloat16), jnp.asarray(taps), jnp.zeros(1))
    assert out.dtype == jnp.bfloat16
    assert jnp.all(out[0, 1:-1, 1:-1] == 1 + 2**-6)


def test_gradients_of_a_decoding_are_its_slopes():
    with jax.enable_x64(True):
        vae, params = network("tiny_oldkeys")
        vae = VAE(vae.config, dtype=jnp.float64)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        rng = np.random.default_rng(0)
        z, direction = jnp.asarray(rng.normal(size=(2, 1, 4, 6, vae.config.latent_channels)))
        probe = jnp.asarray(rng.normal(size=(8, 12, vae.config.out_channels)))

        @jax.jit
        @jax.value_and_grad
        def along(step):
            decoded = vae.apply({"params": params}, z + step * direction, method="decode")
            return jnp.sum(decoded[0] * probe)

        slope = along(0.0)[1]
        step = 1e-4  # central differences are off by its square, and by rounding over it
        differences = (along(step)[0] - along(-step)[0]) / (2 * step)
        assert abs(slope - differences) < 1e-6 * abs(slope)


def test_decoding_costs_what_its_layers_do():
    vae = VAE(VAEConfig())  # Stable Diffusion's
    params = {"decoder": abstract_params(vae)["decoder"]}
    z = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
    counted = multiply_adds(lambda p, z: vae.apply({"params": p}, z, method="decode"), params, z)
    first = 32**2 * (4 * 4 + 9 * 4 * 512)
    middle = 32**2 * (4 * 9 * 512**2 + 4 * 512**2) + 2 * 1024**2 * 512
    coarse = (32**2 + 64**2) * 6 * 9 * 512**2
    medium = 128**2 * (9 * (512 * 256 + 5 * 256**2) + 512 * 256)
    fine = 256**2 * (9 * (256 * 128 + 5 * 128**2) + 256 * 128)
    last = 256**2 * 9 * 128 * 3
    # Sixteen taps for the four pixels of the large picture, and one row and column too many.
    upsampling = 16 * (33**2 * 512**2 + 65**2 * 512**2 + 129**2 * 256**2)
    assert counted == first + middle + coarse + medium + fine + last + upsampling
    on_the_large_picture = 9 * (64**2 * 512**2 + 128**2 * 512**2 + 256**2 * 256**2)
    assert 4 / 9 < upsampling / on_the_large_picture < 0.46
    assert round(counted / 1e9, 2) == 263.86  # docs/weights.md; 311.09 on the large picture


def test_scaling_undoes_itself_with_a_shift():
    config = VAEConfig(scaling_factor=0.3611, shift_factor=0.1159)  # FLUX.1's
    z = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    np.testing.assert_allclose(config.unscale(config.scale(z)), z, atol=1e-6)
    np.testing.assert_allclose(config.scale(z), (z - 0.1159) * 0.3611, atol=1e-6)


def test_moments_give_mode_and_draws():
    moments = Moments(jnp.full((1, 2, 2, 4), 3.0), jnp.full((1, 2, 2, 4), np.log(4.0)))
    assert jnp.array_equal(moments.mode(), moments.mean)
    np.testing.assert_allclose(moments.sample(jnp.ones((1, 2, 2, 4))), 5.0, rtol=1e-6)


def test_the_logarithm_of_the_variance_is_clipped():
    vae, params = network("tiny_oldkeys")
    huge = jax.tree.map(lambda a: a, params)
    huge["encoder"] = {
        **params["encoder"],
        "quant": {
            "kernel": params["encoder"]["quant"]["kernel"],
            "bias": jnp.array([0.0] * 4 + [1e3, -1e3, 1e3, -1e3]),
        },
    }
    image = stored("tiny_oldkeys", 0)["image"]
    moments = vae.apply({"params": huge}, image, method="encode")
    np.testing.assert_array_equal(moments.logvar[0, 0, 0], [20.0, -30.0, 20.0, -30.0])


@pytest.mark.parametrize(
    "fields",
    [
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        {"block_out_channels": (8,), "layers_per_block": 2},
        {"block_out_channels": (8, 16, 16), "mid_block_add_attention": False},
        {"in_channels": 1, "out_channels": 1},
    ],
)
def test_any_shape_of_network_converts_both_ways(fields):
    config = VAEConfig(
        **{"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, **fields}
    )
    vae = VAE(config)
    params = jax.eval_shape(vae.initialise, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)
    state = convert.state_from_params("vae", config, params)
    back = convert.params_from_state("vae", config, state)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    x = jnp.zeros((1, 8, 8, config.in_channels))
    assert vae.apply({"params": params}, x).shape == (1, 8, 8, config.out_channels)


@pytest.mark.parametrize("shape", [(1, 31, 32, 3), (1, 32, 33, 3), (1, 32, 32, 1)])
def test_images_that_do_not_fit_are_refused(shape):
    vae, params = network("tiny")
    with pytest.raises(InputError, match=r"wants \[B, H, W, 3\] with H and W divisible by 2"):
        vae.apply({"params": params}, jnp.zeros(shape), method="encode")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": ()}, "block_out_channels has 0 widths"),
        ({"block_out_channels": (8, -1)}, "block_out_channels is -1"),
        ({"block_out_channels": (100,)}, "100 is not divisible by norm_num_groups 32"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"latent_channels": 4.0}, r"latent_channels is 4\.0"),
        ({"use_quant_conv": 1}, "use_quant_conv is 1"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_hyper_parameters_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        VAEConfig(**fields)
