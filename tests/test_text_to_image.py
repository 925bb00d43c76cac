"""Texts to images: what prompts and negative prompts do, and what they do not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_text

import flowturbo_jax as ft
from flowturbo_jax import model_directory, path
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import any_model, programs
from flowturbo_jax.pipelines.text_to_image import TextToImage

PROMPTS = ["a red circle", "a green cross", "a blue square"]


@pytest.fixture(scope="module")
def pipe():
    return TextToImage(tiny_text.model())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_text.save(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def images(pipe):
    return np.asarray(pipe(PROMPTS, seeds=5, schedule="H1P1R1"))


def test_an_image_depends_on_its_prompt_and_its_noise_alone(pipe, images):
    alone = pipe(PROMPTS[1:2], seeds=5, first_index=1, schedule="H1P1R1", batch_size=3)
    np.testing.assert_array_equal(alone[0], images[1])
    assert (images[0] != images[1]).any()


def test_another_prompt_is_another_image_of_the_same_noise(pipe, images):
    other = pipe([PROMPTS[1], *PROMPTS[1:]], seeds=5, schedule="H1P1R1")
    assert (np.asarray(other[0]) != images[0]).any()
    np.testing.assert_array_equal(other[1:], images[1:])


def test_negative_prompts_are_the_empty_text_unless_given(pipe, images):
    given = pipe(PROMPTS, negative_prompts="", seeds=5, schedule="H1P1R1")
    np.testing.assert_array_equal(given, images)
    other = pipe(PROMPTS, negative_prompts="a grey cross", seeds=5, schedule="H1P1R1")
    assert (np.asarray(other) != images).any()


def test_without_guidance_a_negative_prompt_does_nothing(pipe):
    settings = {"seeds": 1, "schedule": "H1P1R1", "guidance_scale": 1}
    plain = pipe(PROMPTS, **settings)
    np.testing.assert_array_equal(plain, pipe(PROMPTS, negative_prompts="a cross", **settings))


def test_a_model_without_a_refiner_has_a_default_schedule_too(pipe):
    assert str(pipe.plan().schedule) == "H1P5R3"
    bare = TextToImage(tiny_text.model(refiner=False))
    assert str(bare.plan().schedule) == "H1P6"
    with pytest.raises(InputError, match="H1P5R3 refines, but this model has no refiner"):
        bare.plan("H1P5R3")


def test_a_refusal_advises_no_command_that_takes_no_texts(directory):
    pipe = TextToImage.load(directory)
    with pytest.raises(InputError, match=r"no schedule 'fast' yet: name one such as H1P5R3$"):
        pipe.plan("fast")
    with pytest.raises(InputError, match=r"has no solver S5 .*; take a schedule of E, H and P$"):
        pipe.plan("S5")


def test_one_text_is_one_image(pipe, images):
    one = pipe(PROMPTS[0], seeds=5, schedule="H1P1R1", batch_size=3)
    np.testing.assert_array_equal(one[0], images[0])


def test_seeds_prompts_and_scales_compile_nothing(pipe, images):
    count = len(pipe._ready)
    pipe(PROMPTS[::-1], seeds=[1, 2, 3], schedule="H1P1R1", guidance_scale=2.5)
    pipe(pipe.tokens(PROMPTS, ["", "a", "b"]), schedule="H1P1R1")
    assert len(pipe._ready) == count


def test_latents_are_those_of_the_flow_by_hand(pipe):
    """The text encoder's states are the conditions of both branches of guidance."""
    model, tokens = pipe.model, jnp.asarray(pipe.tokens(PROMPTS))
    noise = path.sample_noise(jnp.zeros(3, jnp.uint32), jnp.arange(3, dtype=jnp.uint32), (8, 8, 3))
    made = pipe.sample_latents(noise, PROMPTS, schedule="E2", guidance_scale=2.0)

    @jax.jit
    def by_hand(x):
        states = [
            model.text_encoder.apply({"params": model.text_encoder_params}, tokens[:, i])
            for i in (0, 1)
        ]
        for t in (0.0, 0.5):
            cond, uncond = (
                model.predictor.apply({"params": model.predictor_params}, x, jnp.float32(t), s)
                for s in states
            )
            x = x + 0.5 * (uncond + 2.0 * (cond - uncond))
        return x

    np.testing.assert_allclose(made, by_hand(noise), atol=2e-5)


def test_a_text_is_encoded_once_whatever_the_number_of_steps(pipe):
    """Its keys and values too: no cross-attention reads text states inside a loop."""

    def program(schedule):
        plan = pipe.plan(schedule)
        static = {"networks": programs.Networks(pipe.model), "guidance": plan.guidance}
        arguments = (pipe.params, jnp.zeros((2, 8, 8, 3)), jnp.asarray(pipe.placeholders(2)))
        traced = jax.make_jaxpr(
            lambda *a: programs.sample_latents(*a, schedule=plan.schedule, **static)
        )
        return str(traced(*arguments, *plan.arguments))

    few, many = program("H1P3R2"), program("H1P30R20")
    assert few.count("scan[") == many.count("scan[")
    assert abs(len(many) - len(few)) < 0.01 * len(few)  # numbers of more digits
    assert "[52,2," not in many.replace("[52,2,64]", ""), "something but the time is kept per step"


