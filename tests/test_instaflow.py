"""InstaFlow's pipeline: converted whole, its answers and FlowTurbo's on it, as the reference's."""

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

import flowturbo_jax as ft
from flowturbo_jax.pipelines.text_conversion import PipelineSources, convert_pipeline

PIPELINE = golden.FOLDER / "instaflow" / "pipeline"
PROMPTS = ["a photo of a cat", "an oil painting of the mountain and the river"]
# golden README: the reference's own float32 runs are off their float64 runs by 9e-6 (latents) and
# 3e-5 (FlowTurbo); ours sum in another order.
LATENTS, FLOWTURBO, DECODED = 1e-4, 5e-4, 3e-5
SIDE = 32  # pixels of the stored answers; the pipeline's own size is 16


@pytest.fixture(scope="module")
def stored():
    with np.load(golden.FOLDER / "instaflow" / "instaflow.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("instaflow") / "model"
    convert_pipeline(
        PipelineSources(str(PIPELINE), refiner=str(golden.FOLDER / "unet" / "unet_8ch")), out
    )
    return out


@pytest.fixture(scope="module")
def pipe(directory):
    return ft.TextToImage.load(directory).at_size(SIDE, SIDE)


def nhwc(array):
    return rearrange(array, "... c h w -> ... h w c")


def test_the_prompts_have_the_reference_tokens(pipe, stored):
    tokens = pipe.tokens(PROMPTS)
    np.testing.assert_array_equal(tokens[:, 0], stored["prompt_ids"])
    np.testing.assert_array_equal(tokens[:, 1], stored["negative_ids"])


@pytest.mark.parametrize(("name", "steps"), [("N1_g1.0", 1), ("N1_g1.5", 1), ("N4_g1.5", 4)])
def test_euler_steps_are_the_rectified_flow_pipelines(pipe, stored, name, steps):
    """N Euler steps evaluate the U-Net at 1000 (1 - i / N): never at 0."""
    noise = jnp.asarray(nhwc(stored["latents"]))
    scale = float(name.partition("g")[2])
    made = pipe.sample_latents(noise, PROMPTS, schedule=f"E{steps}", guidance_scale=scale)
    assert golden.deviation(made, nhwc(stored[f"{name}_final"])) < LATENTS


def test_eight_steps_guided_on_all_channels_by_the_official_mode_too(pipe, stored):
    noise = jnp.asarray(nhwc(stored["latents"]))
    made = pipe.sample_latents(
        noise, PROMPTS, schedule="E8", guidance_scale=1.5, guidance="official"
    )
    assert golden.deviation(made, nhwc(stored["N8_g1.5_final"])) < LATENTS


@pytest.mark.parametrize(
    ("guidance", "name"), [("paired", "two"), ("official", "all")], ids=["paired", "official"]
)
@pytest.mark.parametrize(("block", "rule"), [("R", "code"), ("Rc", "chained")])
def test_flowturbo_on_the_two_unets(pipe, stored, guidance, name, block, rule):
    noise = jnp.asarray(nhwc(stored["latents"]))
    made = pipe.sample_latents(
        noise, PROMPTS, schedule=f"H1P2{block}2", guidance_scale=1.5, guidance=guidance
    )
    expected = nhwc(stored[f"flowturbo_HPPRR_g1.5_{name}_{rule}"])
    assert golden.deviation(made, expected) < FLOWTURBO


def test_latents_decode_to_the_reference_images(pipe, stored):
    latents = jnp.asarray(nhwc(stored["N1_g1.0_final"]))
    vae = pipe.model.vae
    decoded = jax.jit(lambda params, z: vae.apply({"params": params}, z, method="decode"))(
        pipe.model.vae_params, vae.config.unscale(latents)
    )
    assert golden.deviation(decoded, nhwc(stored["N1_g1.0_decoded_nchw"])) < DECODED
    expected = np.round(255 * stored["N1_g1.0_image_nhwc01"]).astype(np.int32)
    difference = np.abs(np.asarray(pipe.decode(latents), np.int32) - expected)
    assert difference.max() <= 1  # where rounding falls on the other side
    assert (difference == 0).mean() > 0.999


def test_the_size_of_images_is_the_callers(directory):
    pipe = ft.TextToImage.load(directory)
    assert pipe.model.description.image_shape == (16, 16, 3)
    wide = pipe.at_size(16, 32)
    made = wide("a cat", seeds=3, schedule="E1")
    assert made.shape == (1, 16, 32, 3)
    assert pipe.model.description.image_shape == (16, 16, 3)


@pytest.mark.parametrize("size", [(16, 20), (0, 16), (8, 16)])
def test_a_size_the_networks_cannot_make_is_refused(pipe, size):
    with pytest.raises(ft.InputError, match="both sides must be multiples of 16"):
        pipe.at_size(*size)


def test_what_the_pipeline_says_of_itself_is_in_the_description(pipe):
    description = pipe.model.description
    assert description.takes_text
    assert description.can_guide
    assert (description.guidance, description.guidance_scale) == ("paired", 1.5)
    assert set(description.source) == {"predictor", "refiner", "vae", "text_encoder"}
    assert all(len(source["sha256"]) == 64 for source in description.source.values())
    assert dataclasses.replace(description, refiner=None).refiner is None
