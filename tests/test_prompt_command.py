"""sample.py on a model of texts: files and cards, seeds and sizes, edits, and what it refuses."""

import json
import re

import jax
import numpy as np
import pytest
import tiny_text
from PIL import Image
from test_benchmark import save_tiny_model
from test_commands import run as run_command

import sample as sample_script
from flowturbo_jax import TextToImage
from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.commands import entry
from flowturbo_jax.commands.result_files import listed

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
pytestmark = pytest.mark.usefixtures("compiled_once")
TWO = "a red circle | a blue cross"
TEXTS = ("a red circle", "a blue cross")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of images of 8 x 8 pixels, or of any even sides."""
    folder = tmp_path_factory.mktemp("model") / "m"
    return str(tiny_text.save(folder, refiner=False, vae=False, in_channels=3))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A model of classes."""
    return str(save_tiny_model(tmp_path_factory.mktemp("classes") / "m"))


@pytest.fixture(scope="module")
def pipe(model):
    return TextToImage.load(model)


@pytest.fixture(autouse=True)
def compiled_quickly():
    """What a test calls once or twice is compiled as fast as can be; it does the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(model, tmp_path, capsys):
    """A call of sample.py: `run(KEY=VALUE, ...)` gives its exit code, output and errors."""
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")

    def call(**keys):
        given = {"model_dir": model, "out": tmp_path / "out", "schedule": "E1", "name": "t"}
        given |= {"baseline": "", "data": ""}
        words = [f"--config.{key}={value}" for key, value in {**given, **keys}.items()]
        config = tmp_path / "recipe.py"  # the shipped one has samples, which these leave open
        config.write_text(
            "from flowturbo_jax.sample_config import SampleConfig\n"
            "def get_config():\n"
            "    return SampleConfig('t', model_dir='m', schedule='E1').to_config_dict()\n"
        )
        with pytest.raises(SystemExit) as stop:
            entry.run(sample_script.main, ["sample.py", f"--config={config}", *words])
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


def read(tmp_path, name="t"):
    return json.loads((tmp_path / "out" / f"{name}.json").read_text())


def written(tmp_path):
    return sorted(file.name for file in (tmp_path / "out").iterdir())


def pixels(tmp_path, index, name="t"):
    return np.asarray(Image.open(tmp_path / "out" / f"{name}_{index}.png"))


def card_of(tmp_path, index, name="t"):
    return json.loads(Image.open(tmp_path / "out" / f"{name}_{index}.png").text["protocol_card"])


def test_each_prompt_gets_a_file_with_its_card(run, tmp_path, pipe):
    code, out, error = run(prompt=TWO, seed=4, baseline="E2", negative_prompt="a grey square")
    assert code == 0, error
    assert written(tmp_path) == ["t.json", "t.png", "t_0.png", "t_1.png"]
    report = read(tmp_path)
    assert report["prompts"] == list(TEXTS)
    assert report["results"] == [str(tmp_path / f"out/t_{i}.png") for i in range(2)]
    assert f"wrote {', '.join(report['results'])}" in out
    assert [row["card"]["schedule"] for row in report["schedules"]] == ["E2", "E1"]
    card = report["schedules"][1]["card"]
    expected = {"seed": 4, "samples": 2, "negative_prompt": "a grey square", "image_size": [8, 8]}
    expected |= {"guidance": "paired", "label_sampling": "in turn"}
    assert {key: card[key] for key in expected} == expected
    for key in ("prompts_sha256", "text_encoder_sha256", "tokenizer_sha256", "predictor_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", card[key]), key
    made = np.asarray(pipe(TEXTS, negative_prompts="a grey square", seeds=4, schedule="E1"))
    assert (made != np.asarray(pipe(TEXTS, seeds=4, schedule="E1"))).any()
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(pixels(tmp_path, i), made[i])
        assert card_of(tmp_path, i) == card | {"prompt": text, "seed": 4, "index": i}
    assert np.asarray(Image.open(tmp_path / "out/t.png")).shape[1] > 2 * 8


def test_without_samples_every_prompt_comes_with_every_seed(run, tmp_path, pipe):
    code, _, error = run(prompt=TWO, seeds="7, 3,9", batch_size=4)
    assert code == 0, error
    seeds, texts = [7, 7, 3, 3, 9, 9], TEXTS * 3
    made = np.asarray(pipe(texts, seeds=seeds, schedule="E1", batch_size=4))
    for i in range(6):
        np.testing.assert_array_equal(pixels(tmp_path, i), made[i])
        card = card_of(tmp_path, i)
        assert (card["prompt"], card["seed"], card["index"]) == (texts[i], seeds[i], 0)
    assert read(tmp_path)["schedules"][0]["card"]["seed"] == [7, 3, 9]


def test_so_many_samples_take_prompts_and_seeds_in_turn(run, tmp_path):
    code, _, error = run(prompt=TWO, seeds="7,3", samples=3)
    assert code == 0, error
    cards = [card_of(tmp_path, i) for i in range(3)]
    assert [card["prompt"] for card in cards] == [TEXTS[0], TEXTS[1], TEXTS[0]]
    assert [card["seed"] for card in cards] == [7, 3, 7]
    assert read(tmp_path)["schedules"][0]["card"]["samples"] == 3


def test_prompts_of_a_file_are_those_given_by_hand(run, tmp_path):
    files = {
        "prompts.txt": f"{TEXTS[0]}\n\n{TEXTS[1]}\n",
        "prompts.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    }
    assert run(prompt=TWO)[0] == 0
    wanted = [pixels(tmp_path, i) for i in range(2)]
    digest = read(tmp_path)["schedules"][0]["card"]["prompts_sha256"]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        code, _, error = run(prompts_file=tmp_path / name)
        assert code == 0, error
        np.testing.assert_array_equal([pixels(tmp_path, i) for i in range(2)], wanted)
        assert read(tmp_path)["schedules"][0]["card"]["prompts_sha256"] == digest


@pytest.mark.parametrize(("size", "shape"), [("12", (12, 12)), ("8x12", (8, 12))])
def test_images_have_the_size_that_is_asked_for(run, tmp_path, pipe, size, shape):
    code, _, error = run(prompt="a red circle", image_size=size)
    assert code == 0, error
    made = np.asarray(pipe.at_size(*shape)(["a red circle"], schedule="E1"))
    np.testing.assert_array_equal(pixels(tmp_path, 0), made[0])
    assert card_of(tmp_path, 0)["image_size"] == list(shape)


def test_images_of_an_earlier_run_do_not_pass_for_ones_of_this(run, tmp_path):
    assert run(prompt=TWO)[0] == 0
    mine = ("t_2.png", "t_01.png", "t_1.png.bak", "other_1.png")
    for name in mine:
        (tmp_path / "out" / name).write_text("mine")
    assert run(prompt="a blue cross", samples=1)[0] == 0
    assert written(tmp_path) == sorted(["t.json", "t.png", "t_0.png", *mine])
    (tmp_path / "out/t.json").write_text('{"results": ["t_2.png", "../t_3.png", 4]}')
    (tmp_path / "t_3.png").write_text("mine")
    assert run(prompt="a blue cross", samples=1)[0] == 0  # what is no report of ours lists nothing
    assert (tmp_path / "out/t_2.png").exists()
    assert (tmp_path / "t_3.png").exists()


def test_edits_are_of_prompts_in_place_of_labels(run, tmp_path, pipe):
    given = {"task": "edit", "image": tmp_path / "picture.png", "strength": 0.5}
    code, _, error = run(prompt=TWO, **given, seeds="5,6", negative_prompt="a grey square")
    assert code == 0, error
    images = np.repeat(PICTURE[None], 4, axis=0)
    rows = pipe.tokens(TEXTS * 2, "a grey square")
    made = np.asarray(pipe.edit(images, rows, strength=0.5, seeds=[5, 5, 6, 6], schedule="E1"))
    for i in range(4):
        np.testing.assert_array_equal(pixels(tmp_path, i, "t_edit"), made[i])
    report = read(tmp_path, "t_edit")
    assert report["prompts"] == list(TEXTS * 2)
    card = report["schedules"][0]["card"]
    assert (card["negative_prompt"], card["seed"]) == ("a grey square", [5, 6])
    assert "source_label" not in card
    assert card_of(tmp_path, 3, "t_edit") == card | {"prompt": TEXTS[1], "seed": 6, "index": 0}


def test_an_edit_can_start_from_the_image_inverted_under_its_prompt(run, tmp_path, pipe):
    source = {"source_prompt": "a green square", "inversion": "E1"}
    given = {"task": "edit", "image": tmp_path / "picture.png", "strength": 0.5, **source}
    code, _, error = run(prompt="a red circle", **given)
    assert code == 0, error
    how = {"source_labels": ["a green square"], "inversion": "E1", "schedule": "E1"}
    made = np.asarray(pipe.edit(PICTURE[None], ["a red circle"], strength=0.5, **how))
    np.testing.assert_array_equal(pixels(tmp_path, 0, "t_edit"), made[0])
    card = read(tmp_path, "t_edit")["schedules"][0]["card"]
    assert (card["source_prompt"], card["inversion"]) == ("a green square", "E1")


def test_removing_needs_no_prompt_and_inverting_one(run, tmp_path):
    given = {"image": tmp_path / "picture.png"}
    code, _, error = run(task="remove", mask="box:3,3,5,5", **given, seeds="1,2")
    assert code == 0, error
    first, second = (pixels(tmp_path, i, "t_remove") for i in range(2))
    np.testing.assert_array_equal(first[:2], PICTURE[:2])
    assert (first != second).any()
    assert read(tmp_path, "t_remove")["schedules"][0]["card"]["label_sampling"] == "none"
    code, _, error = run(task="invert", inversion="E1", prompt="a red circle", **given)
    assert code == 0, error
    assert np.load(tmp_path / "out/t_invert.npz")["arr_0"].shape == (1, 8, 8, 3)


def test_seeds_are_for_models_of_classes_too(run, tmp_path, classes):
    given = {"model_dir": classes, "schedule": "E1"}
    code, _, error = run(**given, labels="3,1", seeds="5,6")
    assert code == 0, error
    card = read(tmp_path)["schedules"][0]["card"]
    assert (card["samples"], card["seed"]) == (4, [5, 6])
    assert written(tmp_path) == ["t.json", "t.png"]
    assert run(**given)[0] == 0
    card = read(tmp_path)["schedules"][0]["card"]
    assert (card["samples"], card["seed"], card["label_sampling"]) == (60, 0, "balanced")


IMAGE = {"task": "edit", "image": "picture.png"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "to generate, say what the images show: --config.prompt=TEXT"),
        ({"prompt": " | "}, r"prompt is ' \| ', which has no text"),
        ({"prompt": TWO, "prompts_file": "p.txt"}, "prompt and prompts_file are both set"),
        ({"prompts_file": "nowhere.txt"}, "nowhere.txt"),
        ({"prompts_file": "empty.txt"}, "empty.txt has no prompts"),
        ({"prompts_file": "bad.jsonl"}, "bad.jsonl"),
        ({"negative_prompt": "grey"}, "set prompt or prompts_file, too"),
        ({"prompt": TWO, "negative_prompt": "grey", "guidance_scale": 1}, "nothing is guided"),
        ({"prompt": TWO, "labels": 3}, "prompt and labels are both set"),
        ({"labels": 3}, "labels is set, but .* takes texts; set prompt"),
        ({"prompt": TWO, "data": "digits"}, "flowturbo_jax evaluate scores; set --config.data="),
        ({"prompt": TWO, "quantization": "int8"}, "quantization is for models of classes"),
        ({"prompt": TWO, "image_size": "9"}, "9 x 9; both sides must be multiples of 2"),
        ({"prompt": TWO, "image_size": "0"}, "0 x 0; both sides must be multiples of 2"),
        ({"prompt": TWO, "image_size": "8x"}, "image_size is '8x'; give HEIGHTxWIDTH"),
        ({"prompt": TWO, "image_size": "-8"}, "image_size is '-8'"),
        ({"prompt": TWO, "seeds": "1,x"}, "seeds is '1,x'; give whole numbers"),
        ({"prompt": TWO, "seeds": "4294967296"}, "give whole numbers from 0 to 4294967295"),
        ({"prompt": TWO, "samples": 0}, "samples is 0"),
        ({"prompt": TWO, "schedule": "H1R1"}, "this model has no refiner"),
        (IMAGE, "to edit, say what the result shows: --config.prompt=TEXT"),
        ({**IMAGE, "prompt": TWO, "image_size": "8x12"}, r"images are \[8, 12, 3\]; .* square"),
        ({**IMAGE, "prompt": TWO, "source_label": 3}, "source_label is set, but .* source_prompt"),
        (
            {**IMAGE, "prompt": "a", "source_prompt": "b", "seeds": "1,2"},
            "2 results of 1 .* repeat",
        ),
        ({**IMAGE, "task": "invert", "prompt": TWO}, "inverted under one label, .* or one prompt"),
        ({**IMAGE, "task": "invert", "prompt": "a", "seeds": "1"}, "key seeds is set, but task"),
        (
            {**IMAGE, "task": "remove", "mask": "box:3,3,5,5", "guidance_scale": 2},
            "without a prompt nothing can be guided; set config.prompt",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    code, _, errors = run(**keys)
    assert code == 2
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": TWO}, "prompt is set, but .* is a model of classes; set labels"),
        ({"prompts_file": "p.txt"}, "prompts_file is set, but .* is a model of classes"),
        ({"image_size": "16"}, "image_size is set, but .* is a model of classes; leave it out"),
        ({**IMAGE, "labels": 3, "source_prompt": "b"}, "source_prompt is set, .* set source_label"),
    ],
)
def test_texts_mean_nothing_to_a_model_of_classes(run, tmp_path, classes, keys, message):
    code, _, errors = run(model_dir=classes, **keys)
    assert code == 2
    (line,) = errors.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["tune", "stability", "demo"])
def test_what_is_for_models_of_classes_says_so(model, tmp_path, capsys, command):
    out = [] if command == "demo" else [f"--out={tmp_path / 'out'}"]
    assert run_command(package_main, command, model, *out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {command} is for models of classes, and {model} takes texts")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keys", [{"prompt": TWO}, {"prompt": "a cross", "task": "edit", "image": "picture.png"}]
)
def test_a_batch_that_does_not_fit_is_one_line(run, tmp_path, monkeypatch, keys):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.chdir(tmp_path)
    for name in ("__call__", "edit"):
        monkeypatch.setattr(TextToImage, name, fail)
    code, _, error = run(**keys)
    assert code == 2
    count = len(keys["prompt"].split("|"))
    expected = f"error: a batch of {count} images does not fit into memory; take a smaller --config"
    assert error.splitlines()[-1] == f"{expected}.batch_size"
    assert "Traceback" not in error


def test_many_files_are_listed_by_the_first_and_the_last():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(13)]) == "0 ... 12 (13 images)"
