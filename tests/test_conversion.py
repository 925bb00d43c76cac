"""Published files to a model directory: golden weights convert, sample and go back."""

import dataclasses
import json
import shutil
import time
from functools import partial

import golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from einops import rearrange
from safetensors.numpy import load_file, save_file

from flowturbo_jax import ClassToImage, architecture, convert, model_directory, path, trainer
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import VAE, SiT, SiTConfig, VAEConfig
from flowturbo_jax.pipelines import conversion, programs, velocity_check
from flowturbo_jax.pipelines.conversion import Sources, convert_model

FILES = golden.FOLDER


def sources(tmp_path, **fields) -> Sources:
    """The golden predictor, refiner and VAE, whose widths no published size has."""
    config = tmp_path / "heads.json"
    config.write_text('{"num_heads": 4}')
    defaults = {
        "predictor": str(FILES / "sit/sit.safetensors"),
        "refiner": str(FILES / "refiner/refiner.safetensors"),
        "vae": str(FILES / "vae/tiny"),
        "predictor_config": str(config),
        "refiner_config": str(config),
    }
    if fields.get("refiner", "") is None:
        del defaults["refiner_config"]
    return Sources(**{**defaults, **fields})


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
        conversion.export(converted, network, out)
        ours, theirs = load_file(out), golden.weights(file)
        assert set(ours) == set(theirs)
        for name, array in theirs.items():
            assert array.dtype == ours[name].dtype
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
    conversion.export(converted, "vae", tmp_path / "vae.safetensors")
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


def test_a_hostile_file_is_refused_and_leaves_nothing(tmp_path):
    given = sources(tmp_path, predictor=str(FILES / "edge/malicious_args.pt"))
    with pytest.raises(InputError, match=r"predictor: .*posix\.system"):
        convert_model(given, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json"]


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


def test_blocks_that_repa_kept_apart_are_put_together():
    state = golden.weights("sit/sit_micro")
    legacy = {
        name.replace("blocks.1.", "decoder_blocks.0."): array for name, array in state.items()
    }
    renamed, dropped = convert.with_known_names("sit", legacy)
    assert not dropped
    assert set(renamed) == set(state)
    np.testing.assert_array_equal(
        renamed["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"]
    )


def linear_model(sign: float) -> dict[str, np.ndarray]:
    """A SiT whose output is about sign times its input: what predicts noise, or a velocity."""
    config = SiTConfig(
        input_size=4,
        in_channels=4,
        patch_size=2,
        hidden_size=384,
        depth=12,
        num_heads=6,
        num_classes=3,
        learn_sigma=False,
    )
    params = jax.eval_shape(SiT(config).initialise, jax.random.key(0))
    params = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), params)
    into = np.random.default_rng(0).normal(size=(16, 384)).astype(np.float32)
    params["patch_embedding"]["kernel"] = into
    params["final"]["linear"]["kernel"] = sign * np.linalg.pinv(into).astype(np.float32) * 4
    return convert.state_from_params("sit", config, params)


def test_weights_that_predict_noise_are_told_by_their_direction(tmp_path):
    for name, sign in (("noise", 1.0), ("velocity", -1.0)):
        save_file(linear_model(sign), tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"points toward the noise \(cosine 0\.9"):
        convert_model(Sources(str(tmp_path / "noise.safetensors")), tmp_path / "a")
    convert_model(Sources(str(tmp_path / "velocity.safetensors")), tmp_path / "b")
    convert_model(
        Sources(str(tmp_path / "noise.safetensors"), check_direction=False), tmp_path / "c"
    )
    assert not (tmp_path / "a").exists()


def test_the_shipped_predictor_points_away_from_the_noise():
    model = model_directory.load("digits")
    cosine = velocity_check.noise_cosine(
        model.predictor_params, module=model.predictor, config=model.description.predictor
    )
    assert cosine < -0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "DiT-XL/2"}, "holds a DiT, which predicts noise"),
        ({"prediction": "noise"}, "trained to predict 'noise', not velocity"),
        ({"path_type": "GVP"}, "path 'GVP'; only the linear one"),
    ],
)
def test_weights_that_say_they_are_no_velocity_are_refused(tmp_path, arguments, message):
    weights = conversion.Weights({}, "ema", arguments, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message):
        velocity_check.check_objective(tmp_path / "w.pt", weights)


