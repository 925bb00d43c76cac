"""The Stable Diffusion autoencoder: parity with diffusers, moments, precision, bad input."""

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
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import VAE, VAEConfig
from flowturbo_jax.models.vae import Moments

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


def test_float64_reaches_the_reference_to_1e_6():
    # Not 1e-9: the softmax of jax.nn.dot_product_attention is in float32 whatever goes in.
    with jax.enable_x64(True):
        vae, params = network("tiny_oldkeys")
        vae = VAE(vae.config, dtype=jnp.float64)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        arrays = {k: jnp.asarray(a, jnp.float64) for k, a in stored("tiny_oldkeys", 0).items()}
        moments = vae.apply({"params": params}, arrays["image"], method="encode")
        decoded = vae.apply({"params": params}, arrays["latent"], method="decode")
        assert golden.deviation(moments.mean, arrays["mean_f64"]) < 1e-6
        assert golden.deviation(moments.logvar, arrays["logvar_f64"]) < 1e-6
        assert golden.deviation(decoded, arrays["decoded_f64"]) < 1e-6


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
