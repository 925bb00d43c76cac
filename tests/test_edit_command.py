"""sample.py on an image that a user brings: what it writes, what it says, what it refuses."""

import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import sample as sample_script
from flowturbo_jax import ClassToImage, pictures
from flowturbo_jax.commands import edit, entry
from flowturbo_jax.sample_config import SampleConfig

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8)).astype(np.uint8)
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save_model(tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(autouse=True)
def compiled_quickly():
    """What a test calls once or twice is compiled as fast as can be; it does the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files that are no pictures, or no masks of one of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("bad")
    Image.fromarray(GREY).save(folder / "broken.png")
    whole = (folder / "broken.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    Image.new("L", (8, 8)).save(folder / "black.png")
    Image.new("L", (4, 4), 255).save(folder / "small.png")
    return folder


@pytest.fixture
def run(model, tmp_path, capsys):
    """A call of sample.py: `run(task, KEY=VALUE, ...)` gives its exit code, output and errors."""
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:, 2:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")

    def call(task, **keys):
        given = {
            "task": task,
            "model_dir": model,
            "out": tmp_path / "out",
            "image": tmp_path / "grey.png",
            "schedule": "E1R1",
            "baseline": "",
            "name": "t",
        }
        words = [f"--config.{key}={value}" for key, value in {**given, **keys}.items()]
        with pytest.raises(SystemExit) as stop:
            entry.run(sample_script.main, ["sample.py", *words])
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


def read(tmp_path, name):
    return json.loads((tmp_path / "out" / f"{name}.json").read_text())


def written(tmp_path):
    return sorted(file.name for file in (tmp_path / "out").iterdir())


def pixels(tmp_path, name):
    return np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))


def test_an_edit_writes_pictures_numbers_cards_and_a_table(run, tmp_path, model):
    code, out, _ = run("edit", labels="3,1", baseline="E1", strength=0.5, seed=4, columns=2)
    assert code == 0
    assert written(tmp_path) == ["t_edit.json", "t_edit.png", "t_edit_0.png", "t_edit_1.png"]
    lines = out.splitlines()
    assert lines[0].split() == ["schedule", "evaluations", "refiner", "ms/image", "change"]
    assert [line.split()[:3] for line in lines[1:3]] == [["E1", "1", "0"], ["E1R1", "1", "2"]]
    assert str(tmp_path / "out/t_edit.json") in out
    assert str(tmp_path / "out/t_edit_1.png") in out
    report = read(tmp_path, "t_edit")
    cards = [row["card"] for row in report["schedules"]]
    assert [card["schedule"] for card in cards] == ["E1", "E1R1"]
    digest = hashlib.sha256((tmp_path / "grey.png").read_bytes()).hexdigest()
    for card in cards:
        assert (card["task"], card["strength"], card["seed"]) == ("edit", 0.5, 4)
        assert (card["image_sha256"], card["samples"]) == (digest, 2)
        assert card["label_sampling"] == "in turn: 3,1"
        assert {"guidance", "guidance_scale", "dtype", "versions", "predictor_sha256"} <= set(card)
    picture = Image.open(tmp_path / "out/t_edit.png")
    assert json.loads(picture.text["protocol_cards"]) == cards
    pipe = ClassToImage.load(model)
    images = np.repeat(GREY[None, ..., None], 2, axis=0)
    wanted = np.asarray(pipe.edit(images, [3, 1], strength=0.5, seeds=4, schedule="E1R1"))
    for i in range(2):
        result = Image.open(tmp_path / f"out/t_edit_{i}.png")
        assert json.loads(result.text["protocol_card"]) == cards[1]
        assert result.size == (8, 8)
        np.testing.assert_array_equal(np.asarray(result), np.broadcast_to(wanted[i], (8, 8, 3)))
    change = report["schedules"][1]["results"]["change"]
    difference = (wanted.astype(np.float64) - images) / 255
    assert change == pytest.approx(np.sqrt(np.mean(difference**2)))
    assert f"{100 * change:.2f} %" in lines[2]
    assert report["results"] == [str(tmp_path / f"out/t_edit_{i}.png") for i in range(2)]


def test_an_edit_of_strength_0_is_the_image_whatever_it_came_as(run, tmp_path):
    wide = np.zeros((16, 24), np.uint8)
    wide[:, 4:20] = GREY.repeat(2, axis=0).repeat(2, axis=1)
    colour = np.stack([GREY] * 3, axis=-1)
    clear = np.concatenate([colour, np.full((8, 8, 1), 255, np.uint8)], axis=-1)
    turned = Image.fromarray(np.rot90(GREY))  # EXIF's 6: to be turned back to the right
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    files = {
        "wide.png": (Image.fromarray(wide), {}),
        "clear.webp": (Image.fromarray(clear), {"lossless": True}),
        "deep.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}),
        "turned.webp": (turned.convert("RGB"), {"exif": exif, "lossless": True}),
        "photo.jpg": (Image.fromarray(colour), {"quality": 100}),
        "press.jpg": (Image.fromarray(colour).convert("CMYK"), {"quality": 100}),
    }
    for name, (image, settings) in files.items():
        image.save(tmp_path / name, **settings)
        code, _, error = run("edit", image=tmp_path / name, labels=3, strength=0, schedule="E1")
        assert code == 0, error
        fitted = pictures.open_picture(tmp_path / name, SHAPE).pixels[..., 0]
        made = pixels(tmp_path, "t_edit_0")
        np.testing.assert_array_equal(made[..., 0], fitted, err_msg=name)
        np.testing.assert_array_equal(made[..., 2], fitted, err_msg=name)
        # JPEG at its best rounds by a few levels, and once more from other colours.
        assert np.abs(fitted.astype(int) - GREY).max() <= (12 if name.endswith("jpg") else 1), name
        assert read(tmp_path, "t_edit")["schedules"][0]["results"]["change"] == 0


def test_inpainting_keeps_what_is_not_masked(run, tmp_path):
    mask = tmp_path / "mask.png"
    given = {"labels": 3, "mask": mask, "tries": 2, "soften": 1.5, "results": 2}
    code, _, error = run("inpaint", **given, guidance="none")
    assert code == 0, error
    assert written(tmp_path) == [f"t_inpaint{end}" for end in (".json", ".png", "_0.png", "_1.png")]
    first, second = (pixels(tmp_path, f"t_inpaint_{i}")[..., 0] for i in range(2))
    for made in (first, second):
        np.testing.assert_array_equal(made[:3], GREY[:3])
        assert (made != GREY).any()
    assert (first != second).any()  # one noise each
    (row,) = read(tmp_path, "t_inpaint")["schedules"]
    card = row["card"]
    settings = [card[key] for key in ("task", "mask", "tries", "soften", "samples", "guidance")]
    assert settings == ["inpaint", str(mask), 2, 1.5, 2, "none"]
    assert card["mask_sha256"] == hashlib.sha256(mask.read_bytes()).hexdigest()


def test_the_card_counts_what_tries_evaluate(run, tmp_path):
    given = {"labels": 3, "mask": "box:0,0,4,4", "guidance": "none", "tries": 2}
    code, out, error = run("inpaint", **given)
    assert code == 0, error
    card = read(tmp_path, "t_inpaint")["schedules"][0]["card"]
    assert (card["predictor_evaluations"], card["refiner_evaluations"]) == (2, 4)
    assert out.splitlines()[1].split()[:3] == ["E1R1", "2", "4"]


def test_removing_needs_no_label_and_its_card_says_how_far_it_reached(run, tmp_path):
    code, _, error = run("remove", mask="box:3,3,5,5", schedule="E1")
    assert code == 0, error
    made = pixels(tmp_path, "t_remove_0")[..., 0]
    far = np.ones((8, 8), bool)
    far[2:6, 2:6] = False
    np.testing.assert_array_equal(made[far], GREY[far])
    changed = made != GREY
    assert changed[3:5, 3:5].any()
    assert changed[2, 3:5].any() or changed[5, 3:5].any()  # the margin is repainted, too
    card = read(tmp_path, "t_remove")["schedules"][0]["card"]
    assert (card["task"], card["guidance"], card["label_sampling"]) == ("remove", "none", "none")
    assert (card["mask"], card["margin"]) == ("box:3,3,5,5", 1)
    assert "mask_sha256" not in card


def test_inverting_writes_the_noise_and_samples_it_back(run, tmp_path, model):
    code, _, error = run("invert", labels=3, inversion="E1", schedule="E1")
    assert code == 0, error
    assert written(tmp_path) == ["t_invert.json", "t_invert.npz", "t_invert.png", "t_invert_0.png"]
    report = read(tmp_path, "t_invert")
    noise = np.load(report["noise"])["arr_0"]
    pipe = ClassToImage.load(model)
    wanted = pipe.invert(GREY[None, ..., None], [3], schedule="E1")
    np.testing.assert_array_equal(noise, wanted)
    card = report["schedules"][0]["card"]
    assert (card["task"], card["inversion"], card["guidance"]) == ("invert", "E1", "none")
    back = pipe.decode(pipe.sample_latents(jnp.asarray(noise), [3], schedule="E1", guidance="none"))
    np.testing.assert_array_equal(pixels(tmp_path, "t_invert_0")[..., 0], back[0, ..., 0])


def test_an_edit_under_another_label_can_start_from_the_inverted_image(run, tmp_path, model):
    given = {"labels": "eight", "source_label": "three", "inversion": "E1", "strength": 0.5}
    code, _, error = run("edit", **given, schedule="E1")
    assert code == 0, error
    card = read(tmp_path, "t_edit")["schedules"][0]["card"]
    settings = [card[key] for key in ("source_label", "inversion", "strength", "label_sampling")]
    assert settings == ["three", "E1", 0.5, "in turn: eight"]
    pipe = ClassToImage.load(model)
    keys = {"source_labels": [3], "inversion": "E1", "schedule": "E1", "strength": 0.5}
    wanted = pipe.edit(GREY[None, ..., None], [8], **keys)
    np.testing.assert_array_equal(pixels(tmp_path, "t_edit_0")[..., 0], wanted[0, ..., 0])


def test_the_picture_shows_the_margin_and_the_soft_edge_too(tmp_path):
    mask = np.zeros((8, 8), bool)
    mask[4, 4] = True
    subject = edit.Subject(np.zeros((1, 8, 8, 1), np.uint8), mask, None, None)
    base = {"name": "t", "model_dir": "m", "schedule": "E1", "image": "i", "mask": "m"}
    shown = {}
    for task, more in (
        ("remove", {"margin": 0.0}),
        ("remove", {}),
        ("remove", {"margin": 2.0}),
        ("inpaint", {"soften": 2.0}),
    ):
        config = SampleConfig(**base, task=task, **more)
        shown[task, *more.values()] = edit._given(config, subject)[1][1, 4, :, 0].tolist()
    grey = edit.HIDDEN
    assert shown["remove", 0.0] == [0, 0, 0, 0, grey, 0, 0, 0]
    assert shown[("remove",)] == [0, 0, 0, grey, grey, grey, 0, 0]  # a 64th, rounded up
    assert shown["remove", 2.0] == [0, 0, grey, grey, grey, grey, grey, 0]
    assert shown["inpaint", 2.0] == [0, 0, 0, grey // 2, grey, grey // 2, 0, 0]


def test_the_picture_shows_what_is_repainted(run, tmp_path, monkeypatch):
    drawn = []
    side_by_side = edit.images.side_by_side
    monkeypatch.setattr(
        edit.images,
        "side_by_side",
        lambda panels, **more: drawn.append(panels) or side_by_side(panels, **more),
    )
    code, _, error = run("inpaint", labels=3, mask="box:0,0,4,8", schedule="E1", baseline="E1")
    assert code == 0, error
    ((given, *results),) = drawn
    assert given[0] == ["given", "and what is repainted"]
    np.testing.assert_array_equal(given[1][0, ..., 0], GREY)
    np.testing.assert_array_equal(given[1][1, :, 4:, 0], GREY[:, 4:])
    assert (given[1][1, :, :4] == edit.HIDDEN).all()
    assert [lines[0] for lines, _ in results] == ["Euler E1", "Euler E1"]
    np.testing.assert_array_equal(results[0][1], results[1][1])  # of the same noise


BOX = "box:2,2,6,6"


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        ("paint", {}, "task is 'paint'; it must be one of 'generate', 'edit', 'inpaint', 'remove'"),
        ("edit", {"image": "", "labels": 3}, "to edit, give an image: --config.image=FILE"),
        ("edit", {}, "to edit, say what the result shows: --config.labels=CLASS"),
        ("edit", {"labels": ","}, "say what the result shows"),
        ("edit", {"labels": 10}, "label 10 is out of range; this model has the classes 0 to 9"),
        ("edit", {"labels": 99999999999}, "label 99999999999 is out of range"),
        ("edit", {"labels": "cat"}, "no class is called 'cat'"),
        ("edit", {"labels": 3, "source_label": 10}, "label 10 is out of range"),
        ("edit", {"labels": 3, "source_label": "cat"}, "no class is called 'cat'"),
        ("edit", {"labels": 3, "strength": 1.5}, r"strength is 1.5; it must lie in \[0, 1\]"),
        ("edit", {"labels": 3, "strength": -0.1}, "strength is -0.1; it must be at least 0"),
        ("edit", {"labels": 3, "strength": "nan"}, "strength is nan"),
        ("edit", {"labels": 3, "strength": "much"}, "could not convert string to float"),
        ("edit", {"labels": 3, "image": "nowhere.png"}, "cannot read nowhere.png"),
        ("edit", {"labels": 3, "image": "."}, r"cannot read \.: "),
        ("edit", {"labels": 3, "image": "BAD/broken.png"}, "broken.png: .*give a whole PNG"),
        ("edit", {"labels": 3, "image": "BAD/text.png"}, "text.png: .*give a whole PNG"),
        ("edit", {"labels": 3, "image": "BAD/huge.png"}, "huge.png: .*pixels"),
        ("edit", {"labels": 3, "mask": BOX}, "key mask is set, but task 'edit' has no use for it"),
        ("edit", {"labels": 3, "source_label": 1, "inversion": "H1R1"}, "H1R1 refines"),
        ("edit", {"labels": 3, "schedule": "fast"}, "no schedule 'fast' yet"),
        ("edit", {"labels": 3, "schedule": "R1"}, "starts with R"),
        ("edit", {"labels": 3, "guidance": "double"}, "guidance is 'double'"),
        ("edit", {"labels": 3, "results": -1}, "results is -1"),
        ("inpaint", {"labels": 3}, "to inpaint, give a mask: --config.mask=FILE, or box:"),
        ("inpaint", {"labels": 3, "mask": "box:1,2,3"}, "wanted are LEFT,TOP,RIGHT,BOTTOM"),
        ("inpaint", {"labels": 3, "mask": "box:9,9,12,12"}, "lies outside the picture"),
        ("inpaint", {"labels": 3, "mask": "BAD/black.png"}, "nothing to repaint"),
        (
            "inpaint",
            {"labels": 3, "mask": "BAD/small.png"},
            "is 4 x 4 pixels, the picture is 8 x 8",
        ),
        ("inpaint", {"labels": 3, "mask": "BAD/none.png"}, "cannot read .*none.png"),
        ("inpaint", {"labels": 3, "mask": BOX, "tries": 0}, "tries is 0"),
        ("inpaint", {"labels": 3, "mask": BOX, "tries": 1.5}, "tries|invalid literal"),
        ("inpaint", {"labels": 3, "mask": BOX, "soften": -1}, "soften is -1"),
        ("inpaint", {"labels": 3, "mask": BOX, "source_label": 3}, "key source_label is set, but"),
        ("inpaint", {"mask": BOX}, "to inpaint, say what the result shows"),
        ("remove", {"labels": 3}, "to remove, give a mask"),
        ("remove", {"mask": BOX, "margin": -1}, "margin is -1"),
        ("remove", {"mask": BOX, "guidance_scale": 2}, "without labels nothing can be guided"),
        ("invert", {"labels": "1,2"}, "an image is inverted under one label, of what it shows"),
        ("invert", {"labels": 1, "results": 3}, "key results is set, but task 'invert' has no use"),
        ("invert", {"labels": 1, "inversion": "H1R1"}, "refiner goes from noise to data only"),
        ("invert", {"labels": 1, "inversion": "Q"}, "cannot be read|unknown block"),
        ("generate", {}, "key image is set, but task 'generate' has no use for it"),
        ("generate", {"image": "", "mask": BOX}, "key mask is set"),
        ("edit", {"labels": 3, "tries": 4}, "key tries is set, but task 'edit' has no use for it"),
        ("inpaint", {"labels": 3, "mask": BOX, "strength": 0.3}, "key strength is set"),
        ("inpaint", {"labels": 3, "mask": BOX, "margin": 2}, "key margin is set"),
        ("remove", {"mask": BOX, "inversion": "H8"}, "key inversion is set"),
        ("generate", {"image": "", "soften": 2}, "key soften is set"),
        ("generate", {"image": "", "results": 2}, "key results is set"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, bad, task, keys, message):
    keys = {name: str(value).replace("BAD", str(bad)) for name, value in keys.items()}
    code, _, errors = run(task, **keys)
    assert code == 2
    lines = [line for line in errors.splitlines() if "prepar" not in line and "ready" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in ("file", "file/inside"):
        code, _, errors = run("edit", labels=3, strength=0, schedule="E1", out=tmp_path / place)
        assert code == 2
        (line,) = errors.splitlines()  # so nothing was computed before
        assert re.search("cannot write to .*file is no folder", line)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_mask_of_many_corners_is_drawn(run, tmp_path):
    text = "polygon:" + " ".join(["1,1 6,1 6,6 1,6"] * 30)
    code, _, error = run("inpaint", labels=3, mask=text, schedule="E1")
    assert code == 0, error
    card = read(tmp_path, "t_inpaint")["schedules"][0]["card"]
    assert card["mask"] == text


def test_a_mask_in_the_users_home_is_in_the_card_by_its_digest(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, error = run("inpaint", labels=3, image="~/grey.png", mask="~/mask.png", schedule="E1")
    assert code == 0, error
    card = read(tmp_path, "t_inpaint")["schedules"][0]["card"]
    assert card["mask_sha256"] == hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest()


def test_every_task_names_its_settings_and_each_is_a_key():
    keys = set(SampleConfig.meanings())
    assert set().union(*edit.SETTINGS.values()) <= keys