def test_a_file_named_as_dit_is_refused(tmp_path):
    shutil.copy(FILES / "sit/sit.safetensors", tmp_path / "DiT-XL-2-256x256.safetensors")
    given = sources(tmp_path, predictor=str(tmp_path / "DiT-XL-2-256x256.safetensors"))
    with pytest.raises(InputError, match="holds a DiT"):
        convert_model(given, tmp_path / "model")


def state_file(tmp_path, config: SiTConfig, name: str) -> str:
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.01, np.float32),
        jax.eval_shape(SiT(config).initialise, jax.random.key(0)),
    )
    path = tmp_path / f"{name}.safetensors"
    save_file(convert.state_from_params("sit", config, params), path)
    return str(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predictor_config": None}, "attention heads is not known; give --predictor-config"),
        ({"sha256": {"predictor": "abc"}}, "'abc' is no sha256"),
        ({"size": "SiT-XL/2"}, r"the predictor is 3 blocks of width 64 .* not SiT-XL/2"),
        ({"size": "SiT-Q/2"}, "unknown SiT size 'SiT-Q/2'"),
        ({"image_size": 99}, "--image-size 99 is not divisible by 4"),
        ({"image_size": 32}, "the predictor is for 16 pixel images, not 32"),
        ({"sha256": {"predictor": "0" * 64}}, "sha256"),
        ({"refiner": str(FILES / "sit/sit.safetensors")}, r"refiner: .*take 4 channels and give 8"),
        (
            {"predictor": str(FILES / "refiner/refiner.safetensors"), "predictor_config": None},
            "predictor: .*look like a refiner's",
        ),
        ({"predictor": "nowhere.pt"}, "predictor: .*nowhere.pt"),
        ({"vae": str(FILES / "sit")}, "vae: .*/sit has no weights"),
        ({"guidance": "strange"}, "guidance is 'strange'"),
        ({"guided_channels": 9}, "guided_channels is 9"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        convert_model(sources(tmp_path, **fields), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".model*"))


def test_a_refiner_of_another_resolution_is_refused(tmp_path):
    small = SiTConfig.named("SiT-S/2", input_size=8, in_channels=4, num_classes=3)
    large = SiTConfig.named("SiT-S/2", input_size=16, in_channels=4, num_classes=3)
    given = Sources(
        state_file(tmp_path, small, "predictor"), state_file(tmp_path, large.refiner(), "refiner")
    )
    with pytest.raises(InputError, match=r"another model's shape.*\(16, 16, 4\).*\(8, 8, 4\)"):
        convert_model(given, tmp_path / "model")


def test_a_vae_of_other_latents_is_refused(tmp_path):
    config = SiTConfig.named("SiT-S/2", input_size=8, in_channels=16, num_classes=3)
    given = Sources(state_file(tmp_path, config, "p"), vae=str(FILES / "vae/tiny"))
    with pytest.raises(InputError, match="VAE has 4 latent channels, the predictor moves 16"):
        convert_model(given, tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_heads": 4, "depth": 5, "hidden_size": 32},
            "depth is 5, the weights have 3; hidden_size is 32, the weights have 64",
        ),
        ({"num_heads": 3}, "hidden_size 64 is not divisible by 3"),
        ({"heads": 4}, "unknown key 'heads'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, config, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        convert_model(sources(tmp_path, predictor_config=str(file)), tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config"):
        convert_model(
            sources(tmp_path, predictor_config=str(tmp_path / "config.json")), tmp_path / "model"
        )


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


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = golden.weights("sit/sit")
    state["blocks.1.mlp.fc1.bias"][3] = np.nan
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.fc1\.bias holds values"):
        convert_model(
            sources(tmp_path, predictor=str(tmp_path / "w.safetensors")), tmp_path / "model"
        )


def test_a_directory_that_stands_is_replaced_only_when_asked(tmp_path):
    given = sources(tmp_path, refiner=None, vae=None)
    convert_model(given, tmp_path / "model")
    first = (tmp_path / "model/model.json").read_text()
    with pytest.raises(InputError, match="--force"):
        convert_model(given, tmp_path / "model")
    broken = sources(tmp_path, predictor="nowhere.pt")
    with pytest.raises(InputError, match="nowhere"):
        convert_model(broken, tmp_path / "model", force=True)
    assert (tmp_path / "model/model.json").read_text() == first
    convert_model(given, tmp_path / "model", force=True)
    with pytest.raises(InputError, match="is no model directory"):
        convert_model(given, tmp_path, force=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "vae"}, "has no vae; it has predictor, refiner"),
        ({"out": "weights.pt"}, r"ends in \.safetensors"),
    ],
)
def test_an_export_that_cannot_be_is_refused(tmp_path, arguments, message):
    given = {"network": "refiner", "out": "weights.safetensors", **arguments}
    with pytest.raises(InputError, match=message):
        conversion.export("digits", given["network"], tmp_path / given["out"])


