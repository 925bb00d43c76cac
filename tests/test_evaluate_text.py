"""evaluate on a model of texts: captions in turn, digits that are named, cards, and refusals."""

import json
import re

import jax
import numpy as np
import pytest
import tiny_text
from PIL import Image
from test_benchmark import save_tiny_model
from test_commands import run

from flowturbo_jax import TextToImage
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.data.digit_captions import PHRASINGS
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import captions, evaluation, judging

pytestmark = pytest.mark.usefixtures("compiled_once")
SAMPLES, BATCH = 20, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of images of the digits' size."""
    folder = tmp_path_factory.mktemp("model") / "m"
    return str(tiny_text.save(folder, refiner=False, vae=False, in_channels=1))


@pytest.fixture(autouse=True)
def compiled_quickly():
    """What is measured but once is compiled as fast as can be; it does the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def asked(model):
    """How the tests ask; for digits alone no more is needed."""
    shared = ["evaluate", model, "--schedules=E1", f"--samples={SAMPLES}", f"--batch-size={BATCH}"]
    return [*shared, "--captions=digit_captions"]


@pytest.fixture
def photographs(tmp_path):
    """A folder of grey images with captions, and a file of such."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, grey in enumerate(np.random.default_rng(0).integers(0, 256, (6, 8, 8))):
        Image.fromarray(grey.astype(np.uint8)).convert("RGB").save(folder / f"{index}.png")
        second = f"again {index}\n" if index else ""
        (folder / f"{index}.txt").write_text(f"picture {index}\n{second}")
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in tiny_text.captions()))
    return folder


def rows_of(out):
    """The measurements, without what differs from run to run."""
    rows = json.loads(out.read_text())
    for row in rows:
        row["results"].pop("ms_per_image", None)
    return rows


def test_digits_are_judged_by_what_their_captions_name(asked, tmp_path, capsys):
    out = tmp_path / "results.json"
    given = [*asked, f"--out={out}", "--negative-prompt=a grey square", f"--npz={tmp_path}/npz"]
    assert run(package_main, *given) == 0
    (row,) = rows_of(out)
    expected = {"captions": "digit_captions", "negative_prompt": "a grey square"}
    expected |= {"image_size": [8, 8], "label_sampling": "balanced", "reference": "digits"}
    assert {key: row["card"][key] for key in expected} == expected
    digests = ("captions_sha256", "text_encoder_sha256", "tokenizer_sha256")
    for key in (*digests, "label_classifier_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", row["card"][key]), key
    results = row["results"]
    by_phrasing = results["label_accuracy_by_phrasing"]
    assert list(by_phrasing) == list(PHRASINGS[:2])  # ten digits each, of 20 images
    assert np.mean(list(by_phrasing.values())) == pytest.approx(results["label_accuracy"])
    with np.load(next((tmp_path / "npz").glob("*.npz"))) as stored:
        made = stored["arr_0"]
    right = judging.judge(made, np.arange(SAMPLES) % 10, judging.digits_judges())["label_right"]
    assert results["label_accuracy"] == right.mean()
    said = capsys.readouterr().out
    assert "label accuracy" in said
    assert "phrasing" not in said
    before = out.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "judge", lambda *_: pytest.fail("it is known"))
        assert run(package_main, *given) == 0
    assert out.read_bytes() == before
    assert run(package_main, "evaluate", "--compare", str(out), str(copy_of(out))) == 0


def copy_of(out):
    other = out.with_name("other.json")
    other.write_bytes(out.read_bytes())
    return other


def test_the_images_are_those_of_the_captions(asked, model, tmp_path):
    given = [*asked, f"--out={tmp_path / 'x.json'}", f"--npz={tmp_path}", "--labels=random"]
    assert run(package_main, *given, "--seeds=3", "--negative-prompt=a grey square") == 0
    with np.load(tmp_path / "E1-paired-1.5-seed3.npz") as stored:
        made = stored["arr_0"]
    known = captions.open_captions("digit_captions").texts
    texts = [known[i] for i in evaluation.labels_of(SAMPLES, len(known), "random", 3)]
    pipe = TextToImage.load(model)
    wanted = np.asarray(
        pipe(texts, negative_prompts="a grey square", seeds=3, schedule="E1", batch_size=BATCH)
    )
    # On four devices a batch is four small ones, which round otherwise: at most by a level.
    assert np.abs(wanted.astype(int) - made).max() <= 1
    assert (wanted == made).mean() > 0.99


def test_an_interrupted_measurement_goes_on_to_the_same_scores(model, tmp_path):
    pipe, judges = TextToImage.load(model), judging.digits_judges()
    plan, wanted = pipe.plan("E1"), captions.open_captions("digit_captions")
    settings = {"seed": 3, "samples": SAMPLES, "batch_size": BATCH, "judges": judges}
    card = evaluation.protocol_card(pipe, plan, **settings) | wanted.card
    given, seen = (pipe, plan, judges, card), []

    def stop(done, total):
        if done >= BATCH:
            raise OSError("killed")

    whole = evaluation.measure(*given, tmp_path / "whole", captions=wanted)
    with pytest.raises(OSError, match="killed"):
        evaluation.measure(*given, tmp_path / "cut", captions=wanted, on_images=stop)
    found = evaluation.measure(
        *given, tmp_path / "cut", captions=wanted, on_images=lambda n, _: seen.append(n)
    )
    assert seen[0] == BATCH
    for results in (whole, found):
        results.pop("ms_per_image", None)
    assert found == whole


