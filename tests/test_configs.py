"""Every file in configs/ is a recipe that builds."""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import data, model_directory, tasks
from flowturbo_jax.class_names import imagenet_class_names, label_of
from flowturbo_jax.model_description import Description
from flowturbo_jax.models import MixtureConfig, SiTConfig, VAEConfig
from flowturbo_jax.pipelines import programs
from flowturbo_jax.sample_config import SampleConfig
from flowturbo_jax.schedule import Schedule
from flowturbo_jax.train_config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


XL = SiTConfig.named("SiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
# FIELD.md's counted costs: 29.71 M, 130.5 M, 33.0 M.
MILLIONS = {"sit_xl": 29.71, "sit_b": 130.5, "sit_s": 33.0}
MILLIONS["mixture_refiner"] = 0.22  # the digits refiner's


def expected_parameters(recipe: str) -> float:
    """Millions of parameters that a recipe should train, to two decimals."""
    if not recipe.startswith("digits"):
        return MILLIONS["_".join(recipe.split("_")[:2])]
    shipped = model_directory.load("digits")
    params = shipped.predictor_params if "predictor" in recipe else shipped.refiner_params
    return round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 2)


def imagenet_latents(argument: str, image_size: int) -> data.DataSource:
    examples = data.ArrayExamples(np.zeros((2, *XL.shape), np.float32), np.zeros(2, np.int32))
    names = imagenet_class_names()
    return data.DataSource(f"latents:{argument}", examples, XL.shape, names, "none")


def shallow_teacher(name: str, dtype: str) -> model_directory.Model:
    """A SiT-XL/2 but for its depth, which its refiner does not depend on."""
    description = Description(
        family="sit",
        predictor=dataclasses.replace(XL, depth=1),
        refiner=None,
        class_names=imagenet_class_names(),
        guidance="official",
        guidance_scale=1.5,
        guided_channels=3,
        source={},
    )
    (module,) = model_directory.modules(description, dtype).values()
    shapes = model_directory.abstract_params(module)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return model_directory.Model(description, module, params, None, None)


def unfitted_mixture(name: str, dtype: str = "float32") -> model_directory.Model:
    """A mixture of the digits' sizes."""
    description = Description(
        family="mixture",
        predictor=MixtureConfig(input_size=8, in_channels=1, num_classes=10, components=2),
        refiner=None,
        class_names=tuple(map(str, range(10))),
        guidance="paired",
        guidance_scale=1.5,
        guided_channels=None,
        source={},
    )
    (module,) = model_directory.modules(description, dtype).values()
    return model_directory.Model(
        description, module, module.initialise(jax.random.key(0)), None, None
    )


def read(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path, monkeypatch):
    config = read(path)
    if "objective" in config:
        recipe = TrainConfig.create(config)
        expected = expected_parameters(path.stem)
        if recipe.data.startswith("latents:"):  # encoded from ImageNet, which is not here
            monkeypatch.setitem(data.OPENERS, "latents", imagenet_latents)
        if recipe.model_dir.startswith("models/"):
            monkeypatch.setattr(model_directory, "load", shallow_teacher)
        if recipe.model_dir.startswith("runs/mixture"):  # fitted to the digits, and not here
            monkeypatch.setattr(model_directory, "load", unfitted_mixture)
        source = data.open_source(recipe.data)
        task = tasks.make_task(recipe, source)
        params = model_directory.abstract_params(task.network)
        millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
        assert millions == pytest.approx(expected, abs=0.05)
        batch = {"index": np.arange(4, dtype=np.int32), "label": np.zeros(4, np.int32)}
        batch["data"] = np.zeros((4, *source.shape), np.float32)
        batch = jax.tree.map(jnp.asarray, batch)
        losses = jax.eval_shape(task.loss, params, task.frozen, batch, jax.random.key(0))
        assert (losses.shape, losses.dtype) == ((4,), jnp.float32)
    else:
        recipe = SampleConfig.create(config)
        # What is converted from published files lies in models/, and is not here.
        if not recipe.model_dir.startswith("models/"):
            assert model_directory.describe(recipe.model_dir).refiner is not None
    assert config.name == path.stem.removesuffix("_sample")


def test_the_imagenet_recipe_makes_eight_images_at_full_size():
    recipe = SampleConfig.create(read(CONFIGS[0].with_name("sit_xl_2_256.py")))
    predictor = SiTConfig.named("SiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
    described = Description(
        family="sit",
        predictor=predictor,
        refiner=predictor.refiner(),
        class_names=imagenet_class_names(),
        guidance="official",
        guidance_scale=1.5,
        guided_channels=3,
        source={},
        vae=VAEConfig(),
    )
    networks = model_directory.modules(described, recipe.dtype)
    params = {name: model_directory.abstract_params(module) for name, module in networks.items()}
    labels = [label_of(label, described.class_names) for label in recipe.labels.split(",")]
    model = model_directory.Model(
        described,
        networks["predictor"],
        params["predictor"],
        networks["refiner"],
        params["refiner"],
        networks["vae"],
    )
    program = partial(
        programs.sample_images,
        networks=programs.Networks(model),
        schedule=Schedule.parse(recipe.schedule),
        guidance=recipe.guidance,
    )
    seeds = jnp.zeros(recipe.samples, jnp.uint32)
    images = jax.eval_shape(
        program,
        (params["predictor"], params["refiner"]),
        {"decoder": params["vae"]["decoder"]},
        seeds,
        seeds,
        jnp.asarray(labels),
        jnp.asarray(recipe.guidance_scale),
        None,
    )
    assert (images.shape, images.dtype) == ((8, 256, 256, 3), jnp.uint8)


def test_a_whole_number_in_a_recipe_leaves_its_flag_a_float():
    recipe = SampleConfig("x", model_dir="digits", schedule="H1", guidance_scale=2)
    config = recipe.to_config_dict()
    config.guidance_scale = 1.5
    assert SampleConfig.create(config).guidance_scale == 1.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_opens_with_its_purpose_command_and_cost(path):
    head = path.read_text().split('"""')[1]
    assert "python train.py" in head or "python sample.py" in head
    assert any(word in head.lower() for word in ("minute", "hour")), "what does it cost?"