def test_an_export_replaces_a_file_only_when_asked(tmp_path):
    out = tmp_path / "refiner.safetensors"
    out.write_text("mine")
    with pytest.raises(InputError, match="--force"):
        conversion.export("digits", "refiner", out)
    assert out.read_text() == "mine"
    conversion.export("digits", "refiner", out, force=True)
    state = load_file(out)
    refiner = model_directory.load("digits")
    back = convert.params_from_state("sit", refiner.description.refiner, state)
    jax.tree.map(np.testing.assert_array_equal, back, refiner.refiner_params)


def test_blocks_with_a_gap_are_refused():
    state = {"blocks.0.x": np.zeros(1), "blocks.9999.x": np.zeros(1)}
    with pytest.raises(InputError, match=r"blocks\.9999, but no blocks\.1"):
        convert.block_count(state)


def test_names_from_files_cannot_drive_a_terminal(tmp_path, capsys):
    state = {
        **golden.weights("sit/sit"),
        "\x1b]0;mine\x07\x1b[2J" + "x" * 500: np.zeros(1, np.float32),
    }
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="is not known") as error:
        convert_model(sources(tmp_path, predictor=str(tmp_path / "w.safetensors")), tmp_path / "m")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_many_names_take_no_time_out_of_proportion():
    state = {f"projectors.{i % 9999}.{i // 9999}.weight": np.zeros(1) for i in range(90_000)}
    start = time.perf_counter()
    kept, dropped = convert.with_known_names("sit", state)
    assert (len(kept), len(dropped)) == (0, 90_000)
    assert time.perf_counter() - start < 5  # 0.1 s; minutes when it grew with the square


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_per_block": 1_000_000}, "layers_per_block is"),
        ({"layers_per_block": 17}, "layers_per_block is 17; at most 16"),
        ({"block_out_channels": [32] * 2000}, "has 2000 widths"),
        ({"block_out_channels": 32}, "no list"),
        ({"in_channels": 10**400}, "in_channels is 1000"),
        ({"_class_name": "Auto\x1b[2J"}, r"is of a 'Auto.x1b"),
        ({"strange": 1}, "unknown key 'strange'"),
        ({"act_fn": "relu"}, "act_fn is 'relu'; supported is 'silu'"),
        ({"down_block_types": ["AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"latents_mean": [0.0]}, "latents_mean"),
    ],
)
def test_a_vae_config_that_cannot_be_is_refused_at_once(fields, message):
    with pytest.raises(InputError, match=message):
        architecture.vae_config({"block_out_channels": [32], **fields})


def test_a_picture_of_absurdly_many_tokens_is_refused():
    state = {**golden.weights("sit/sit"), "pos_embed": np.broadcast_to(0.0, (1, 129**2, 64))}
    with pytest.raises(InputError, match="129 x 129 tokens; at most 128"):
        architecture.sit_config(state, {"num_heads": 4}, refiner=False)


def test_a_sha256_of_an_index_is_refused(tmp_path):
    index = tmp_path / "w.safetensors.index.json"
    index.write_text("{}")
    given = sources(tmp_path, predictor=str(index), sha256={"predictor": "0" * 64})
    with pytest.raises(InputError, match="index of several files"):
        convert_model(given, tmp_path / "model")


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


def test_bfloat16_weights_convert_to_float32():
    state = golden.weights("sit/sit_micro")
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    params = convert.params_from_state("sit", golden.MICRO, halves, np.float32)
    exact = convert.params_from_state("sit", golden.MICRO, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), params, exact)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("side", [32, 64])
