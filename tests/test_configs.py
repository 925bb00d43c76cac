"""Every file in configs/ is a recipe that builds."""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import data, model_directory, tasks
from flowturbo_jax.class_names import imagenet_class_names, label_of
from flowturbo_jax.data.latent_manifest import TextStates
from flowturbo_jax.model_description import Description
from flowturbo_jax.models import VAE, MixtureConfig, SiTConfig, VAEConfig
from flowturbo_jax.pipelines import programs, random_model
from flowturbo_jax.sample_config import SampleConfig
from flowturbo_jax.schedule import Schedule
from flowturbo_jax.tokenizer import Tokenizer
from flowturbo_jax.train_config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


XL = SiTConfig.named("SiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
# FIELD.md's counted costs: 29.71 M, 130.5 M, 33.0 M.
MILLIONS = {"sit_xl": 29.71, "sit_b": 130.5, "sit_s": 33.0}
MILLIONS["mixture_refiner"] = 0.22  # the digits refiner's
MILLIONS["rectified_flow"] = 43.50  # PAPER section 3: 43.5 M
MILLIONS["digit_captions_predictor"] = 1.14  # docs/text_to_image.md; text encoder included
MILLIONS["digit_captions_refiner"] = 0.10  # likewise
FINGERPRINT = "0" * 64  # of stand-ins, whose parameters are not worth hashing
SD = "SD 1.x U-Net"


def expected_parameters(recipe: str) -> float:
    """Millions of parameters that a recipe should train, to two decimals."""
    if not recipe.startswith("digits"):
        return MILLIONS.get(recipe) or MILLIONS["_".join(recipe.split("_")[:2])]
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


def latents_with_texts(argument: str, image_size: int) -> data.DataSource:
    """Latents as `encode` makes them of captions, of the networks of `stable_diffusion`."""
    shape, states = (64, 64, 4), TextStates(77, 768, 1, FINGERPRINT, ("a fox",))
    made = SimpleNamespace(
        directory=argument, vae=VAEConfig(), vae_fingerprint=FINGERPRINT, text=states
    )
    examples = data.ArrayExamples(np.zeros((2, *shape), np.float32), np.zeros(2, np.int32))
    label = (states.shape[1:], "float16")
    return data.DataSource(
        f"latents:{argument}", examples, shape, (), "none", latents=made, label=label
    )


class Zeros(np.ndarray):
    """Zeros that take no memory, in other dtypes neither."""

    @classmethod
    def of(cls, leaf: jax.ShapeDtypeStruct) -> "Zeros":
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape).view(cls)

    def astype(self, dtype) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), self.shape)


def stable_diffusion(name: str, dtype: str) -> model_directory.Model:
    """Stable Diffusion 1.5's U-Net of full size, with a text encoder of its width of one layer."""
    tokenizer = Tokenizer.learn(("a fox",), 600, 77)
    described = random_model.describe(SD, 512)
    encoder = dataclasses.replace(
        described.text_encoder,
        num_layers=1,
        vocab_size=tokenizer.vocab_size,
        end_token=tokenizer.end_token,
    )
    described = dataclasses.replace(described, refiner=None, text_encoder=encoder)
    networks = model_directory.modules(described, dtype)
    shapes = {name: model_directory.abstract_params(networks[name]) for name in networks}
    return model_directory.Model(
        described,
        networks["predictor"],
        jax.tree.map(Zeros.of, shapes["predictor"]),
        None,
        None,
        VAE(VAEConfig()),
        {},
        networks["text_encoder"],
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["text_encoder"]),
        tokenizer,
    )


def untrained(recipe: str) -> model_directory.Model:
    """What a recipe of configs/ writes, all zeros, where its own teacher is what another writes."""
    config = TrainConfig.create(read(CONFIGS[0].with_name(f"{recipe}.py")))
    task = tasks.make_task(config, data.open_source(config.data))
    shapes = model_directory.abstract_params(task.network)
    return task.model(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


def written_by(model_dir: str) -> str:
    """The recipe that writes "runs/RECIPE/model"."""
    runs, recipe, model = Path(model_dir).parts
    assert (runs, model) == ("runs", "model")
    return recipe


def read(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def stand_in(recipe: TrainConfig, monkeypatch) -> None:
    """Puts what a recipe needs and is not here in its place: data, and the teacher."""
    places = {"runs/mixture": unfitted_mixture, "models/sit": shallow_teacher}
    places["models/2rf"] = stable_diffusion
    places["runs/digit_captions"] = lambda name, dtype: untrained(written_by(name))
    for place, teacher in places.items():
        if recipe.model_dir.startswith(place):
            monkeypatch.setattr(model_directory, "load", teacher)
    if recipe.model_dir.startswith("models/2rf"):
        monkeypatch.setattr(model_directory, "fingerprint", lambda params: FINGERPRINT)
        monkeypatch.setattr(model_directory, "text_fingerprint", lambda *given: FINGERPRINT)
    latents = latents_with_texts if recipe.model_dir.startswith("models/2rf") else imagenet_latents
    monkeypatch.setitem(data.OPENERS, "latents", latents)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path, monkeypatch):
    config = read(path)
    if "objective" in config:
        recipe = TrainConfig.create(config)
        expected = expected_parameters(path.stem)
        stand_in(recipe, monkeypatch)
        task = tasks.make_task(recipe, data.open_source(recipe.data))
        params = model_directory.abstract_params(task.network)
        millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
        assert millions == pytest.approx(expected, abs=min(0.05, 0.05 * expected))
        shape, dtype = task.source.label
        batch = {"index": np.arange(4, dtype=np.int32), "label": np.zeros((4, *shape), dtype)}
        batch["data"] = np.zeros((4, *task.source.shape), np.float32)
        batch = jax.tree.map(jnp.asarray, batch)
        losses = jax.eval_shape(task.loss, params, task.frozen, batch, jax.random.key(0))
        assert (losses.shape, losses.dtype) == ((4,), jnp.float32)
    else:
        recipe = SampleConfig.create(config)
        if recipe.model_dir.startswith("runs/"):  # written by another recipe
            teacher = TrainConfig.create(read(path.with_name(f"{written_by(recipe.model_dir)}.py")))
            stand_in(teacher, monkeypatch)
            assert untrained(written_by(recipe.model_dir)).description.refiner is not None
        # What is converted from published files lies in models/, and is not here.
        elif not recipe.model_dir.startswith("models/"):
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


def test_the_text_recipe_has_no_text_that_a_user_did_not_give():
    config = read(CONFIGS[0].with_name("rectified_flow_t2i.py"))
    assert (config.prompt, config.prompts_file, config.negative_prompt) == ("", "", "")
    with config.unlocked():
        config.prompts_file = str(CONFIGS[0].with_name("prompts.txt"))
    recipe = SampleConfig.create(config)
    assert len(data.read_prompts(recipe.prompts_file)) == 4
    head = CONFIGS[0].with_name("rectified_flow_t2i.py").read_text().split('"""')[1]
    commands = head.replace("\\\n", " ").splitlines()
    commands = [line for line in commands if "python sample.py" in line]
    assert commands
    assert all("--config.prompt" in line for line in commands)


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
