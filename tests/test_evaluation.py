"""Measuring a model: the same numbers however the work is cut, images in files, labels, cards."""

import dataclasses
import functools
import json
import resource

import jax
import numpy as np
import pytest
import test_mixture
import tiny
import tiny_latents
from PIL import Image

from flowturbo_jax import ClassToImage, data, images, metrics, model_directory
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import SiTConfig, family
from flowturbo_jax.pipelines import evaluation, judging, real_images
from flowturbo_jax.pipelines.image_files import ImageFiles
from flowturbo_jax.pipelines.judging import Judges

SAMPLES, BATCH = 30, 8


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = ClassToImage.load(tiny.save_model(tmp_path_factory.mktemp("model") / "m"))
    pipe.on_all_devices = functools.cache(pipe.on_all_devices)  # compiled once for all tests
    return pipe


@pytest.fixture(scope="module")
def judges():
    return judging.digits_judges()


def card_of(pipe, judges, plan, **changed):
    settings = {"seed": 3, "samples": SAMPLES, "batch_size": BATCH, "judges": judges, **changed}
    return evaluation.protocol_card(pipe, plan, **settings)


def measured(pipe, judges, work, *, schedule="H1", places=None, on_images=max, **changed):
    """The scores, without the time."""
    plan = pipe.plan(schedule)
    card = card_of(pipe, judges, plan, **changed)
    files = ImageFiles(card_of(pipe, None, plan, **changed), **(places or {}))
    found = evaluation.measure(pipe, plan, judges, card, work, files=files, on_images=on_images)
    found.pop("ms_per_image", None)
    return found


@pytest.fixture(scope="module")
def whole(pipe, judges, tmp_path_factory):
    """What an undisturbed run finds."""
    return measured(pipe, judges, tmp_path_factory.mktemp("work") / "w")


def test_scores_do_not_depend_on_the_batch_size(pipe, judges, whole, tmp_path):
    for size in (1, SAMPLES + 1):
        found = measured(pipe, judges, tmp_path / str(size), batch_size=size)
        # Another batch rounds otherwise: a byte in thousands may be the next one.
        assert found == pytest.approx(whole, rel=1e-4)
    assert whole.keys() == {"frechet_distance", "precision", "recall", "label_accuracy"}


@pytest.mark.parametrize("stop", range(0, SAMPLES + BATCH, BATCH))
def test_a_run_that_ends_at_any_batch_goes_on_to_the_same_scores(
    pipe, judges, whole, tmp_path, stop
):
    done_before = []

    def end(done, total):
        if done >= min(stop, SAMPLES):
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        measured(pipe, judges, tmp_path / "work", on_images=end)
    for torn in (tmp_path / "work").glob("*.rows"):  # half a batch, and half a row of one file
        with torn.open("ab") as file:
            file.write(bytes(5 * 512 if torn.stem == "pooled" else 3))
    found = measured(pipe, judges, tmp_path / "work", on_images=lambda n, _: done_before.append(n))
    assert found == whole  # bit for bit: the same batches
    assert done_before[0] == min(stop, SAMPLES) // BATCH * BATCH or stop >= SAMPLES
    assert done_before[-1] == SAMPLES


def test_images_in_png_and_npz_are_those_of_the_pipeline(pipe, judges, whole, tmp_path):
    places = {"png": tmp_path / "png", "npz": tmp_path / "new" / "all.npz"}
    assert measured(pipe, judges, tmp_path / "work", places=places) == whole
    with np.load(places["npz"]) as stored:
        assert stored.files == ["arr_0"]
        made = stored["arr_0"]
    assert (made.dtype, made.shape) == (np.uint8, (SAMPLES, 8, 8, 1))
    files = sorted(places["png"].glob("*.png"))
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(SAMPLES)]
    for file, image in zip(files, made, strict=True):
        opened = Image.open(file)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.repeat(image, 3, axis=-1))
    labels = np.arange(SAMPLES) % 10
    piped = np.asarray(pipe(labels, seeds=3, schedule="H1", batch_size=BATCH))
    # On four devices a batch is four small ones, which round otherwise: at most by a level.
    assert np.abs(piped.astype(int) - made).max() <= 1
    assert (piped == made).mean() > 0.999
    card = json.loads((places["png"] / "card.json").read_text())
    assert (card["schedule"], card["seed"]) == ("H1", 3)
    assert "reference" not in card
    assert json.loads(places["npz"].with_suffix(".json").read_text()) == card


