"""Training on captions: a predictor with its text encoder and tokenizer, and refiners."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny
import tiny_text

from flowturbo_jax import data, model_directory, tasks, trainer
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.text_to_image import TextToImage
from flowturbo_jax.train_config import TrainConfig
from flowturbo_jax.training_watch import with_index

pytestmark = pytest.mark.usefixtures("compiled_once")

UNET = {  # one resolution: quick to compile
    "family": "unet",
    "sample_size": (8, 8),
    "in_channels": 1,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "attention_heads": (2,),
    "cross_attention": (True,),
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
}
ENCODER = {"num_layers": 1, "num_heads": 2, "vocab_size": 600, "max_length": 16}
REFINER = {"block_out_channels": (8,), "attention_heads": (2,)}


def same_bits(a, b) -> bool:
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)
    return all(jax.tree.leaves(same))


def recipe(**fields):
    own = {"data": "digit_captions", "model": {**UNET, "text_encoder": ENCODER}}
    return tiny.recipe(**{**own, **fields})


def photograph_recipe(folders, kind, **fields):
    """A refiner's, on the photographs' captions or on what was encoded of both."""
    images = {"data": f"captions:{folders / 'photographs'}", "image_size": 8}
    latents = {"data": f"latents:{folders / 'latents'}"}
    own = {"objective": "refiner", "model": {}, "schedule": "H1R1", "evaluate_every": 100}
    teacher = folders / ("latent_teacher" if kind == "latents" else "pixel_teacher")
    own |= {"model_dir": str(teacher)} | (latents if kind == "latents" else images)
    return tiny.recipe(**{**own, **fields})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Photographs with captions, two teachers, and the latents and text states of one."""
    place = tmp_path_factory.mktemp("text_training")
    (place / "photographs").mkdir()
    for i, caption in enumerate(tiny_text.captions()):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(place / "photographs" / f"{i}.png")
        (place / "photographs" / f"{i}.txt").write_text(caption)
    tiny_text.save(place / "latent_teacher", refiner=False)
    tiny_text.save(place / "pixel_teacher", refiner=False, vae=False)
    arguments = [f"--data=captions:{place / 'photographs'}", "--image-size=16"]
    arguments += [f"--vae={place / 'latent_teacher'}", f"--out={place / 'latents'}"]
    package_main(["flowturbo_jax", "encode", *arguments])
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A predictor of a few steps; the folder of the run, and its last state."""
    workdir = tmp_path_factory.mktemp("predictor")
    return workdir, trainer.train_and_evaluate(recipe(), workdir)


def task_and_batch(config, size=8):
    config = TrainConfig.create(config)
    task = tasks.make_task(config, data.open_source(config.data, config.image_size))
    batch = data.batches(task.source, size, 0)[0]
    del batch["unreadable"]
    return task, jax.tree.map(jnp.asarray, with_index(batch, (0, 1)))


def losses(task, batch, params, key=3):
    return np.asarray(jax.jit(task.loss)(params, task.frozen, batch, jax.random.key(key)))


def test_a_predictor_learns_its_text_encoder_and_a_tokenizer(trained):
    workdir, _ = trained
    pipe = TextToImage.load(workdir / "model")
    assert pipe(["a handwritten seven"] * 2, schedule="H2").shape == (2, 8, 8, 1)
    fresh = tasks.make_task(TrainConfig.create(recipe()), data.open_source("digit_captions"))
    begun = jax.jit(fresh.network.initialise)(jax.random.split(jax.random.key(0), 3)[0])
    for name, found in (
        ("predictor", pipe.model.predictor_params),
        ("text_encoder", pipe.model.text_encoder_params),
    ):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), begun[name], found)
        assert max(jax.tree.leaves(moved)) > 1e-4, name
    assert pipe.model.tokenizer.lengths(["a handwritten seven"])[0] == 5  # words are tokens
    assert (workdir / "samples" / "0000006.png").is_file()


def test_a_run_that_was_stopped_goes_on_bit_for_bit(trained, tmp_path):
    _, straight = trained
    trainer.train_and_evaluate(recipe(steps=6, checkpoint_every=3), tmp_path)
    for step in (tmp_path / "checkpoints").glob("6*"):
        for file in sorted(step.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        step.rmdir()
    again = trainer.train_and_evaluate(recipe(steps=6, checkpoint_every=3), tmp_path)
    assert same_bits(again.params, straight.params)


def test_a_refiner_of_texts_is_trained_beside_a_frozen_text_encoder(trained, tmp_path):
    workdir, _ = trained
    config = recipe(
        objective="refiner", model_dir=str(workdir / "model"), model=REFINER, schedule="H1R1"
    )
    trainer.train_and_evaluate(config, tmp_path)
    teacher, made = (model_directory.load(place / "model") for place in (workdir, tmp_path))
    assert same_bits(made.text_encoder_params, teacher.text_encoder_params)
    assert same_bits(made.predictor_params, teacher.predictor_params)
    assert made.tokenizer.fingerprint == teacher.tokenizer.fingerprint
    prompts = ["a handwritten seven"]
    assert TextToImage(made)(prompts, schedule="H1R1").shape == (1, 8, 8, 1)


def test_cached_text_states_teach_what_their_captions_teach(folders):
    """Up to the float16 they are stored in."""
    task, batch = task_and_batch(photograph_recipe(folders, "latents"))
    assert batch["label"].shape == (8, tiny_text.LENGTH, tiny_text.WIDTH)
    teacher = model_directory.load(folders / "latent_teacher")
    order = data.order(task.source, 8, 0, 0)
    captions = list(data.captions_of(data.open_source(f"captions:{folders / 'photographs'}", 8)))
    ids = teacher.tokenizer([captions[i] for i in order])
    exact = jax.jit(teacher.text_encoder.apply)({"params": teacher.text_encoder_params}, ids)
    np.testing.assert_allclose(batch["label"], exact, atol=4e-3)
    params = tiny_text.random_params(task.network, 1)
    found = losses(task, batch, params)
    # A batch of states in float32 is one of another data set, which the task cannot tell.
    wanted = losses(task, {**batch, "label": jnp.asarray(exact)}, params)
    np.testing.assert_allclose(found, wanted, rtol=5e-3)


@pytest.mark.parametrize("kind", ["latents", "captions"])
def test_a_dropped_caption_is_the_empty_text(folders, kind):
    task, batch = task_and_batch(photograph_recipe(folders, kind, label_dropout=0.999999))
    params = tiny_text.random_params(task.network, 1)
    other = {**batch, "label": batch["label"][::-1]}
    np.testing.assert_array_equal(losses(task, batch, params), losses(task, other, params))
    kept, same = task_and_batch(photograph_recipe(folders, kind, label_dropout=0.0))
    moved = losses(kept, {**same, "label": same["label"][::-1]}, params)
    assert (moved != losses(kept, same, params)).any()


def test_which_captions_are_dropped_does_not_depend_on_the_batch(folders):
    """Sample i's draws are a function of (key, i), as with labels."""
    task, batch = task_and_batch(photograph_recipe(folders, "captions", label_dropout=0.5))
    params = tiny_text.random_params(task.network, 1)
    half = jax.tree.map(lambda a: a[4:], batch)
    np.testing.assert_allclose(
        losses(task, half, params), losses(task, batch, params)[4:], rtol=1e-4
    )


