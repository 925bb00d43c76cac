import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from flowturbo_jax import checkpoint, model_directory
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import Description


def test_a_saved_model_loads_bit_for_bit(tmp_path):
    described = tiny.description()
    kind = model_directory.family("sit")
    predictor = tiny.random_params(kind.predictor(described.predictor))
    refiner = tiny.random_params(kind.refiner(described.refiner))
    model_directory.save(tmp_path / "m", described, predictor, refiner)
    model = model_directory.load(tmp_path / "m")
    assert dataclasses.replace(model.description, files_sha256={}) == described
    for saved, loaded in ((predictor, model.predictor_params), (refiner, model.refiner_params)):
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), saved, loaded)
        assert all(jax.tree.leaves(same))


def test_saving_replaces_a_model_whole_and_leaves_nothing_else(tmp_path):
    tiny.save_model(tmp_path / "m", refiner=True)
    tiny.save_model(tmp_path / "m", refiner=False)
    assert model_directory.load(tmp_path / "m").refiner is None
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["model.json", "predictor"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_keeps_the_old_model_and_leaves_no_draft(tmp_path, monkeypatch):
    tiny.save_model(tmp_path / "m")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(model_directory, "save_params", fail)
    with pytest.raises(InputError, match=r"cannot write .*/m: disk full"):
        tiny.save_model(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert model_directory.load(tmp_path / "m").refiner is not None


def test_saving_does_not_replace_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no model directory"):
        tiny.save_model(tmp_path / "m")
    assert (tmp_path / "m" / "thesis.txt").read_text() == "years of work"


def test_missing_directories_are_named(tmp_path):
    with pytest.raises(InputError, match="no model directory at 'nowhere'"):
        model_directory.load("nowhere")
    with pytest.raises(InputError, match=r"has no model\.json"):
        model_directory.load(tmp_path)


def test_a_missing_network_is_named(tmp_path):
    directory = tiny.save_model(tmp_path / "m")
    os.rename(directory / "refiner", directory / "hidden")
    with pytest.raises(InputError, match=r"m/refiner; the folder does not exist"):
        model_directory.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[]", "not of format"),
        (lambda text: "3", "is not JSON"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "not of format 1"),
        (lambda text: text.replace('"source"', '"sauce"'), r"missing \['source'\].*sauce"),
        (lambda text: text.replace('"sit"', '"dit"'), "unknown model family 'dit'"),
        (lambda text: text.replace('"depth"', '"deep"'), "predictor: .*deep"),
        (lambda text: text.replace('"hidden_size": 8', '"hidden_size": 9'), "not divisible"),
        (lambda text: text.replace('"guidance": "paired"', '"guidance": "x"'), "guidance is 'x'"),
        (lambda text: text.replace('"nine"', '"nine", "ten"'), "11 class names for 10"),
        (lambda text: text.replace('"sit"', "[]"), "unknown model family"),
        (lambda text: text.replace('"num_heads": 2', '"num_heads": "2"'), "num_heads is '2'"),
        (lambda text: text.replace('"mlp_ratio": 4.0', '"mlp_ratio": NaN'), "mlp_ratio is nan"),
        (lambda text: text.replace('"null_class": true', '"null_class": 1'), "null_class is 1"),
        (lambda text: text.replace('"guidance_scale": 1.5', '"guidance_scale": "x"'), "is 'x'"),
        (lambda text: text.replace('"guided_channels": null', '"guided_channels": 9'), "is 9"),
        (lambda text: text.replace('"source": {}', '"source": []'), "source must be an object"),
    ],
)
def test_a_wrong_description_is_refused_with_the_reason(tmp_path, as_users_run_it, change, message):
    directory = tiny.save_model(tmp_path / "m")
    text = (directory / "model.json").read_text()
    assert change(text) != text
    (directory / "model.json").write_text(change(text))
    with pytest.raises(InputError, match=message):
        model_directory.load(directory)


def test_a_refiner_for_another_models_shape_is_refused():
    described = tiny.description()
    fields = json.loads(described.to_json())
    fields["refiner"]["in_channels"] = 4
    with pytest.raises(InputError, match="refiner is for another model's shape"):
        Description.from_json(json.dumps(fields))


def test_parameters_of_another_model_are_refused_by_tensor_name(tmp_path):
    stored = {"a": {"kernel": np.zeros((2, 3), np.float32)}, "b": np.zeros(4, np.float32)}
    checkpoint.save_params(tmp_path / "p", stored)
    wanted = {"a": {"kernel": np.zeros((3, 3), np.float32)}, "c": np.zeros(4, np.float32)}
    message = r"another model: c is missing; b is not known; a/kernel is \[2, 3\], not \[3, 3\]"
    with pytest.raises(InputError, match=message):
        checkpoint.load_params(tmp_path / "p", wanted)
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path / "p", stored)["b"], stored["b"])


def test_weights_of_another_model_in_a_model_directory_are_refused(tmp_path):
    directory = tiny.save_model(tmp_path / "m")
    other = tiny.save_model(tmp_path / "other", hidden_size=16)
    os.rename(directory / "predictor", tmp_path / "old")
    os.rename(other / "predictor", directory / "predictor")
    with pytest.raises(InputError, match=r"predictor in .* is damaged or incomplete"):
        model_directory.load(directory)


def test_a_changed_hyper_parameter_that_fits_every_shape_is_found(tmp_path):
    directory = tiny.save_model(tmp_path / "m")
    text = (directory / "model.json").read_text()
    (directory / "model.json").write_text(text.replace('"num_heads": 2', '"num_heads": 4'))
    with pytest.raises(InputError, match="hyper-parameters do not have the sha256"):
        model_directory.load(directory)


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _load_or_message(directory: Path) -> str:
    """The fingerprint of the predictor, or the message with which loading it was refused."""
    try:
        return model_directory.fingerprint(model_directory.load(directory).predictor_params)
    except InputError as error:
        return str(error)


def test_damage_to_any_weight_file_is_refused_in_one_line(tmp_path):
    """Every file Orbax wrote is cut, removed and gets one flipped bit, in turn."""
    directory = tiny.save_model(tmp_path / "m", refiner=False)
    whole = _load_or_message(directory)
    files = _files(directory / "predictor")
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (content[:middle], flipped, None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            message = _load_or_message(directory)
            assert "damaged or incomplete" in message, path
            assert len(message) < 400, path
            path.write_bytes(content)
    assert len(files) > 4
    assert _load_or_message(directory) == whole


def test_fingerprint_tells_parameters_apart():
    params = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    other = {"a": np.zeros(3, np.float32), "b": np.asarray([1, 1.0000001], np.float32)}
    assert model_directory.fingerprint(params) == model_directory.fingerprint(dict(params))
    assert model_directory.fingerprint(params) != model_directory.fingerprint(other)


def test_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="dtype is 'float17'"):
        model_directory.network_dtype("float17")
