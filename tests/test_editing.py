"""Editing, inpainting, removing and inverting with a pipeline: pixels, latents, real digits."""

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from published import sources

import flowturbo_jax as ft
from flowturbo_jax import masks as mask_arrays
from flowturbo_jax import path, sampler
from flowturbo_jax.data import arrays, open_source
from flowturbo_jax.images import from_uint8, to_uint8
from flowturbo_jax.inpainting import Known, latent_mask
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.metrics.classifier import HELD_OUT, DigitsClassifier
from flowturbo_jax.model_description import Preset
from flowturbo_jax.models import family
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.conversion import convert_model
from flowturbo_jax.pipelines.editing import check_strength
from flowturbo_jax.schedule import Schedule

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
LABELS, SOURCES = np.asarray([3, 1, 4, 1]), np.asarray([5, 9, 2, 6])
MASK = np.zeros((8, 8), bool)
MASK[2:5, 3:6] = True
SHORT = {"schedule": "E1R1"}
FEW = {"schedule": "E2", "guidance": "none"}
PAIRED = {**SHORT, "guidance": "paired", "guidance_scale": 2.0}


@pytest.fixture(autouse=True)
def compiled_quickly(request):
    """What a test calls once or twice is compiled as fast as can be; it does the same."""
    jax.config.update("jax_disable_most_optimizations", "slow" not in request.keywords)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return ft.ClassToImage.load(tiny.save_model(tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """The golden networks: latents of 8 x 8, and a VAE that makes 16 x 16 pixels of them."""
    folder = tmp_path_factory.mktemp("latent")
    convert_model(sources(folder), folder / "model")
    return ft.ClassToImage.load(folder / "model")


def with_description(pipe, **fields):
    described = dataclasses.replace(pipe.model.description, **fields)
    return ft.ClassToImage(dataclasses.replace(pipe.model, description=described))


def levels(a, b):
    """The largest difference in grey levels."""
    return int(np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32)).max())


def noise_of(seed, count, shape=(8, 8, 1)):
    indices = jnp.arange(count, dtype=jnp.uint32)
    return path.sample_noise(jnp.full(count, seed, jnp.uint32), indices, shape)


def by_hand(pipe, plan, labels, run):
    """What the pipeline's networks make by `run(flow)`, compiled here."""

    def function(params, labels, scale, interval):
        networks = programs.Networks(pipe.model)
        return run(programs.make_flow(networks, params, labels, scale, interval, plan.guidance))

    quick = jax.jit(function, compiler_options=golden.QUICK_COMPILE)
    return quick(pipe.params, jnp.asarray(labels, jnp.int32), *plan.arguments[:2])


# edit


def test_an_edit_mixes_with_noise_and_samples_on(pipe):
    plan = pipe.plan("E1R1", 2.0, "paired", (0.1, 0.6))
    x = path.interpolate(noise_of(7, 4), from_uint8(IMAGES), jnp.float32(0.4))
    latents = by_hand(
        pipe, plan, LABELS, lambda flow: sampler.sample(flow, x, plan.schedule, jnp.float32(0.4))
    )
    interval = {"guidance_interval": (0.1, 0.6)}
    edited = pipe.edit(IMAGES, LABELS, strength=0.6, seeds=7, **PAIRED, **interval)
    assert edited.shape == IMAGES.shape
    assert edited.dtype == jnp.uint8
    # Two programs may round a pixel at a half differently.
    assert levels(edited, to_uint8(latents)) <= 1
    assert levels(edited, IMAGES) > 20


def test_strength_goes_from_the_image_to_generation(pipe):
    nothing = pipe.edit(IMAGES, LABELS, strength=0, seeds=7, **PAIRED)
    np.testing.assert_array_equal(nothing, IMAGES)
    everything = pipe.edit(IMAGES, LABELS, strength=1, seeds=7, **PAIRED)
    assert levels(everything, pipe(LABELS, seeds=7, **PAIRED)) <= 1
    other = pipe.edit(255 - IMAGES, LABELS, strength=1, seeds=7, **PAIRED)
    np.testing.assert_array_equal(everything, other)  # nothing of the image is left
    little, much = (
        pipe.edit(IMAGES, LABELS, strength=strength, seeds=7, **PAIRED) for strength in (0.1, 0.9)
    )
    assert 0 < levels(little, IMAGES) < levels(much, IMAGES)