def test_missing_pictures_are_made_again(pipe, judges, whole, tmp_path):
    places = {"png": tmp_path / "png"}
    seen = []

    def end(done, total):
        if done == 2 * BATCH:
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        measured(pipe, judges, tmp_path / "work", places=places, on_images=end)
    first = (tmp_path / "png" / "000000.png").read_bytes()
    (tmp_path / "png" / "000009.png").unlink()
    (tmp_path / "png" / ".000016.png.123.tmp").write_bytes(b"half")
    again = measured(
        pipe, judges, tmp_path / "work", places=places, on_images=lambda n, _: seen.append(n)
    )
    assert (seen[0], again) == (BATCH, whole)
    assert (tmp_path / "png" / "000000.png").read_bytes() == first
    names = {path.name for path in (tmp_path / "png").iterdir()}
    assert names == {"card.json", *(f"{index:06d}.png" for index in range(SAMPLES))}


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_other_images_are_not_written_over(pipe, judges, tmp_path, kind):
    places = {kind: tmp_path / f"images.{kind}"}
    measured(pipe, judges, tmp_path / "a", places=places, samples=4)
    with pytest.raises(InputError, match=r"holds images of another measurement \(other seed\)"):
        measured(pipe, judges, tmp_path / "b", places=places, samples=4, seed=4)
    measured(pipe, judges, tmp_path / "c", places=places, samples=4, batch_size=4)
    card = places[kind] / "card.json" if kind == "png" else places[kind].with_suffix(".json")
    card.unlink()
    with pytest.raises(InputError, match="is there already and has no card"):
        measured(pipe, judges, tmp_path / "d", places=places, samples=4)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_place_for_images_that_cannot_be_had_is_refused_before_the_first(
    pipe, judges, tmp_path, kind
):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write images to .*(Not a directory|File exists)"):
        measured(
            pipe,
            judges,
            tmp_path / "work",
            places={kind: tmp_path / "file" / f"a.{kind}"},
            on_images=lambda *_: pytest.fail("it began"),
        )
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("full_at", ["features", "archive"])
def test_a_full_disk_loses_nothing(pipe, judges, whole, tmp_path, monkeypatch, full_at):
    places = {"npz": tmp_path / "a.npz"}
    save = images.save_npz
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def save_when_full(*arguments):
        limit(1000)  # bytes; 30 images have 1920
        save(*arguments)

    monkeypatch.setattr(images, "save_npz", save_when_full)
    if full_at == "features":
        limit(10_000)  # of 19 images
    try:
        with pytest.raises(InputError, match=r"cannot write .*File too large"):
            measured(pipe, judges, tmp_path / "work", places=places)
    finally:
        limit(soft)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "work"]
    monkeypatch.undo()
    seen = []
    again = measured(
        pipe, judges, tmp_path / "work", places=places, on_images=lambda n, _: seen.append(n)
    )
    assert (seen[0], again) == (16 if full_at == "features" else SAMPLES, whole)


def test_an_image_that_is_not_finite_is_named(pipe, judges, tmp_path):
    model = pipe.model
    broken = jax.tree.map(lambda a: np.full_like(a, np.nan), model.predictor_params)
    other = ClassToImage(dataclasses.replace(model, predictor_params=broken))
    with pytest.raises(InputError, match=r"image 0 of seed 3 is not finite: .*look at the weights"):
        measured(other, judges, tmp_path / "work", places={"png": tmp_path / "png"})
    assert not list((tmp_path / "png").glob("*.png"))


def test_a_request_to_stop_in_the_last_batch_is_heard(pipe, judges, whole, tmp_path):
    import signal

    def stop(done, total):
        if done == total:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        measured(pipe, judges, tmp_path / "work", on_images=stop)
    seen = []
    again = measured(pipe, judges, tmp_path / "work", on_images=lambda *n: seen.append(n))
    assert (seen, again) == ([(SAMPLES, SAMPLES)], whole)


def test_digits_features_have_all_scores_but_the_spatial(pipe, tmp_path):
    with judging.opened("digits", None, (8, 8, 1), tmp_path / "ref") as judges:
        card = card_of(pipe, judges, pipe.plan("H1"))
        found = measured(pipe, judges, tmp_path / "work")
        few = measured(pipe, judges, tmp_path / "few", samples=3)
        few_card = card_of(pipe, judges, pipe.plan("H1"), samples=3)
    names = {"frechet_distance", "inception_score", "precision", "recall", "label_accuracy"}
    assert found.keys() == names
    assert 1 <= found["inception_score"] <= 10
    assert all(0 <= found[name] <= 1 for name in ("precision", "recall", "label_accuracy"))
    assert card["precision_recall"] == {"neighbours": 3, "real_images": 1797}
    assert card["inception_score_split"] == 5000
    assert few.keys() == names - {"precision", "recall"}  # no third neighbour
    assert "precision_recall" not in few_card
    assert not (tmp_path / "ref").exists()


