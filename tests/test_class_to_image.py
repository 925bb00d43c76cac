import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import flowturbo_jax as ft
from flowturbo_jax import model_directory, path
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import evaluation


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return ft.ClassToImage.load(tiny.save_model(tmp_path_factory.mktemp("model") / "m"))


LABELS = np.asarray([3, 1, 4, 1, 5, 9])
SHORT = {"schedule": "H1P1R1"}


def test_images_are_bytes_of_the_models_shape(pipe):
    images = pipe(LABELS, **SHORT)
    assert images.shape == (6, 8, 8, 1)
    assert images.dtype == jnp.uint8
    assert len(np.unique(np.asarray(images))) > 10


def test_image_i_depends_on_its_seed_and_index_alone(pipe):
    whole = pipe(LABELS, seeds=7, **SHORT)
    part = pipe(LABELS[2:5], seeds=7, first_index=2, **SHORT)
    np.testing.assert_array_equal(whole[2:5], part)
    other = pipe(LABELS, seeds=8, **SHORT)
    assert (np.asarray(other) != np.asarray(whole)).any(axis=(1, 2, 3)).all()


def test_one_seed_per_image_gives_the_first_image_of_each_seed(pipe):
    images = pipe([1, 1], seeds=[5, 9], **SHORT)
    np.testing.assert_array_equal(images[0], pipe([1], seeds=5, **SHORT)[0])
    np.testing.assert_array_equal(images[1], pipe([1], seeds=9, **SHORT)[0])


def test_images_are_the_decoded_latents_of_the_same_noise(pipe):
    indices = np.arange(6, dtype=np.uint32)
    noise = path.sample_noise(jnp.full(6, 7, jnp.uint32), jnp.asarray(indices), (8, 8, 1))
    latents = pipe.sample_latents(noise, LABELS, **SHORT)
    images = np.asarray(pipe(LABELS, seeds=7, **SHORT), np.int32)
    expected = np.clip(np.round((np.asarray(latents) + 1) * 127.5), 0, 255)
    # Two programs may round a pixel at a half differently.
    assert np.abs(images - expected).max() <= 1


def test_label_schedule_guidance_and_scale_all_matter(pipe):
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32)
    base = {"labels": [1, 2], "schedule": "H1P1R1", "guidance_scale": 2.0, "guidance": "paired"}
    results = [pipe.sample_latents(noise, **base)]
    for change in (
        {"labels": [2, 1]},
        {"schedule": "H1P1Rc1"},
        {"guidance_scale": 3.0},
        {"guidance": "official"},
    ):
        results.append(pipe.sample_latents(noise, **{**base, **change}))
        assert np.abs(results[-1] - results[0]).max() > 1e-4, change


def test_scale_one_is_no_guidance(pipe):
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32)
    unguided = pipe.sample_latents(noise, [1, 2], guidance="none", **SHORT)
    for mode in ("paired", "official"):
        guided = pipe.sample_latents(noise, [1, 2], guidance=mode, guidance_scale=1.0, **SHORT)
        # Rounding of another batch shape through three steps.
        np.testing.assert_allclose(guided, unguided, atol=2e-5)


def test_nothing_compiles_for_new_seeds_labels_scales_or_weights(pipe, tmp_path):
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    pipe(LABELS, seeds=0, guidance_scale=1.5, **SHORT)
    jax.monitoring.register_event_duration_secs_listener(listen)
    pipe(LABELS[::-1], seeds=3, guidance_scale=1.5, **SHORT)
    pipe(LABELS, seeds=[1, 2, 3, 4, 5, 6], guidance_scale=4, **SHORT)
    pipe(LABELS, seeds=0, first_index=600, guidance_scale=0.5, **SHORT)
    ft.ClassToImage.load(pipe_directory(pipe, tmp_path))(LABELS, **SHORT)
    assert compiled == []
    pipe(LABELS, seeds=0, schedule="H1P2R1")  # the listener does hear: this is another program
    assert len(compiled) >= 1


def pipe_directory(pipe, tmp_path):
    """The model of a pipe with other weights, saved."""
    model = pipe.model
    predictor = jax.tree.map(lambda a: a * 0.5, model.predictor_params)
    model_directory.save(tmp_path / "m", model.description, predictor, model.refiner_params)
    return tmp_path / "m"


