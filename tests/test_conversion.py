"""Published files to a model directory: golden weights convert, sample and go back."""

import json
import shutil
from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from published import FILES, sources
from safetensors.numpy import load_file, save_file

from flowturbo_jax import ClassToImage, convert, model_directory, path
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import SiT
from flowturbo_jax.pipelines import conversion, exporting, programs
from flowturbo_jax.pipelines.conversion import Sources, convert_model


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert_model(sources(folder), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def pipe(converted):
    return ClassToImage.load(converted)


@pytest.mark.parametrize("scale", ["1.5", "4.0"])
def test_the_published_files_give_the_published_images(pipe, scale):
    """FlowTurboAssemble's own pictures, from its noise, through its VAE."""
    stored = golden.arrays(f"sampling/H1P2R1_cfg{scale}")
    labels = np.asarray(stored["y"][:2])
    latents = pipe.sample_latents(
        jnp.asarray(stored["z"]), labels, schedule="H1P2R1", guidance_scale=float(scale)
    )
    assert golden.deviation(latents, stored["x_final"][:2]) < golden.SAMPLES
    vae, params = pipe.model.vae, pipe.model.vae_params
    decode = jax.jit(partial(vae.apply, method="decode"))
    pictures = decode({"params": params}, vae.config.unscale(latents))
    wanted = rearrange(stored["img"], "b c h w -> b h w c")
    # The VAE multiplies the latents' deviation by its slope, about 1 for these weights.
    assert golden.deviation(pictures, wanted) < golden.SAMPLES
    bytes_ = np.clip(np.round((wanted + 1) * 127.5), 0, 255)
    assert golden.deviation(pipe.decode(latents), bytes_) <= 1  # a value may lie on the edge


def test_images_are_decoded_latents_of_the_same_noise(pipe):
    noise = path.sample_noise(
        jnp.full(3, 7, jnp.uint32), jnp.arange(3, dtype=jnp.uint32), (8, 8, 4)
    )
    latents = pipe.sample_latents(noise, [1, 2, 3], schedule="H1P1R1")
    images = pipe([1, 2, 3], seeds=7, schedule="H1P1R1")
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == jnp.uint8
    assert golden.deviation(images, pipe.decode(latents)) <= 1


def test_what_is_known_of_the_weights_becomes_the_default(converted):
    description = model_directory.describe(converted)
    assert description.predictor == golden.SIT
    assert description.refiner == golden.REFINER
    assert (description.guidance, description.guided_channels) == ("official", 3)
    assert description.vae.scaling_factor == 0.18215
    assert description.image_shape == (16, 16, 3)
    source = description.source["predictor"]
    assert source["file"] == "sit.safetensors"
    assert source["sha256"] == conversion.sha256_of(FILES / "sit/sit.safetensors")


def test_shards_convert_like_one_file_and_are_all_named(tmp_path, converted):
    state = golden.weights("sit/sit")
    parts = {"a.safetensors": list(state)[::2], "b.safetensors": list(state)[1::2]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    index = tmp_path / "sit.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {key: name for name, keys in parts.items() for key in keys}})
    )
    given = sources(tmp_path, predictor=str(index), refiner=None, vae=None)
    described = convert_model(given, tmp_path / "model")
    assert described.source["predictor"]["shards"] == {
        name: conversion.sha256_of(tmp_path / name) for name in parts
    }
    ours, whole = model_directory.load(tmp_path / "model"), model_directory.load(converted)
    assert ours.fingerprints["predictor"] == whole.fingerprints["predictor"]


def test_encoding_gives_scaled_latents_of_the_mode_or_of_a_draw(pipe):
    images = pipe([1, 2], schedule="H1")
    mode, draw, again = pipe.encode(images), pipe.encode(images, seed=1), pipe.encode(images, 1)
    assert mode.shape == draw.shape == (2, 8, 8, 4)
    np.testing.assert_array_equal(draw, again)
    assert golden.deviation(mode, draw) > 1e-3
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    moments = pipe.model.vae.apply({"params": pipe.model.vae_params}, x, method="encode")
    np.testing.assert_allclose(mode, moments.mean * 0.18215, atol=1e-5)


def test_exported_files_hold_the_published_bits(converted, tmp_path):
    for network, file in (("predictor", "sit/sit"), ("refiner", "refiner/refiner")):
        out = tmp_path / "new" / f"{network}.safetensors"
        exporting.export(converted, network, out)
        ours, theirs = load_file(out), golden.weights(file)
        assert set(ours) == set(theirs)
        for name, array in theirs.items():
            assert array.dtype == ours[name].dtype
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
    exporting.export(converted, "vae", tmp_path / "vae.safetensors")
    state, _ = convert.with_known_names("vae", load_file(tmp_path / "vae.safetensors"))
    assert set(state) == set(load_file(FILES / "vae/tiny/diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize(("which", "expected"), [("ema", "out_ema"), ("model", "out_model")])
def test_a_training_file_gives_its_moving_average_unless_asked(tmp_path, which, expected):
    config = tmp_path / "config.json"
    config.write_text((golden.FOLDER / "sit" / "config_micro.json").read_text())
    described = convert_model(
        Sources(str(FILES / "sit/sit_micro_train.pt"), which=which, predictor_config=str(config)),
        tmp_path / "model",
    )
    assert described.source["predictor"]["weights"] == which
    stored = golden.arrays("sit/sit_micro_train_forward")
    model = model_directory.load(tmp_path / "model")
    out = golden.apply(
        model.predictor, model.predictor_params, stored["x"], stored["t"], stored["y"]
    )
    assert golden.deviation(out, stored[expected]) < golden.FORWARD


def test_a_refiner_training_file_gives_its_moving_average(tmp_path):
    given = sources(tmp_path, refiner=str(FILES / "refiner/refiner_train.pt"))
    convert_model(given, tmp_path / "model")
    stored = golden.arrays("refiner/refiner_forward")
    model = model_directory.load(tmp_path / "model")
    x, v, t, y = (stored[key] for key in "xvty")
    out = golden.apply(model.refiner, model.refiner_params, x, v, t, y)
    assert golden.deviation(out, stored["out_ema"]) < golden.FORWARD


def test_repa_weights_lose_their_projectors_by_name_and_keep_our_clock(tmp_path):
    state = golden.weights("sit/sit_micro")
    extra = {
        "projectors.0.0.weight": np.zeros((4, 24), np.float32),
        "projectors.0.0.bias": np.zeros(4, np.float32),
    }
    save_file({**state, **extra}, tmp_path / "repa.safetensors")
    (tmp_path / "c.json").write_text('{"num_heads": 2}')
    said = []
    described = convert_model(
        Sources(str(tmp_path / "repa.safetensors"), predictor_config=str(tmp_path / "c.json")),
        tmp_path / "model",
        report=said.append,
    )
    assert any(all(name in line for name in extra) for line in said)
    assert set(described.source["predictor"]["dropped"]) == set(extra)
    assert described.predictor.reversed_time
    assert described.guidance == "paired"
    model = model_directory.load(tmp_path / "model")
    stored = golden.arrays("sit/sit_micro_train_forward")
    x, t, y = stored["x"], stored["t"], stored["y"]
    ours = golden.apply(model.predictor, model.predictor_params, x, 1 - t, y)
    theirs = golden.apply(SiT(golden.MICRO), model.predictor_params, x, t, y)
    assert golden.deviation(ours, -theirs) < golden.FORWARD


def test_the_official_config_fits_as_it_is(tmp_path):
    refiner = tmp_path / "refiner.json"
    refiner.write_text(
        json.dumps(
            {
                "in_channels": 4,
                "in_channels_scale": 2,
                "num_heads": 4,
                "depth": 1,
                "class_dropout_prob": 0.1,
            }
        )
    )
    given = sources(
        tmp_path, predictor_config=str(FILES / "sit/config.json"), refiner_config=str(refiner)
    )
    assert convert_model(given, tmp_path / "model").refiner == golden.REFINER


def test_the_official_mode_guides_three_channels_whatever_the_default(tmp_path, pipe):
    convert_model(sources(tmp_path, guidance="paired"), tmp_path / "model")
    other = ClassToImage.load(tmp_path / "model")
    noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    settings = {"schedule": "H1P1", "guidance": "official", "guidance_scale": 4.0}
    np.testing.assert_array_equal(
        other.sample_latents(noise, [1, 2], **settings),
        pipe.sample_latents(noise, [1, 2], **settings),
    )


def test_latents_without_a_vae_are_not_shown_as_images(tmp_path):
    said = []
    convert_model(sources(tmp_path, vae=None), tmp_path / "model", report=said.append)
    assert any("no --vae is given" in line for line in said)
    pipe = ClassToImage.load(tmp_path / "model")
    for call in (
        lambda: pipe([1]),
        lambda: pipe.check([1], "H1"),
        lambda: pipe.decode(jnp.zeros((1, 8, 8, 4))),
    ):
        with pytest.raises(InputError, match="no VAE to decode them"):
            call()
    latents = pipe.sample_latents(jnp.zeros((1, 8, 8, 4)), [1], schedule="H1")
    assert latents.shape == (1, 8, 8, 4)


def test_large_latents_are_decoded_and_encoded_in_tiles(pipe):
    small = jax.random.normal(jax.random.key(0), (1, 9, 10, 4))
    latents = jax.image.resize(small, (1, 72, 80, 4), "cubic")
    vae, params = pipe.model.vae, pipe.model.vae_params
    z = vae.config.unscale(latents)
    whole = jax.jit(partial(vae.apply, method="decode"))({"params": params}, z)
    tiles = np.asarray(pipe.decode(latents), np.float32) / 127.5 - 1
    assert tiles.shape == (1, 144, 160, 3)
    error = np.abs(tiles - np.clip(whole, -1, 1))
    # Rounding to bytes is 0.004; group norms and attention over a tile are most of the rest.
    assert 0.01 < error.mean() < 0.2
    images = jnp.asarray(np.asarray(pipe.decode(latents)))
    encoded = pipe.encode(images)
    assert encoded.shape == latents.shape
    x = images.astype(jnp.float32) / 127.5 - 1
    exact = vae.config.scale(vae.apply({"params": params}, x, method="encode").mean)
    assert 0 < np.abs(encoded - exact).mean() < 0.2 * np.abs(exact).mean()


def test_images_decoded_in_groups_are_the_same(pipe, monkeypatch):
    latents = jax.random.normal(jax.random.key(0), (5, 8, 8, 4))
    together = np.asarray(pipe.decode(latents), np.int32)
    monkeypatch.setattr(programs, "GROUP_PIXELS", 2 * 16 * 16)
    jax.clear_caches()
    in_groups = np.asarray(pipe.decode(latents), np.int32)
    assert np.abs(in_groups - together).max() <= 1  # a value may lie on the edge


def test_a_damaged_vae_is_refused_on_loading(tmp_path, converted):
    shutil.copytree(converted, tmp_path / "model")
    file = max((tmp_path / "model/vae").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"the vae in .* is damaged"):
        model_directory.load(tmp_path / "model")


def test_a_refiner_as_wide_as_its_predictor_has_as_many_heads(tmp_path):
    described = convert_model(sources(tmp_path, refiner_config=None), tmp_path / "model")
    assert described.refiner == golden.REFINER
