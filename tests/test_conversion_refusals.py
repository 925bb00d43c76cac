"""What is no predictor, refiner or VAE that fits is refused, and leaves nothing behind."""

import json
import shutil

import golden
import jax
import numpy as np
import pytest
from published import FILES, sources
from safetensors.numpy import load_file, save_file

from flowturbo_jax import convert, model_directory
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import SiT, SiTConfig
from flowturbo_jax.pipelines import conversion, exporting, velocity_check
from flowturbo_jax.pipelines.conversion import Sources, convert_model


def test_a_hostile_file_is_refused_and_leaves_nothing(tmp_path):
    given = sources(tmp_path, predictor=str(FILES / "edge/malicious_args.pt"))
    with pytest.raises(InputError, match=r"predictor: .*posix\.system"):
        convert_model(given, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json"]


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
        exporting.export("digits", given["network"], tmp_path / given["out"])


def test_an_export_replaces_a_file_only_when_asked(tmp_path):
    out = tmp_path / "refiner.safetensors"
    out.write_text("mine")
    with pytest.raises(InputError, match="--force"):
        exporting.export("digits", "refiner", out)
    assert out.read_text() == "mine"
    exporting.export("digits", "refiner", out, force=True)
    state = load_file(out)
    refiner = model_directory.load("digits")
    back = convert.params_from_state("sit", refiner.description.refiner, state)
    jax.tree.map(np.testing.assert_array_equal, back, refiner.refiner_params)


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


def test_a_sha256_of_an_index_is_refused(tmp_path):
    index = tmp_path / "w.safetensors.index.json"
    index.write_text("{}")
    given = sources(tmp_path, predictor=str(index), sha256={"predictor": "0" * 64})
    with pytest.raises(InputError, match="index of several files"):
        convert_model(given, tmp_path / "model")