def test_editing_takes_prompts_where_it_takes_labels(pipe, images):
    made = pipe.edit(images, PROMPTS, strength=0.5, schedule="H1P1R1")
    assert made.shape == images.shape
    same = pipe.edit(images, PROMPTS, strength=0.0, schedule="E1")
    np.testing.assert_array_equal(same, pipe.decode(pipe.encode(images)))
    away = pipe.edit(images, pipe.tokens(PROMPTS, "a cross"), strength=0.5, schedule="H1P1R1")
    assert (np.asarray(away) != np.asarray(made)).any()


def test_inpainting_keeps_known_pixels_and_removing_needs_no_prompt(pipe, images):
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:8] = True
    for made in (
        pipe.inpaint(images, mask, PROMPTS, schedule="E1"),
        pipe.remove(images, mask, margin=0, schedule="E1"),
    ):
        np.testing.assert_array_equal(np.asarray(made)[:, ~mask], images[:, ~mask])


def test_inversion_and_back_gives_the_image(pipe, images):
    noise = pipe.invert(images, PROMPTS, schedule="P24")
    back = pipe.sample_latents(noise, PROMPTS, schedule="P24", guidance="none")
    error = np.abs(np.asarray(back) - np.asarray(pipe.encode(images)))
    assert error.mean() < 0.05


def test_a_directory_loads_as_what_it_is(directory, images):
    loaded = ft.TextToImage.load(directory)
    np.testing.assert_array_equal(loaded(PROMPTS, seeds=5, schedule="H1P1R1"), images)
    assert isinstance(any_model.load(directory), ft.TextToImage)
    with pytest.raises(ft.InputError, match="load it as TextToImage"):
        ft.ClassToImage.load(directory)
    with pytest.raises(ft.InputError, match="load it as ClassToImage"):
        ft.TextToImage.load("digits")


def test_bfloat16_makes_nearly_the_same(directory, images):
    half = ft.TextToImage.load(directory, dtype="bfloat16")(PROMPTS, seeds=5, schedule="H1P1R1")
    difference = np.abs(np.asarray(half, np.int32) - images.astype(np.int32))
    assert 0 < difference.mean() < 8


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tokenizer/tokenizer.json").unlink(), "tokenizer in .* is damaged"),
        (
            lambda d: (d / "model.json").write_text(
                (d / "model.json").read_text().replace('"hidden_size": 16', '"hidden_size": 24')
            ),
            "width 24",
        ),
    ],
    ids=["tokenizer", "width"],
)
def test_a_damaged_directory_is_refused(tmp_path, damage, message):
    directory = tiny_text.save(tmp_path / "model")
    damage(directory)
    with pytest.raises(ft.InputError, match=message):
        ft.TextToImage.load(directory)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("prompts", "negative", "message"),
    [
        ([], None, "there are no prompts"),
        (["a", 3], None, "no text; give texts"),
        (["a"], ["b", "c"], "2 negative prompts for 1 prompts"),
        (np.zeros((1, 2, 5), np.int32), None, "wanted are texts"),
        (np.full((1, 2, tiny_text.LENGTH), 10**6, np.int32), None, "token ids must be 0 to"),
        (["a"], 7, "no text; give texts"),
    ],
)
def test_what_is_no_prompt_is_refused(pipe, prompts, negative, message):
    with pytest.raises(ft.InputError, match=message):
        pipe(prompts, negative_prompts=negative, schedule="E1")


def test_a_text_encoder_of_another_width_is_refused():
    with pytest.raises(ft.InputError, match="the text encoder gives states of width 16"):
        dataclasses.replace(
            tiny_text.description(),
            predictor=dataclasses.replace(
                tiny_text.description().predictor, cross_attention_dim=24
            ),
            refiner=None,
        )


def test_a_text_encoder_belongs_to_a_predictor_of_texts():
    with pytest.raises(ft.InputError, match="belongs to a predictor of text"):
        dataclasses.replace(tiny.description(), text_encoder=tiny_text.text_config())
    with pytest.raises(ft.InputError, match="belongs to a predictor of text"):
        dataclasses.replace(tiny_text.description(), text_encoder=None)


def test_a_model_of_texts_is_saved_with_its_tokenizer(tmp_path):
    made = tiny_text.model()
    params = (made.predictor_params, made.refiner_params, made.vae_params)
    with pytest.raises(ft.InputError, match="a tokenizer belongs to a model that takes text"):
        model_directory.save(
            tmp_path / "m", made.description, *params, made.text_encoder_params, None
        )
    assert not (tmp_path / "m").exists()