TASKS = {
    "edit": lambda pipe, rows, **more: pipe.edit(
        IMAGES[rows], LABELS[rows], strength=0.5, **PAIRED, **more
    ),
    "inpaint": lambda pipe, rows, **more: pipe.inpaint(
        IMAGES[rows], np.stack([MASK, MASK.T, ~MASK, MASK])[rows], LABELS[rows], **PAIRED, **more
    ),
    "remove": lambda pipe, rows, **more: pipe.remove(
        IMAGES[rows], np.stack([MASK, MASK.T, MASK, MASK])[rows], margin=0.5, **SHORT, **more
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_image_i_depends_on_its_row_its_seed_and_its_index_alone(pipe, task):
    do = TASKS[task]
    whole = np.asarray(do(pipe, slice(None), seeds=7))
    np.testing.assert_array_equal(whole, do(pipe, slice(None), seeds=7))
    rest = do(pipe, np.arange(2, 4), seeds=7, first_index=2, batch_size=4)
    np.testing.assert_array_equal(whole[2:], rest)
    seeds = [5, 6, 7, 8]
    listed = np.asarray(do(pipe, slice(None), seeds=seeds))
    turned = do(pipe, np.arange(4)[::-1], seeds=seeds[::-1])
    np.testing.assert_array_equal(listed[::-1], turned)
    np.testing.assert_array_equal(listed[2], do(pipe, [2, 1, 1, 1], seeds=7)[0])
    assert (listed != whole).any(axis=(1, 2, 3)).sum() >= 3  # image 2 of seed 7 is not image 0
    small = do(pipe, slice(None), seeds=7, batch_size=3)  # 3, and 1 that is filled up
    assert levels(small, whole) <= 1  # another program, which may round a half differently


def test_nothing_compiles_for_another_strength_seed_label_scale_mask_margin_or_edge(pipe):
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    def everything(labels, scale, strength, mask, seeds, margin, soften, sources):
        settings = {**PAIRED, "guidance_scale": scale, "seeds": seeds}
        pipe.edit(IMAGES, labels, strength=strength, **settings)
        pipe.edit(IMAGES, labels, strength=strength, source_labels=sources, inversion="E1", **FEW)
        pipe.inpaint(IMAGES, mask, labels, soften=soften, **settings)
        pipe.remove(IMAGES, mask, soften=soften, margin=margin, seeds=seeds, **SHORT)
        pipe.invert(IMAGES, labels, schedule="E1")

    everything(LABELS, 2.0, 0.5, MASK, 0, None, 0, SOURCES)
    jax.monitoring.register_event_duration_secs_listener(listen)
    everything(LABELS[::-1], 3, 0, MASK.T, 5, 2, 1.5, SOURCES[::-1])
    everything(
        LABELS.tolist(), 0.5, 1, np.stack([MASK] * 4) * np.uint8(255), [1, 2, 3, 4], 0, 3, LABELS
    )
    assert compiled == []
    pipe.invert(IMAGES, LABELS, schedule="E2")  # the listener does hear: this is another program
    assert len(compiled) >= 1


def test_the_strength_may_be_of_jax_and_traced(pipe):
    def edited(strength):
        return pipe.edit(IMAGES, LABELS, strength=strength, seeds=3, **PAIRED)

    np.testing.assert_array_equal(edited(jnp.float32(0.3)), edited(0.3))
    np.testing.assert_array_equal(edited(jnp.asarray(1)), edited(1.0))
    assert levels(jax.jit(edited)(0.3), edited(0.3)) <= 1


def test_labels_and_guidance_all_matter(pipe):
    base = {"strength": 0.7, **PAIRED}
    first = pipe.edit(IMAGES, LABELS, **base)
    for change in (
        {"guidance_scale": 5.0},
        {"guidance": "official", "guidance_interval": (0.5, 1)},
        {"guidance": "none", "guidance_scale": None},
    ):
        assert levels(pipe.edit(IMAGES, LABELS, **{**base, **change}), first) > 1, change
    assert levels(pipe.edit(IMAGES, SOURCES, **base), first) > 1
    one = pipe.edit(IMAGES, LABELS, **{**base, "guidance_scale": 1})
    none = pipe.edit(IMAGES, LABELS, strength=0.7, guidance="none", **SHORT)
    np.testing.assert_array_equal(one, none)


def test_a_preset_says_how_to_edit(pipe):
    preset = Preset("E1R1", "official", (0.5, 1.0))
    tuned = with_description(pipe, schedules={"fast": preset})
    given = {"strength": 0.7, "guidance_scale": 2.0}
    explicit = {"guidance": "official", "guidance_interval": (0.5, 1.0), **SHORT}
    ours = tuned.edit(IMAGES, LABELS, schedule="fast", **given)
    np.testing.assert_array_equal(ours, pipe.edit(IMAGES, LABELS, **given, **explicit))


# invert


def test_inversion_is_the_samplers_under_the_labels_given(pipe):
    found = pipe.invert(IMAGES, LABELS, schedule="E1")
    assert (found.shape, found.dtype) == ((4, 8, 8, 1), jnp.float32)
    plan = pipe.plan("E1", guidance="none")
    x = from_uint8(IMAGES)
    wanted = by_hand(pipe, plan, LABELS, lambda flow: sampler.invert(flow, x, "E1"))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found - pipe.invert(IMAGES, SOURCES, schedule="E1")).max() > 1e-3
    rest = pipe.invert(IMAGES[2:], LABELS[2:], schedule="E1", batch_size=4)
    np.testing.assert_array_equal(found[2:], rest)
    guided = pipe.invert(IMAGES, LABELS, schedule="E1", guidance_scale=3.0)
    plan = pipe.plan("E1", 3.0, "paired")
    wanted = by_hand(pipe, plan, LABELS, lambda flow: sampler.invert(flow, x, "E1"))
    np.testing.assert_allclose(guided, wanted, atol=1e-5)
    assert np.abs(guided - found).max() > 1e-3


def test_the_noise_of_an_image_samples_to_it(pipe):
    noise = pipe.invert(IMAGES, LABELS, schedule="H24")
    settings = {"schedule": "H24", "guidance": "none"}
    back = pipe.decode(pipe.sample_latents(noise, LABELS, **settings))
    # Pixels differ from their mean by 74 levels; the network is random, and rougher than trained.
    assert np.sqrt(np.mean((np.asarray(back, float) - IMAGES) ** 2)) < 4


def test_an_edit_of_inverted_images_knows_no_noise(pipe):
    given = {"source_labels": SOURCES, "inversion": "E1", **FEW}
    for strength in (0, 1e-9):
        same = pipe.edit(IMAGES, LABELS, strength=strength, **given)
        np.testing.assert_array_equal(same, IMAGES)
    whole = pipe.edit(IMAGES, LABELS, strength=1, **given)
    np.testing.assert_array_equal(whole, pipe.edit(IMAGES, LABELS, strength=1, seeds=9, **given))
    noise = pipe.invert(IMAGES, SOURCES, schedule="E1")
    wanted = pipe.decode(pipe.sample_latents(noise, LABELS, **FEW))
    assert levels(whole, wanted) <= 1
    half = pipe.edit(IMAGES, LABELS, strength=0.5, **given)
    plan, t = pipe.plan("E1", guidance="none"), jnp.float32(0.5)
    there = by_hand(
        pipe, plan, SOURCES, lambda flow: sampler.invert(flow, from_uint8(IMAGES), "E1", t)
    )
    latents = by_hand(pipe, plan, LABELS, lambda flow: sampler.sample(flow, there, "E2", t))
    assert levels(half, to_uint8(latents)) <= 1
    other = pipe.edit(IMAGES, LABELS, strength=1, **{**given, "source_labels": LABELS})
    assert levels(whole, other) > 1


# inpaint and remove


@pytest.mark.parametrize(("tries", "guidance"), [(1, "paired"), (2, "none"), (2, "official")])
def test_repainting_is_the_samplers_with_what_is_known_pinned(pipe, tries, guidance):
    scale = None if guidance == "none" else 2.0
    plan = pipe.plan("E1R1", scale, guidance)
    noise = noise_of(7, 4)
    free = latent_mask(jnp.asarray(np.stack([MASK] * 4)), 1)
    known = Known(noise, from_uint8(IMAGES), free)

    def rewind(state, t, before, number):
        seeds, indices = jnp.full(4, 7, jnp.uint32), jnp.arange(4, dtype=jnp.uint32)
        fresh = path.sample_noise(seeds, indices, (8, 8, 1), number)
        return known.rewound(state, t, before, fresh)

    def run(flow):
        after = known.after_step
        more = {"after_step": after, "rewind": rewind, "tries": tries}
        return sampler.integrate(known.pinned(flow), noise, plan.schedule, **more)[0].x

    wanted = to_uint8(by_hand(pipe, plan, LABELS, run))
    given = {"guidance": guidance, "guidance_scale": scale, "tries": tries, "seeds": 7}
    made = pipe.inpaint(IMAGES, MASK, LABELS, **SHORT, **given)
    assert levels(made, wanted) <= 1


def test_every_known_pixel_stays_and_every_other_is_new(pipe):
    first, second = (pipe.inpaint(IMAGES, MASK, LABELS, seeds=s, **PAIRED) for s in (0, 1))
    for made in (first, second):
        np.testing.assert_array_equal(np.asarray(made)[:, ~MASK], IMAGES[:, ~MASK])
    for other in (second, IMAGES):  # by chance, and where both are black, some pixels agree
        assert (np.asarray(first)[:, MASK] != np.asarray(other)[:, MASK]).mean() > 0.5


def test_a_full_mask_is_generation_and_an_empty_one_the_image(pipe):
    full = np.ones((4, 8, 8), bool)
    whole = pipe.inpaint(IMAGES, full, LABELS, seeds=7, **PAIRED)
    assert levels(whole, pipe(LABELS, seeds=7, **PAIRED)) <= 1
    for empty in (~full, np.zeros((8, 8), np.uint8)):
        np.testing.assert_array_equal(pipe.inpaint(IMAGES, empty, LABELS, **PAIRED), IMAGES)
    mixed = pipe.inpaint(
        IMAGES, full & [[[True]], [[False]], [[True]], [[False]]], LABELS, **PAIRED
    )
    np.testing.assert_array_equal(mixed[1::2], IMAGES[1::2])


def test_masks_of_every_form_mean_the_same(pipe):
    wanted = pipe.inpaint(IMAGES, MASK, LABELS, **PAIRED)
    each = np.stack([MASK] * 4)
    forms = (MASK * np.uint8(255), jnp.asarray(MASK), each, each[..., None], each * np.uint8(1))
    for form in forms:
        np.testing.assert_array_equal(pipe.inpaint(IMAGES, form, LABELS, **PAIRED), wanted)


def test_a_soft_edge_blends_what_a_wider_mask_would_repaint(pipe):
    weights = mask_arrays.weights(np.stack([MASK] * 4), soften=2.5)
    hard = pipe.inpaint(IMAGES, weights > 0, LABELS, **PAIRED)
    soft = np.asarray(pipe.inpaint(IMAGES, MASK, LABELS, soften=2.5, **PAIRED))
    low, high = (np.asarray(a, np.float32) for a in (IMAGES, hard))
    wanted = np.round(low + weights[..., None] * (high - low))
    assert levels(soft, wanted) <= 1
    np.testing.assert_array_equal(soft[weights == 1], np.asarray(hard)[weights == 1])
    np.testing.assert_array_equal(soft[weights == 0], IMAGES[weights == 0])
    between = (weights > 0) & (weights < 1)
    assert between.sum() > 40
    assert (soft[between] != np.asarray(hard)[between]).mean() > 0.5


@pytest.mark.parametrize(("margin", "reach"), [(None, 1), (0, 0), (1.5, 1.5), (3, 3)])
def test_removing_repaints_the_mask_and_a_margin(pipe, margin, reach):
    near = [np.hypot(*(np.argwhere(MASK) - point).T).min() <= reach for point in np.ndindex(8, 8)]
    wider = np.reshape(near, (8, 8))
    wanted = pipe.inpaint(IMAGES, wider, LABELS, **PAIRED)
    removed = pipe.remove(IMAGES, MASK, LABELS, margin=margin, **PAIRED)
    np.testing.assert_array_equal(removed, wanted)
    np.testing.assert_array_equal(np.asarray(removed)[:, ~wider], IMAGES[:, ~wider])


@pytest.mark.usefixtures("as_users_run_it")
def test_the_margin_of_a_large_picture_is_a_64th_of_its_side(monkeypatch, pipe):
    asked = []
    monkeypatch.setattr(pipe, "_given", lambda images: images)
    monkeypatch.setattr(pipe, "_repaint", lambda *given: given[1])
    monkeypatch.setattr(
        mask_arrays, "weights", lambda masks, margin, soften: asked.append((margin, soften))
    )
    for side in (64, 65, 256):
        pipe.remove(np.zeros((4, side, side, 1)), np.ones((side, side), bool), LABELS, soften=2)
    assert asked == [(1, 2), (2, 2), (4, 2)]


def test_removing_without_labels_asks_for_no_class_and_no_guidance(pipe):
    full = np.ones((8, 8), bool)
    removed = pipe.remove(IMAGES, full, seeds=7, **SHORT)
    latents = by_hand(
        pipe,
        pipe.plan("E1R1", guidance="none"),
        [10] * 4,
        lambda flow: sampler.sample(flow, noise_of(7, 4), Schedule.parse("E1R1")),
    )
    assert levels(removed, to_uint8(latents)) <= 1
    explicit = pipe.remove(IMAGES, full, seeds=7, guidance="none", guidance_scale=1, **SHORT)
    np.testing.assert_array_equal(removed, explicit)


# models of other kinds


def test_a_model_of_no_classes_removes_and_repaints(pipe):
    described = tiny.description(refiner=False, num_classes=0)
    predictor = family("sit").predictor(described.predictor)
    plain = dataclasses.replace(
        pipe.model, description=described, predictor=predictor, refiner=None, refiner_params=None
    )
    params = tiny.random_params(predictor)
    pipe = ft.ClassToImage(dataclasses.replace(plain, predictor_params=params))
    removed = pipe.remove(IMAGES, MASK, margin=0, schedule="E2")
    wanted = pipe.inpaint(IMAGES, MASK, [0] * 4, schedule="E2")
    np.testing.assert_array_equal(removed, wanted)
    np.testing.assert_array_equal(np.asarray(removed)[:, ~MASK], IMAGES[:, ~MASK])
    with pytest.raises(InputError, match="cannot be guided"):
        pipe.inpaint(IMAGES, MASK, [0] * 4, schedule="E2", guidance_scale=2.0)


def test_a_model_without_a_null_class_needs_labels_to_remove(pipe):
    config = dataclasses.replace(pipe.model.description.predictor, null_class=False)
    pipe = with_description(pipe, predictor=config, refiner=None, guidance="none")
    with pytest.raises(InputError, match="without label dropout, so it paints classes only"):
        pipe.remove(IMAGES, MASK, schedule="E2")


def test_bfloat16_networks_keep_what_is_known_and_stay_near_float32(pipe):
    refiner = pipe.model.refiner
    half = {
        "predictor": pipe.model.predictor.clone(dtype=jnp.bfloat16),
        "refiner": refiner.clone(network=refiner.network.clone(dtype=jnp.bfloat16)),
    }
    half = ft.ClassToImage(dataclasses.replace(pipe.model, **half))
    near, exact = (p.inpaint(IMAGES, MASK, LABELS, tries=2, **PAIRED) for p in (half, pipe))
    np.testing.assert_array_equal(np.asarray(near)[:, ~MASK], IMAGES[:, ~MASK])
    error = np.asarray(near, float)[:, MASK] - np.asarray(exact, float)[:, MASK]
    assert 0 < np.sqrt(np.mean(error**2)) < 6  # of 74 for random ones; 8 bits of mantissa


# latents


def test_with_a_vae_strength_0_is_the_image_through_it(latent):
    through = latent.decode(latent.encode(COLOUR))
    edited = latent.edit(COLOUR, [1, 2], strength=0, schedule="H1", seeds=3)
    assert edited.shape == (2, 16, 16, 3)
    assert levels(edited, through) <= 1
    whole = latent.edit(COLOUR, [1, 2], strength=1, schedule="H1", seeds=3)
    assert levels(whole, latent([1, 2], schedule="H1", seeds=3)) <= 1


def test_with_a_vae_known_pixels_stay_and_lone_pixels_are_repainted(latent):
    """One pixel alone, at each of the four places within a latent."""
    for row, column in ((4, 6), (5, 6), (4, 7), (15, 15)):
        mask = np.zeros((16, 16), bool)
        mask[row, column] = True
        made = [
            np.asarray(latent.inpaint(COLOUR, mask, [1, 2], schedule="H1", seeds=s)) for s in (0, 1)
        ]
        for image in made:
            np.testing.assert_array_equal(image[:, ~mask], COLOUR[:, ~mask])
        assert (made[0][:, mask] != made[1][:, mask]).any(), (row, column)


def test_with_a_vae_a_latent_none_of_whose_pixels_is_masked_stays(latent):
    """Known latents are those of the picture: what is repainted depends on them."""
    mask = np.zeros((2, 16, 16), bool)
    mask[:, 3:9, 5:12] = True
    plan = latent.plan("H1")
    noise, data = noise_of(0, 2, (8, 8, 4)), latent.encode(COLOUR)
    known = Known(noise, data, latent_mask(jnp.asarray(mask), 2))

    def run(flow):
        flow = known.pinned(flow)
        return sampler.sample(flow, noise, plan.schedule, after_step=known.after_step)

    wanted = np.asarray(latent.decode(by_hand(latent, plan, [1, 2], run)))
    made = np.asarray(latent.inpaint(COLOUR, mask, [1, 2], schedule="H1"))
    assert levels(made[mask], wanted[mask]) <= 1


def test_with_a_vae_full_and_empty_masks_are_generation_and_the_image(latent):
    whole = latent.inpaint(COLOUR, np.ones((16, 16), bool), [1, 2], schedule="H1", seeds=3)
    assert levels(whole, latent([1, 2], schedule="H1", seeds=3)) <= 1
    nothing = latent.inpaint(COLOUR, np.zeros((16, 16), bool), [1, 2], schedule="H1", seeds=3)
    np.testing.assert_array_equal(nothing, COLOUR)


def test_with_a_vae_noise_is_of_latents_and_rows_stand_alone(latent):
    noise = latent.invert(COLOUR, [1, 2], schedule="E1")
    assert (noise.shape, noise.dtype) == ((2, 8, 8, 4), jnp.float32)
    swapped = latent.invert(COLOUR[::-1], [2, 1], schedule="E1")
    np.testing.assert_allclose(noise[::-1], swapped, atol=1e-5)
    mask = np.zeros((2, 16, 16), bool)
    mask[0, :7], mask[1, :, 3:] = True, True
    given = {"schedule": "H1", "batch_size": 2}
    whole = latent.inpaint(COLOUR, mask, [1, 2], seeds=3, **given)
    second = latent.inpaint(COLOUR[1:], mask[1:], [2], seeds=3, first_index=1, **given)
    assert levels(whole[1:], second) <= 1


def test_latents_that_nothing_decodes_are_not_edited(latent):
    bare = dataclasses.replace(latent.model, vae=None, vae_params=None)
    described = dataclasses.replace(latent.model.description, vae=None)
    pipe = ft.ClassToImage(dataclasses.replace(bare, description=described))
    with pytest.raises(InputError, match="no VAE to decode them"):
        pipe.edit(np.zeros((1, 8, 8, 4), np.uint8), [1], strength=0.5)


# refusals

EDIT = {"images": IMAGES, "labels": LABELS, "strength": 0.5}
INPAINT = {"images": IMAGES, "masks": MASK, "labels": LABELS}
REMOVE = {"images": IMAGES, "masks": MASK}
INVERT = {"images": IMAGES, "labels": LABELS}
NAN = float("nan")


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("edit", {"strength": 1.01}, r"strength is 1.01; it must be a number from 0 \(the image"),
        ("edit", {"strength": -1e-6}, "strength is -1e-06"),
        ("edit", {"strength": NAN}, "strength is nan"),
        ("edit", {"strength": "0.5"}, "strength is '0.5'"),
        ("edit", {"strength": True}, "strength is True"),
        ("edit", {"strength": None}, "strength is None"),
        ("edit", {"strength": [0.5]}, r"strength is \[0.5\]"),
        (
            "edit",
            {"images": IMAGES[..., 0]},
            r"uint8\[4, 8, 8\]; this model edits uint8\[B, 8, 8, 1",
        ),
        ("edit", {"images": IMAGES[:, :7]}, r"images are uint8\[4, 7, 8, 1\]"),
        ("edit", {"images": IMAGES / 255}, r"images are float64\[4, 8, 8, 1\]"),
        ("edit", {"images": IMAGES[:0]}, r"images are uint8\[0, 8, 8, 1\]"),
        ("edit", {"images": "picture.png"}, "images are <U11"),
        ("edit", {"labels": [1, 2]}, "2 labels for 4 images; one each is needed"),
        ("edit", {"labels": [1, 2, 3, 10]}, "label 10 is out of range"),
        ("edit", {"source_labels": [1]}, "1 labels for 4 images"),
        ("edit", {"source_labels": [1, 2, 3, -1]}, "label -1 is out of range"),
        ("edit", {"source_labels": SOURCES, "inversion": "H1R2"}, "H1R2 refines.*such as H1P11"),
        ("edit", {"source_labels": SOURCES, "inversion": "Q1"}, "unknown block 'Q'"),
        ("edit", {"seeds": [1, 2]}, "2 seeds for 4"),
        ("edit", {"first_index": -1}, "first_index is -1"),
        ("edit", {"schedule": "R1"}, "starts with R"),
        ("edit", {"guidance": "double"}, "guidance is 'double'"),
        ("edit", {"guidance_interval": (0.8, 0.1)}, "must rise within"),
        ("edit", {"batch_size": 0}, "batch_size is 0"),
        (
            "inpaint",
            {"masks": MASK[:7]},
            r"masks are bool\[7, 8\]; wanted is bool or uint8, \[8, 8\]",
        ),
        ("inpaint", {"masks": np.stack([MASK] * 3)}, r"masks are bool\[3, 8, 8\]"),
        ("inpaint", {"masks": MASK * 1.0}, r"masks are float64\[8, 8\]"),
        ("inpaint", {"masks": None}, r"masks are object\[\]"),
        ("inpaint", {"soften": -1}, "soften is -1; it must be a finite number of pixels"),
        ("inpaint", {"soften": NAN}, "soften is nan"),
        ("inpaint", {"soften": "2"}, "soften is '2'"),
        ("inpaint", {"tries": 0}, "tries is 0; it must be a positive whole number"),
        ("inpaint", {"tries": 1.5}, "tries is 1.5"),
        ("inpaint", {"tries": True}, "tries is True"),
        ("inpaint", {"labels": [1]}, "1 labels for 4 images"),
        ("inpaint", {"images": IMAGES[:0]}, "this model edits"),
        ("remove", {"margin": -1}, "margin is -1"),
        ("remove", {"margin": float("inf")}, "margin is inf"),
        ("remove", {"guidance": "paired"}, "without labels nothing can be guided"),
        ("remove", {"guidance_scale": 1.5}, "without labels nothing can be guided"),
        ("remove", {"guidance_interval": (0.1, 0.5)}, "without labels nothing can be guided"),
        ("remove", {"labels": [1, 2, 3]}, "3 labels for 4 images"),
        ("invert", {"schedule": "H1R1"}, "a refiner goes from noise to data only"),
        ("invert", {"schedule": ""}, "has no steps"),
        ("invert", {"labels": [0] * 5}, "5 labels for 4 images"),
        ("invert", {"images": IMAGES.astype(np.int32)}, "images are int32"),
        ("invert", {"batch_size": -1}, "batch_size is -1"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_done_is_refused_before_anything_runs(
    pipe, task, given, message, monkeypatch
):
    monkeypatch.setattr(pipe, "_program", lambda *_: pytest.fail("it ran"))
    base = {"edit": EDIT, "inpaint": INPAINT, "remove": REMOVE, "invert": INVERT}[task]
    short = {} if task == "invert" else SHORT
    with pytest.raises(InputError, match=message):
        getattr(pipe, task)(**{**base, **short, **given})


@pytest.mark.parametrize("strength", [jnp.float32(1.5), jnp.float32(-0.1), jnp.float32(NAN)])
def test_a_strength_of_jax_that_is_no_strength_is_refused(strength):
    with pytest.raises(InputError, match="strength is"):
        check_strength(strength)


# real digits

COUNT = 80
SCHEDULES = ("H8", "H1P3R2")


@pytest.fixture(scope="module")
def digits():
    """The shipped model, a judge, and digits that it was not fitted on, with what they show."""
    images, labels = arrays(open_source("digits"))
    held_out = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    images = np.asarray(to_uint8(images[held_out][:COUNT]))
    return ft.ClassToImage.load("digits"), DigitsClassifier(), images, labels[held_out][:COUNT]


def difference(a, b):
    """Of each image, the root mean square in units of [-1, 1]."""
    delta = (np.asarray(a, float) - np.asarray(b, float)) / 127.5
    return np.sqrt(np.mean(delta**2, axis=(1, 2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_lower_half_of_real_digits_is_completed_as_their_label_says(digits, schedule):
    pipe, judge, images, labels = digits
    lower = np.zeros((8, 8), bool)
    lower[4:] = True
    made = np.asarray(pipe.inpaint(images, lower, labels, schedule=schedule))
    np.testing.assert_array_equal(made[:, :4], images[:, :4])
    assert judge.accuracy(from_uint8(made), labels) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_strength_moves_evenly_from_a_digit_to_a_new_one(digits, schedule):
    pipe, _, images, labels = digits
    made = [
        pipe.edit(images, labels, strength=strength, schedule=schedule)
        for strength in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]
    np.testing.assert_array_equal(made[0], images)
    assert levels(made[-1], pipe(labels, schedule=schedule)) <= 1
    changes = [float(difference(image, images).mean()) for image in made]
    assert (np.diff(changes) > 0.02).all()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_digit_made_another_is_recognised_and_near_its_source(digits, schedule):
    pipe, judge, images, labels = digits
    others = (labels + 1) % 10
    unrelated = pipe(others, seeds=1, schedule=schedule)
    made = pipe.edit(
        images, others, strength=1, source_labels=labels, inversion="H12", schedule=schedule
    )
    near, far = (difference(a, images) for a in (made, unrelated))
    assert judge.accuracy(from_uint8(made), others) >= 0.9
    assert near.mean() < far.mean()
    assert (near < far).mean() > 0.8


@pytest.mark.slow
def test_a_digit_inverted_and_sampled_back_is_the_same(digits):
    pipe, _, images, labels = digits
    for way in ("H12", sampler.INVERSION):
        noise = pipe.invert(images, labels, schedule=way)
        back = pipe.sample_latents(noise, labels, schedule="H12", guidance="none")
        data = from_uint8(images)
        assert float(jnp.sqrt(jnp.mean((back - data) ** 2) / jnp.mean(data**2))) <= 0.05
