"""Models of several files: sharded weights by their index, and folders as diffusers writes them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch_file_writer as writer
from safetensors.numpy import save_file

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights import Weights, open_folder, open_weights
from flowturbo_jax.weights.files import FOLDER_FILES

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
STATE = {"a": A, "b": B}
MAP = {"a": "model-1.safetensors", "b": "model-2.bin"}
CONFIG = {"_class_name": "AutoencoderKL", "sample_size": 256}


def assert_same(weights: Weights, wanted: dict[str, np.ndarray]) -> None:
    assert weights.tensors.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(np.asarray(weights.tensors[name]), array)


@pytest.fixture
def index(tmp_path) -> Path:
    """A sound sharded model, one shard of either format."""
    save_file({"a": A}, tmp_path / "model-1.safetensors")
    writer.save(tmp_path / "model-2.bin", {"b": B})
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": MAP}))
    return path


def test_shards_are_put_together(index):
    weights = open_weights(index)
    assert_same(weights, STATE)
    assert (weights.origin, weights.arguments, weights.path) == ("", {}, index)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({**MAP, "c": "model-1.safetensors"}, "they differ in 'c'"),
        ({"b": "model-2.bin", "x": "model-1.safetensors"}, "they differ in 'a', 'x'"),
        ({**MAP, "c": "model-3.bin"}, r"there is no weights file at .*model-3\.bin"),
        ({"a": "../model-1.safetensors"}, "names '../model-1.safetensors' as a shard"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd' as a shard"),
        ({"a": "..\\x.bin"}, "as a shard"),
        ({"a": "c:x.bin"}, "as a shard"),
        ({"a": ".."}, "names '..' as a shard"),
        ({"a": ""}, "names '' as a shard"),
        ({"a": "x\ny"}, r"names 'x\\ny' as a shard"),
        ({"a": 5}, "names a value of type int as a shard"),
        ({"a": ["model-1.safetensors"]}, "names a value of type list as a shard"),
        ({"a": "diffusion_pytorch_model.safetensors.index.json"}, "is a JSON file"),
        ({"a": "folder"}, "is a folder"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(index, weight_map, message):
    (index.parent / "folder").mkdir()
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message) as caught:
        open_weights(index)
    assert str(caught.value).isprintable()


def test_a_training_checkpoint_is_no_shard(index):
    writer.save(index.parent / "model-2.bin", {"model": {"b": B}})
    with pytest.raises(InputError, match="is a training checkpoint, not a shard"):
        open_weights(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "as JSON"),
        (b"\xff\xfe", "as JSON"),
        (b"[" * 100_000, "as JSON"),
        (b"[1]", "must hold a JSON object, not a value of type list"),
        (b" " * (17 << 20), "too large for a JSON file"),
        (b"{}", "has no weight_map"),
    ],
)
def test_a_damaged_index_is_refused(index, content, message):
    index.write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_weights(index)
    index.unlink()
    with pytest.raises(InputError, match="No such file"):
        open_weights(index)


def write(path: Path, state: dict[str, np.ndarray]) -> None:
    """Writes weights in the format of the name."""
    if path.name.endswith(".index.json"):
        shard = path.with_name(f"{path.name}-shard.bin")
        writer.save(shard, state)
        path.write_text(json.dumps({"weight_map": dict.fromkeys(state, shard.name)}))
    elif path.suffix == ".bin":
        writer.save(path, state)
    else:
        save_file(state, path)


def test_the_best_weights_of_a_folder_are_taken(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(
        InputError, match=r"has no weights; looked for diffusion_pytorch_model\.saf"
    ):
        open_folder(tmp_path)
    # From the last choice to the first, each one displaces those before.
    for number, name in enumerate(reversed(FOLDER_FILES)):
        write(tmp_path / name, {"a": A + number, "b": B})
        config, weights = open_folder(tmp_path)
        assert config == CONFIG
        assert weights.path == tmp_path / name
        assert_same(weights, {"a": A + number, "b": B})
    assert "fp16" not in " ".join(FOLDER_FILES[:4])


def test_a_part_of_a_pipeline_is_found(tmp_path):
    for part, number in (("vae", 1), ("unet", 2)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(CONFIG))
        write(tmp_path / part / "diffusion_pytorch_model.safetensors", {"a": A * number})
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_folder(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert_same(open_folder(tmp_path)[1], {"a": A})
    assert_same(open_folder(str(tmp_path), part="unet")[1], {"a": A * 2})
    assert_same(open_folder(tmp_path / "unet")[1], {"a": A * 2})
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_folder(tmp_path, part="text_encoder")


def test_a_folder_without_a_sound_config_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no folder at"):
        open_folder(tmp_path / "nothing")
    write(tmp_path / "model.safetensors", STATE)
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_folder(tmp_path)
    for content in ("", "[]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match="JSON"):
            open_folder(tmp_path)