def test_spatial_features_are_compared_where_both_sides_have_them(pipe, tmp_path):
    def extract(images):
        flat = images.reshape(len(images), -1).astype(np.float32)
        return metrics.Features(flat[:, :5], flat[:, 5:9])

    network = metrics.FeatureNetwork("corner", "f00d", extract)
    reference = real_images.measure_reference(data.open_source("digits"), network, count=50)
    found = measured(pipe, Judges(network, reference), tmp_path / "a")
    assert found["spatial_frechet_distance"] > 0
    bare = reference._replace(spatial=None, features=None)
    again = measured(pipe, Judges(network, bare), tmp_path / "b")
    assert again == {"frechet_distance": found["frechet_distance"]}
    wrong = reference._replace(spatial=reference.pooled)
    with pytest.raises(InputError, match=r"of 4 spatial features by corner; .* digits has 5"):
        judging.check_fits((8, 8, 1), Judges(network, wrong))


@pytest.mark.parametrize("classes", [0, 3])
def test_models_of_other_classes_are_not_judged_by_digits_labels(tmp_path, classes):
    pipe = ClassToImage.load(tiny.save_model(tmp_path / "m", num_classes=classes))
    with judging.opened(None, None, (8, 8, 1), tmp_path / "ref", classes=classes) as judges:
        found = measured(pipe, judges, tmp_path / "work")
        assert card_of(pipe, judges, pipe.plan("H1"))["label_sampling"] == "balanced"
    assert "frechet_distance" in found
    assert "label_accuracy" not in found


def test_a_model_with_an_autoencoder_is_measured_by_its_images(tmp_path):
    config = SiTConfig(**{**tiny.SIT, "in_channels": 3, "input_size": 4, "patch_size": 2})
    described = dataclasses.replace(
        tiny.description(refiner=False), predictor=config, vae=tiny_latents.CONFIG
    )
    params = tiny.random_params(family("sit").predictor(config))
    model_directory.save(tmp_path / "m", described, params, None, tiny_latents.params())
    pipe = ClassToImage.load(tmp_path / "m")
    folder = tmp_path / "real"
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 9, 12, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    with pytest.raises(InputError, match=r"images of \[8, 8, 3\] are no digits: give --features"):
        judging.opened(None, None, (8, 8, 3), tmp_path / "ref").__enter__()
    with judging.opened("pixels", f"images:{folder}", (8, 8, 3), tmp_path / "ref") as judges:
        card = card_of(pipe, judges, pipe.plan("H1"))
        assert card["vae_sha256"] == pipe.model.fingerprints["vae"]
        assert card["reference_samples"] == 5
        assert [line.split(" for ")[0] for line in card["warnings"]] == [
            "30 samples",
            "5 reference images",
        ]
        places = {"npz": tmp_path / "a.npz"}
        found = measured(pipe, judges, tmp_path / "work", places=places)
    assert found.keys() == {"frechet_distance", "precision", "recall"}
    with np.load(tmp_path / "a.npz") as stored:
        assert stored["arr_0"].shape == (SAMPLES, 8, 8, 3)


def test_a_mixture_is_a_reference_of_so_many_exact_samples(tmp_path, monkeypatch):
    test_mixture.save(tmp_path / "m")
    monkeypatch.setattr(judging, "DRAWN", 40)
    name, shape = f"mixture:{tmp_path / 'm'}", test_mixture.CONFIG.shape
    with judging.opened("pixels", name, shape, tmp_path / "ref") as judges:
        reference = judges.reference
    expected = real_images.measure_reference(data.open_source(name), metrics.PIXELS, count=40)
    assert (reference.name, reference.pooled.count) == (name, 40)
    assert reference.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(reference.features, expected.features)


def test_balanced_labels_take_turns_and_random_ones_depend_on_seed_and_index():
    np.testing.assert_array_equal(evaluation.labels_of(12, 10), [*range(10), 0, 1])
    drawn = evaluation.labels_of(5000, 10, "random", 7)
    np.testing.assert_array_equal(evaluation.labels_of(100, 10, "random", 7), drawn[:100])
    assert (evaluation.labels_of(100, 10, "random", 8) != drawn[:100]).any()
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 500).max() < 5 * np.sqrt(450)  # five standard deviations
    for sampling in evaluation.LABEL_SAMPLINGS:
        assert (evaluation.labels_of(9, 0, sampling, 7) == 0).all()
    with pytest.raises(InputError, match="labels are to be 'fair'; they can be balanced or random"):
        evaluation.labels_of(1, 1, "fair")


def test_balanced_labels_of_some_classes_are_warned_of(pipe, judges):
    line = "9 balanced samples show only the classes 0 to 8 of 10: take more, or random labels"
    plan = pipe.plan("H1")
    for samples, sampling, found in (
        (9, "balanced", [line]),
        (10, "balanced", []),
        (9, "random", []),
    ):
        card = card_of(pipe, judges, plan, samples=samples, label_sampling=sampling)
        assert card["label_sampling"] == sampling
        assert [warning for warning in card["warnings"] if "classes" in warning] == found