def test_official_sizes_are_known_by_their_shapes(size, patch, side):
    config = SiTConfig.named(
        f"SiT-{size}/{patch}", input_size=side, in_channels=4, num_classes=1000
    )
    for wanted, refiner in (
        (config, False),
        (config.refiner(), True),
        (dataclasses.replace(config, in_channels_scale=2), True),  # a SiT-S refiner, and such
    ):
        shapes = convert.official_shapes("sit", wanted)
        state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        found = architecture.sit_config(state, {}, refiner=refiner)
        assert found == wanted
    assert config.size_name == f"SiT-{size}/{patch}"


def test_a_vae_config_keeps_its_scaling():
    given = {"block_out_channels": [32, 64], "scaling_factor": 0.3611, "shift_factor": 0.1159}
    config = architecture.vae_config({**given, "layers_per_block": 2, "latent_channels": 16})
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)
    assert (config.layers_per_block, config.latent_channels) == (2, 16)
    assert architecture.vae_config({"block_out_channels": [32]}).layers_per_block == 1
    with pytest.raises(InputError, match="is of a 'AutoencoderTiny'"):
        architecture.vae_config({"_class_name": "AutoencoderTiny"})


@pytest.mark.parametrize(
    ("dropout", "classes", "null"), [(0.1, 10, True), (0, 11, False), (None, 10, True)]
)
def test_the_null_class_follows_the_label_dropout(dropout, classes, null):
    given = {"num_heads": 4} | ({} if dropout is None else {"class_dropout_prob": dropout})
    config = architecture.sit_config(golden.weights("sit/sit"), given, refiner=False)
    assert (config.num_classes, config.null_class) == (classes, null)


def test_a_thousand_rows_are_a_thousand_classes():
    state = {
        **golden.weights("sit/sit"),
        "y_embedder.embedding_table.weight": np.zeros((1000, 64), np.float32),
    }
    config = architecture.sit_config(state, {"num_heads": 4}, refiner=False)
    assert (config.num_classes, config.null_label) == (1000, None)


def test_a_refiner_trained_for_a_model_keeps_its_vae(tmp_path):
    latents = VAEConfig(latent_channels=1, block_out_channels=(4, 4), norm_num_groups=2)
    described = dataclasses.replace(tiny.description(refiner=False), vae=latents)
    params = jax.tree.map(np.asarray, jax.jit(VAE(latents).initialise)(jax.random.key(0)))
    predictor = tiny.random_params(SiT(described.predictor))
    model_directory.save(tmp_path / "model", described, predictor, None, params)
    trainer.train_and_evaluate(
        tiny.recipe(
            name="refiner",
            objective="refiner",
            model={},
            model_dir=str(tmp_path / "model"),
            steps=1,
            schedule="H1",
            evaluate_every=1,
            checkpoint_every=1,
        ),
        tmp_path / "run",
    )
    model = model_directory.load(tmp_path / "run/model")
    assert model.description.vae == latents
    jax.tree.map(np.testing.assert_array_equal, model.vae_params, params)


def test_a_refiner_as_wide_as_its_predictor_has_as_many_heads(tmp_path):
    described = convert_model(sources(tmp_path, refiner_config=None), tmp_path / "model")
    assert described.refiner == golden.REFINER