def test_bfloat16_networks_stay_near_float32(pipe, tmp_path):
    directory = tmp_path / "m"
    model = pipe.model
    model_directory.save(directory, model.description, model.predictor_params, model.refiner_params)
    half = ft.ClassToImage.load(directory, dtype="bfloat16")
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 1)), jnp.float32)
    exact = np.asarray(pipe.sample_latents(noise, [1, 2, 3, 4], **SHORT))
    rounded = half.sample_latents(noise, [1, 2, 3, 4], **SHORT)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.mean((np.asarray(rounded) - exact) ** 2) / np.mean(exact**2))
    assert 0 < error < 0.05  # bfloat16 keeps 8 bits: 2^-8 per product, a few of them add up


def test_what_a_card_says_of_guidance_is_what_was_done(pipe):
    assert pipe.plan()[1:4] == ("paired", 1.5, None)
    assert pipe.plan(guidance="none")[1:4] == ("none", 1.0, None)
    model = pipe.model
    quiet = dataclasses.replace(model.description, guidance="none")
    other = ft.ClassToImage(dataclasses.replace(model, description=quiet))
    assert other.plan("H1")[1:4] == ("none", 1.0, None)
    assert other.plan("H1", guidance_scale=2)[1:4] == ("paired", 2.0, None)
    settings = {"seed": 0, "samples": 2, "batch_size": 2, "judges": None}
    card = evaluation.protocol_card(other, other.plan("H1", 2), **settings)
    assert (card["guidance"], card["guidance_scale"]) == ("paired", 2.0)


def test_the_guidance_scale_may_be_an_array_or_traced(pipe):
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32)

    def sample(scale):
        return pipe.sample_latents(noise, [1, 2], guidance_scale=scale, **SHORT)

    np.testing.assert_array_equal(sample(jnp.float32(2)), sample(2.0))
    both = jax.vmap(sample)(jnp.asarray([1.0, 2.0]))
    np.testing.assert_allclose(both[1], sample(2.0), atol=2e-5)  # rounding of another batch shape


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([10], "label 10 is out of range; this model has the classes 0 to 9"),
        ([0, -1], "label -1 is out of range"),
        ([], "wanted is a list of class numbers"),
        (np.asarray([1.5]), "wanted is a list of class numbers"),
        (np.asarray(3), "wanted is a list of class numbers"),
        (np.asarray(["cat"]), "no class is called .cat."),
    ],
)
def test_labels_out_of_range_are_refused_not_clamped(pipe, labels, message):
    with pytest.raises(InputError, match=message):
        pipe(labels, **SHORT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": -1}, r"must be whole numbers in \[0, 2\^32\)"),
        ({"seeds": 2**32}, "whole numbers"),
        ({"seeds": np.asarray(0.5)}, "whole numbers"),
        ({"seeds": [1, 2, 3]}, "3 seeds for 2 labels"),
        ({"first_index": -1}, "first_index is -1"),
        ({"schedule": "R2"}, "starts with R"),
        ({"schedule": "H0"}, "has no steps"),
        ({"guidance": "twofold"}, "must be one of none, official, paired"),
        ({"guidance": "none", "guidance_scale": 2.0}, "'none' has no scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": 1e39}, "guidance_scale is 1e[+]39"),
    ],
)
def test_settings_the_model_cannot_take_are_refused(pipe, settings, message):
    with pytest.raises(InputError, match=message):
        pipe([1, 2], **{**SHORT, **settings})


def test_noise_of_another_shape_is_refused(pipe):
    with pytest.raises(
        InputError, match=r"noise is float32\[2, 8, 8, 4\]; this model wants float32\[B, 8, 8, 1\]"
    ):
        pipe.sample_latents(jnp.zeros((2, 8, 8, 4)), [1, 2])
    with pytest.raises(InputError, match=r"noise is bfloat16\[2"):
        pipe.sample_latents(jnp.zeros((2, 8, 8, 1), jnp.bfloat16), [1, 2])
    with pytest.raises(InputError, match="3 labels for 2 noises"):
        pipe.sample_latents(jnp.zeros((2, 8, 8, 1)), [1, 2, 3])