def test_captions_of_a_file_are_compared_with_real_images(asked, photographs, tmp_path):
    names = {"file": tmp_path / "prompts.txt", "folder": f"captions:{photographs}"}
    cards = {}
    for name, value in names.items():
        out = tmp_path / f"{name}.json"
        given = [*asked, f"--captions={value}", "--reference=digits", "--samples=4"]
        assert run(package_main, *given, f"--out={out}") == 0
        (row,) = rows_of(out)
        assert "label_accuracy" not in row["results"]  # they name no digit
        cards[name] = row["card"]
    assert cards["file"]["captions"] == "prompts.txt"
    assert cards["folder"]["captions"] == f"captions:{photographs}"
    assert cards["file"]["captions_sha256"] != cards["folder"]["captions_sha256"]


def test_each_image_has_its_first_caption_before_any_has_its_second(photographs):
    found = captions.open_captions(f"captions:{photographs}", 8)
    first = [f"picture {index}" for index in range(6)]
    assert list(found.texts) == [*first, *(f"again {index}" for index in range(1, 6))]
    assert found.digits is None


def test_digits_take_turns_in_one_phrasing_after_the_other():
    found = captions.open_captions("digit_captions")
    assert found.digits.tolist() == [*range(10)] * len(PHRASINGS)
    assert found.texts[3] == "a handwritten three"
    assert found.texts[13] == "the digit 3"
    assert (len(set(found.texts)), found.phrasings[13]) == (80, PHRASINGS[1])


def test_accuracy_of_a_phrasing_is_that_of_its_images():
    found = captions.open_captions("digit_captions")
    right = np.array([1, 0, 1, 1], np.uint8)
    by_phrasing = found.by_phrasing(np.array([0, 1, 10, 11]), right)
    assert by_phrasing == {PHRASINGS[0]: 0.5, PHRASINGS[1]: 1.0}


def test_images_of_another_size_are_measured_at_that(asked, tmp_path):
    out, reference = tmp_path / "out.json", tmp_path / "reference.npz"
    np.savez(reference, mu=np.zeros(8 * 12), sigma=np.eye(8 * 12))
    given = ["--image-size=8x12", "--features=pixels", f"--reference={reference}"]
    assert run(package_main, *asked, *given, f"--npz={tmp_path}", f"--out={out}") == 0
    assert rows_of(out)[0]["card"]["image_size"] == [8, 12]
    with np.load(next(tmp_path.glob("E1*.npz"))) as stored:
        assert stored["arr_0"].shape == (SAMPLES, 8, 12, 1)


def test_without_schedules_a_model_without_a_refiner_is_measured_by_one_it_can_take(
    model, asked, tmp_path
):
    out = tmp_path / "out.json"
    asked = [flag for flag in asked if not flag.startswith("--schedules")]
    assert run(package_main, *asked, f"--out={out}") == 0
    (row,) = json.loads(out.read_text())
    assert row["card"]["schedule"] == "H1P6"


def test_a_batch_that_does_not_fit_is_one_line(asked, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(evaluation, "measure", fail)
    assert run(package_main, *asked, f"--out={tmp_path / 'out.json'}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    expected = f"error: a batch of {BATCH} images does not fit into memory; take a smaller --batch"
    assert error == f"{expected}-size"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captions="], "--captions is empty"),
        (["--captions=nowhere.txt", "--reference=digits"], r"nowhere\.txt"),
        (["--captions=prompts.txt"], "--reference is missing: real images such as images:DIR"),
        (["--captions=digits", "--reference=digits"], "digits has no captions; give captions:DIR"),
        (["--captions=empty.txt", "--reference=digits"], r"empty\.txt has no prompts"),
        (["--captions=captions:nowhere", "--reference=digits"], "nowhere"),
        (["--quantization=int8"], "quantization is for models of classes"),
        (["--image-size=9"], "9 x 9; both sides must be multiples of 2"),
        (["--image-size=big"], "--image-size is 'big'; give HEIGHTxWIDTH"),
        (["--image-size=16"], r"images of \[16, 16, 1\] are no digits: give --features"),
        (["--negative-prompt=a", "--guidance=none"], "--negative-prompt does nothing where"),
        (["--schedules=H1R1"], "this model has no refiner"),
        (["--labels=fair"], "labels are to be 'fair'"),
    ],
)
def test_bad_input_is_one_clear_line(
    asked, photographs, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    assert run(package_main, *asked, "--out=out.json", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out.json").exists()


def test_texts_belong_to_models_of_texts(model, tmp_path, capsys):
    classes = str(save_tiny_model(tmp_path / "classes"))
    out = f"--out={tmp_path / 'out.json'}"
    for flag in ("--captions=digit_captions", "--negative-prompt=a", "--image-size=16"):
        assert run(package_main, "evaluate", classes, "--schedules=E1", flag, out) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{flag.split('=')[0]} is for models of texts" in line
    assert run(package_main, "evaluate", model, "--schedules=E1", out) == 2
    assert "takes texts: say which with --captions" in capsys.readouterr().err


def test_a_data_set_without_captions_is_refused():
    with pytest.raises(InputError, match="digits has no captions"):
        captions.open_captions("digits")