def wrong_encoder(folders, tmp_path):
    other = tiny_text.save(tmp_path / "other", refiner=False, seed=9)
    return photograph_recipe(folders, "latents", model_dir=str(other))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f, t: recipe(data="digits"), "digits has no captions"),
        (lambda f, t: tiny.recipe(data="digit_captions"), "has captions and no classes"),
        (lambda f, t: recipe(label_dropout=0.0), "trains the empty text"),
        (lambda f, t: recipe(model=UNET), "needs a text_encoder, such as"),
        (
            lambda f, t: recipe(model={**UNET, "text_encoder": {**ENCODER, "depth": 2}}),
            "model.text_encoder: .*depth",
        ),
        (
            lambda f, t: recipe(
                data=f"latents:{f / 'latents'}",
                model={**UNET, "in_channels": 3, "text_encoder": ENCODER},
            ),
            "cached text states are for refiners",
        ),
        (wrong_encoder, "made with another text encoder than that of"),
        (
            lambda f, t: photograph_recipe(f, "latents", data="digits", image_size=0),
            "the model takes|no captions",
        ),
    ],
    ids=["classes", "captions", "dropout", "encoder", "key", "states", "other", "data"],
)
def test_what_does_not_fit_is_refused(folders, tmp_path, make, message):
    config = TrainConfig.create(make(folders, tmp_path))
    with pytest.raises(InputError, match=message):
        tasks.make_task(config, data.open_source(config.data, config.image_size))


def test_the_papers_recipe():
    """FlowTurbo's text-to-image setting; see configs/rectified_flow_t2i_refiner.py."""
    from test_configs import CONFIGS, read

    config = TrainConfig.create(read(CONFIGS[0].with_name("rectified_flow_t2i_refiner.py")))
    assert (config.learning_rate, config.weight_decay, config.batch_size) == (2e-5, 0.0, 16)
    assert (config.warmup_steps, config.gradient_clip, config.steps) == (100, 0.01, 10_000)
    assert config.label_dropout == 0.1
