"""Every file in configs/ is a recipe that builds."""

import importlib.util
from pathlib import Path

import jax
import pytest

from flowturbo_jax import data, model_directory, tasks
from flowturbo_jax.sample_config import SampleConfig
from flowturbo_jax.train_config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def read(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path):
    config = read(path)
    if "objective" in config:
        recipe = TrainConfig.create(config)
        task = tasks.make_task(recipe, data.open_source(recipe.data))
        params = model_directory.abstract_params(task.network)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 0
    else:
        recipe = SampleConfig.create(config)
        assert model_directory.describe(recipe.model_dir).refiner is not None
    assert config.name == path.stem.removesuffix("_sample")


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