def test_refining_without_a_refiner_is_refused(tmp_path):
    pipe = ft.ClassToImage.load(tiny.save_model(tmp_path / "m", refiner=False))
    with pytest.raises(InputError, match="this model has no refiner"):
        pipe([1], schedule="H1R1")
    assert pipe([1], schedule="H1P1").shape == (1, 8, 8, 1)


@pytest.mark.parametrize("fields", [{"num_classes": 0}, {"null_class": False}])
def test_guidance_on_a_model_without_null_class_is_refused(tmp_path, fields):
    pipe = ft.ClassToImage.load(tiny.save_model(tmp_path / "m", **fields))
    for settings in ({"guidance": "paired"}, {"guidance_scale": 2.0}, {"guidance": "official"}):
        with pytest.raises(InputError, match="cannot be guided: it has no null class"):
            pipe([0], **settings, **SHORT)
    assert pipe([0, 0], **SHORT).shape == (2, 8, 8, 1)


def test_sampling_works_under_jit_and_vmap_over_seeds(pipe):
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 8, 8, 1)), jnp.float32)
    labels = jnp.asarray([1, 2], jnp.int32)

    def sample(x):
        return pipe.sample_latents(x, labels, **SHORT)

    together = jax.jit(jax.vmap(sample))(noise)
    one_by_one = jnp.stack([sample(x) for x in noise])
    np.testing.assert_allclose(together, one_by_one, atol=2e-5)  # rounding of other batch shapes


def test_classes_may_be_named(pipe):
    named = pipe(["three", 1, "Four", "1", "five", 9], **SHORT)
    np.testing.assert_array_equal(named, pipe(LABELS, **SHORT))
    with pytest.raises(InputError, match=r"thre.*three"):
        pipe(["thre"], **SHORT)


@pytest.mark.parametrize("label", [1.7, None, True])
@pytest.mark.usefixtures("as_users_run_it")
def test_beside_names_only_whole_numbers_are_labels(pipe, label):
    with pytest.raises(InputError, match=f"label {label} is neither a class number nor a name"):
        pipe([label, "three"], **SHORT)


def test_batches_that_do_not_divide_are_filled_up_and_change_nothing(pipe):
    whole = np.asarray(pipe(LABELS, seeds=3, **SHORT), np.int32)
    pipe(LABELS[:4], batch_size=4, **SHORT)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    for count in (1, 2, 4, 5, 6):
        images = pipe(LABELS[:count], seeds=3, batch_size=4, **SHORT)
        assert images.shape[0] == count
        # Another batch shape may round a pixel at a half differently.
        assert np.abs(np.asarray(images, np.int32) - whole[:count]).max() <= 1
    assert compiled == []
    each = pipe(LABELS, seeds=[5, 6, 7, 8, 9, 10], batch_size=4, **SHORT)
    np.testing.assert_array_equal(each[5], pipe(LABELS[5:], seeds=10, batch_size=4, **SHORT)[0])


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
@pytest.mark.usefixtures("as_users_run_it")
def test_a_batch_size_that_is_no_count_is_refused(pipe, size):
    with pytest.raises(InputError, match="batch_size is"):
        pipe(LABELS, batch_size=size, **SHORT)


def test_without_a_vae_latents_are_pixels(pipe):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    latents = pipe.encode(images)
    np.testing.assert_allclose(latents, images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(pipe.decode(latents), images)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_encoded_or_decoded_is_refused(pipe):
    with pytest.raises(InputError, match=r"images are float32\[1, 8, 8, 1\].*uint8\[B, H, W, 1\]"):
        pipe.encode(np.zeros((1, 8, 8, 1), np.float32))
    with pytest.raises(InputError, match=r"images are uint8\[1, 8, 8, 3\]"):
        pipe.encode(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"latents are float32\[8, 8, 1\].*float32\[B, H, W, 1\]"):
        pipe.decode(np.zeros((8, 8, 1), np.float32))


def test_a_program_may_be_compiled_ahead(pipe):
    pipe.compile(3, schedule="E1P3", guidance="official")
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    pipe([1, 2, 3], schedule="E1P3", guidance="official", guidance_scale=3.0)
    assert compiled == []
    with pytest.raises(InputError, match="batch_size is 0"):
        pipe.compile(0)
