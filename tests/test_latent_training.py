"""From a folder of photographs to a latent model with its refiner, by the commands alone."""

import dataclasses
import json

import jax
import numpy as np
import PIL.Image
import pytest
import tiny
import tiny_latents

from flowturbo_jax import data, model_directory, tasks, trainer
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("compiled_once")

SIT = {**tiny.SIT, "input_size": 4, "in_channels": 3, "num_classes": 2}


def write_photographs(folder, size=(24, 18), count=6):
    for label, name in enumerate(("even", "odd")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (size[1], size[0], 3))
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


def save_teacher(directory, vae_seed=0):
    """A latent model of random weights, with the tiny VAE."""
    described = tiny.description(refiner=False, **SIT)
    described = dataclasses.replace(
        described, vae=tiny_latents.CONFIG, class_names=tiny_latents.CLASSES
    )
    predictor = tiny.random_params(tiny.family("sit").predictor(described.predictor))
    params = tiny_latents.params(vae_seed)
    model_directory.save(directory, described, predictor, None, params)
    return directory


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Photographs, a teacher, and the latents its VAE makes of them."""
    place = tmp_path_factory.mktemp("latent_training")
    write_photographs(place / "photographs")
    save_teacher(place / "teacher")
    arguments = [f"--data=folder:{place / 'photographs'}", "--image-size=8"]
    arguments += [f"--vae={place / 'teacher'}", f"--out={place / 'latents'}", "--shard-size=5"]
    package_main(["flowturbo_jax", "encode", *arguments])
    return place


def recipe(folders, **fields):
    own = {"data": f"latents:{folders / 'latents'}", "model": {"family": "sit", **SIT}}
    return tiny.recipe(**{**own, "horizontal_flip": True, **fields})


def refiner_recipe(folders, **fields):
    own = {"objective": "refiner", "model_dir": str(folders / "teacher"), "model": {}}
    return recipe(folders, **{**own, "schedule": "H1R1", **fields})


def test_a_refiner_is_trained_on_latents_and_decoded_by_the_teachers_vae(folders, tmp_path):
    state = trainer.train_and_evaluate(refiner_recipe(folders), tmp_path)
    assert int(state.step) == 6
    assert (tmp_path / "samples" / "0000006.png").is_file()
    pipe = ClassToImage.load(tmp_path / "model")
    kept = model_directory.load(folders / "teacher").vae_params
    jax.tree.map(np.testing.assert_array_equal, pipe.model.vae_params, kept)
    assert pipe(["odd"], schedule="H1R1").shape == (1, 8, 8, 3)
    source = json.loads((tmp_path / "model" / "model.json").read_text())["source"]
    assert source["refiner"]["data"].startswith("latents:")


def test_a_predictor_trained_on_latents_knows_its_decoder(folders, tmp_path):
    trainer.train_and_evaluate(recipe(folders), tmp_path)
    model = model_directory.load(tmp_path / "model")
    assert model.vae.config == tiny_latents.CONFIG
    jax.tree.map(np.testing.assert_array_equal, model.vae_params, tiny_latents.params())
    assert model.description.image_shape == (8, 8, 3)
    assert (tmp_path / "samples" / "0000006.png").is_file()


def test_a_teacher_without_a_vae_gets_that_of_the_latents(folders, tmp_path):
    described = tiny.description(refiner=False, **SIT)
    described = dataclasses.replace(described, class_names=tiny_latents.CLASSES)
    predictor = tiny.random_params(tiny.family("sit").predictor(described.predictor))
    model_directory.save(tmp_path / "bare", described, predictor, None)
    config = TrainConfig.create(refiner_recipe(folders, model_dir=str(tmp_path / "bare")))
    task = tasks.make_task(config, data.open_source(config.data))
    assert task.model(None).vae.config == tiny_latents.CONFIG


def test_latents_of_another_vae_are_refused(folders, tmp_path):
    other = save_teacher(tmp_path / "other", vae_seed=1)
    with pytest.raises(InputError, match=r"made with another VAE than that of .*encode the images"):
        trainer.train_and_evaluate(refiner_recipe(folders, model_dir=str(other)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_where_latents_are_wanted_are_refused_with_the_way_out(folders, tmp_path):
    images = {"data": f"folder:{folders / 'photographs'}", "image_size": 8}
    message = r"takes \[4, 4, 3\], but .* has \[8, 8, 3\]; .*python -m flowturbo_jax encode --help"
    with pytest.raises(InputError, match=message):
        trainer.train_and_evaluate(refiner_recipe(folders, **images), tmp_path / "run")


def test_images_of_the_size_of_latents_are_no_latents(folders, tmp_path):
    images = {"data": f"folder:{folders / 'photographs'}", "image_size": 4}
    with pytest.raises(InputError, match=r"moves latents, and .* holds images; turn them into"):
        trainer.train_and_evaluate(refiner_recipe(folders, **images), tmp_path / "run")


def test_latents_scaled_otherwise_than_the_teachers_are_refused(folders, tmp_path):
    model = model_directory.load(folders / "teacher")
    vae = dataclasses.replace(tiny_latents.CONFIG, scaling_factor=0.7)
    described = dataclasses.replace(model.description, vae=vae)
    other = tmp_path / "other"
    model_directory.save(other, described, model.predictor_params, None, model.vae_params)
    with pytest.raises(InputError, match="has other hyper-parameters than that of the latents"):
        trainer.train_and_evaluate(refiner_recipe(folders, model_dir=str(other)), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_training_hardly_waits_for_its_input(tmp_path, kind):
    fields = {"steps": 9, "log_every": 8, "checkpoint_every": 9, "evaluate_every": 9}
    if kind == "folder":  # photographs of 300 x 250, decoded and cropped while the device computes
        photographs = write_photographs(tmp_path / "photographs", (300, 250), count=40)
        model = {**SIT, "input_size": 64, "patch_size": 4, "hidden_size": 96, "depth": 6}
        fields.update(data=f"folder:{photographs}", image_size=64, batch_size=8)
        fields.update(model={"family": "sit", **model}, horizontal_flip=True, evaluation_size=8)
    else:  # the network of configs/digits_predictor.py
        model = {**tiny.SIT, "hidden_size": 96, "depth": 8, "num_heads": 3}
        fields.update(model={"family": "sit", **model}, batch_size=128)
    trainer.train_and_evaluate(tiny.recipe(**fields), tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 8
    # A few per cent on two idle cores; they are shared with whatever else runs.
    assert lines[0]["speed/input_wait"] < 0.3
