"""The smallest models and recipes that behave like real ones; each trains in seconds."""

from functools import partial
from pathlib import Path

import golden
import jax
import jax.numpy as jnp

from flowturbo_jax import model_directory
from flowturbo_jax.model_directory import Description
from flowturbo_jax.models import SiTConfig, family
from flowturbo_jax.train_config import TrainConfig

SIT = {
    "input_size": 8,
    "in_channels": 1,
    "patch_size": 4,
    "hidden_size": 8,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "learn_sigma": False,
}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def recipe(**fields) -> dict:
    """A predictor recipe of a few steps."""
    defaults = {
        "name": "tiny",
        "objective": "flow_matching",
        "data": "digits",
        "model": {"family": "sit", **SIT},
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "schedule": "H2",
        "log_every": 1,
        "evaluate_every": 6,
        "checkpoint_every": 6,
        "evaluation_size": 16,
    }
    return TrainConfig(**{**defaults, **fields}).to_config_dict()


@partial(jax.jit, static_argnames="module", compiler_options=golden.QUICK_COMPILE)
def random_params(module, seed: int = 0):
    """Parameters of which none is zero, so that every part of the network shows."""
    params = module.initialise(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.2 * jax.random.normal(key, a.shape) for key, a in zip(keys, leaves, strict=True)]
    return jax.tree.map(jnp.add, params, jax.tree.unflatten(tree, noise))


def description(refiner: bool = True, **fields) -> Description:
    config = SiTConfig(**{**SIT, **fields})
    return Description(
        family="sit",
        predictor=config,
        refiner=config.refiner() if refiner else None,
        class_names=NAMES[: config.num_classes],
        guidance="paired" if config.null_label is not None else "none",
        guidance_scale=1.5,
        guided_channels=None,
        source={},
    )


def save_model(directory: Path, refiner: bool = True, **fields) -> Path:
    """Writes a model directory of random weights."""
    described = description(refiner, **fields)
    kind = family("sit")
    predictor_params = random_params(kind.predictor(described.predictor))
    refiner_params = random_params(kind.refiner(described.refiner), 5) if refiner else None
    model_directory.save(directory, described, predictor_params, refiner_params)
    return directory
