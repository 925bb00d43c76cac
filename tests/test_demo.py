"""What the demo page does, without a browser: its limits, its answers, its server and its flags."""

import base64
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
from test_benchmark import save_tiny_model, tiny_model
from test_commands import run

from flowturbo_jax.__main__ import main as package_main
from flowturbo_jax.demo import answers, handlers, limits, markup, server
from flowturbo_jax.demo.handlers import Studio
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_description import Preset
from flowturbo_jax.pipelines.class_to_image import ClassToImage

ROOT = Path(__file__).parents[1]
FIELDS = (3, "H1P1R1", 1.5, 7, 2)  # class, schedule, guidance, seed, number of images
COMPILING = 0.2  # s


class FakePipe(ClassToImage):
    """A pipeline that computes nothing and notes what it was asked for."""

    def __init__(self, model):
        self.model, self.calls, self.compiled = model, [], set()
        self.running = self.most_running = 0

    def __call__(self, labels, **given):
        return self._answer(labels=labels, **given)

    def edit(self, images, labels, **given):
        return self._answer(images=images, labels=labels, **given)

    def inpaint(self, images, masks, labels, **given):
        return self._answer(images=images, masks=masks, labels=labels, **given)

    def _answer(self, **given):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.calls.append(given)
        new = (given["schedule"], len(given["labels"])) not in self.compiled
        self.compiled.add((given["schedule"], len(given["labels"])))
        time.sleep(COMPILING if new else 0.001)
        self.running -= 1
        return np.full((len(given["labels"]), 8, 8, 1), 9, np.uint8)


@pytest.fixture
def pipe():
    return FakePipe(tiny_model())


@pytest.fixture
def studio(pipe):
    return Studio(pipe, "tiny")


def described(side: int):
    description = tiny.description()
    predictor = dataclasses.replace(description.predictor, input_size=side)
    return dataclasses.replace(description, predictor=predictor, refiner=None)


def mask_text(mask: np.ndarray) -> str:
    height, width = mask.shape
    return f"{width}x{height}:{base64.b64encode(np.packbits(mask)).decode()}"


@pytest.mark.parametrize(("side", "most"), [(8, 16), (256, 16), (512, 4), (1024, 1), (2048, 1)])
def test_the_number_of_images_is_limited_by_their_pixels(side, most):
    assert limits.most_images(described(side)) == most


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, None, "no class is chosen"),
        (0, "", "no class is chosen"),
        (0, True, "no class is chosen"),
        (0, [3], "no class is chosen"),
        (0, 10, "class 10 is out of range; there are 0 to 9"),
        (0, "-1", "class -1 is out of range"),
        (0, "hippo", "no class is called 'hippo'"),
        (0, "x" * 1000, "the class has 1000 letters"),
        (1, None, "no schedule is chosen"),
        (1, " ", "no schedule is chosen"),
        (1, 5, "no schedule is chosen"),
        (1, "banana", "banana"),
        (1, "R1", "begin with H, P or E"),
        (1, "H1" * 50, "the schedule has 100 letters; at most 80"),
        (1, "H65", "130 evaluations"),
        (1, "H1R65", "130 of the refiner"),
        (1, "(H1P1)x30", "60 runs"),
        (1, "best", "no schedule 'best' yet"),
        (2, 21, "guidance is 21; give a number from 0 to 20"),
        (2, -0.5, "guidance is -0.5"),
        (2, float("nan"), "guidance is no number"),
        (2, "2", "guidance is no number"),
        (3, None, "the seed is empty"),
        (3, -1, "the seed is -1; give a whole number from 0 to 4294967295"),
        (3, 2**32, "the seed is 4294967296"),
        (3, 0.5, "the seed is 0.5"),
        (3, float("inf"), "the seed is no number"),
        (4, 0, "the number of images is 0; give a whole number from 1 to 16"),
        (4, 17, "the number of images is 17"),
        (4, None, "the number of images is empty"),
    ],
)
def test_each_field_is_checked(studio, pipe, position, value, message):
    given = list(FIELDS)
    given[position] = value
    with pytest.raises(InputError) as refused:
        studio.request(*given)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert pipe.calls == []


def test_fields_are_read_as_the_page_gives_them(studio):
    request = studio.request("three", " H1P1R1 ", 2, 4294967295.0, 2.0)
    assert (request.label, request.seed, request.count) == (3, 2**32 - 1, 2)
    assert (str(request.plan.schedule), request.plan.scale) == ("H1P1R1", 2.0)
    assert studio.request("3", "H1", None, 0, 1).plan.scale == 1.5  # the model's
    assert studio.request(3, "H1", 1, 0, 1).plan.guidance == "none"


def test_the_list_has_the_model_s_schedules_first_and_only_what_it_can_do():
    description = tiny.description()
    preset = Preset("H1P1R1@0.5", "paired")
    tuned = dataclasses.replace(description, schedules={"best": preset})
    assert limits.schedules(tuned)[0] == ("best: H1P1R1@0.5", "best")
    for model in (tuned, description, tiny.description(refiner=False)):
        for _, text in limits.schedules(model):
            limits.plan(model, text, None)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        7,
        "8x8:",
        "8x8:AAAAAAAAAAA=",  # nothing
        "8x8:////",  # too short
        "8x8:/",
        "4x4://8=",
        "8x8:%%%",
        "99999x99999:AAAA",
    ],
)
def test_a_mask_that_is_none_is_refused(text):
    with pytest.raises(InputError, match=r"nothing is painted|clear it and paint again"):
        limits.mask(text, 8, 8)


def test_a_mask_comes_back_as_it_was_painted():
    for shape in ((8, 8), (5, 7), (256, 256)):
        mask = np.random.default_rng(0).random(shape) < 0.3
        np.testing.assert_array_equal(limits.mask(mask_text(mask), *shape), mask)


def test_both_methods_get_the_same_noise_and_label(studio, pipe):
    text, shown = answers.generate(studio, lambda *_: None, *FIELDS)
    heun, *_, fast = pipe.calls
    assert str(heun.pop("schedule")) == "H8"
    assert str(fast.pop("schedule")) == "H1P1R1"
    assert heun == fast
    assert (fast["labels"], fast["seeds"], fast["guidance_scale"]) == ([3, 3], 7, 1.5)
    assert "times as fast" in text
    assert shown.count("<img") == 2
    assert "Heun H8" in shown
    assert "3 evaluations + 2 refiner" in shown


def test_compiling_is_announced_once_and_not_timed(studio):
    said = []
    request = studio.request(*FIELDS)
    for _ in range(2):
        for made in studio.generate(request, None, lambda *given: said.append(given)):
            assert made.ms_per_image < 1e3 * COMPILING / 2 / request.count
    compiled = [text for text, _ in said if text.startswith("compiling")]
    assert compiled == [
        "compiling H8 for 2 images (once)",
        "compiling H1P1R1 for 2 images (once; the last took 0 s)",
    ]
    done = [done for _, done in said[:4]]
    assert done == sorted(done)
    assert 0 <= done[0] <= done[-1] <= 1


def test_programs_do_not_pile_up(studio, monkeypatch):
    monkeypatch.setattr(handlers, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(handlers, "ClassToImage", FakePipe)
    said = []
    for schedule in ("H1", "H2", "H3", "H1"):
        studio.one(studio.request(3, schedule, None, 0, 1), lambda text, _: said.append(text))
    assert len(said) == 4  # the third one let the first go


def test_one_request_computes_at_a_time(studio, pipe):
    requests = [studio.request(3, "H1P1", None, seed, 1) for seed in range(6)]
    threads = [
        threading.Thread(target=studio.one, args=(request, lambda *_: None)) for request in requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pipe.most_running == 1
    assert {call["seeds"] for call in pipe.calls} == set(range(6))


def test_a_refused_request_leaves_the_studio_free(studio, pipe, monkeypatch):
    def refuse(*_, **__):
        raise InputError("not like this")

    with monkeypatch.context() as patch:
        patch.setattr(FakePipe, "edit", refuse)
        with pytest.raises(InputError, match="not like this"):
            answers.edit(studio, lambda *_: None, np.zeros((8, 8, 1), np.uint8), 0.5, *FIELDS)
    answers.generate(studio, lambda *_: None, *FIELDS)
    assert pipe.running == 0


def test_a_picture_is_edited_under_the_class_that_was_asked_for(studio, pipe):
    source = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    text, shown = answers.edit(studio, lambda *_: None, source, 0.25, *FIELDS)
    call = pipe.calls[-1]
    np.testing.assert_array_equal(call["images"], np.stack([source, source]))
    assert (call["strength"], call["labels"], call["seeds"]) == (0.25, [3, 3], 7)
    assert text == "Edited as three, strength 0.25."
    assert 'alt="Edited: 2 of three, seed 7, by H1P1R1"' in shown
    for strength in (-0.1, 1.1, None):
        with pytest.raises(InputError, match="the strength is"):
            answers.edit(studio, lambda *_: None, source, strength, *FIELDS)


def test_what_is_painted_is_inpainted(studio, pipe):
    source = np.zeros((8, 8, 1), np.uint8)
    mask = np.eye(8, dtype=bool)
    painter = {"mask": mask_text(mask)}
    answers.inpaint(studio, lambda *_: None, source, painter, *FIELDS)
    np.testing.assert_array_equal(pipe.calls[-1]["masks"], np.stack([mask, mask]))
    for nothing in (None, {}, "8x8:", {"mask": ""}):
        with pytest.raises(InputError, match="nothing is painted yet"):
            answers.inpaint(studio, lambda *_: None, source, nothing, *FIELDS)
    with pytest.raises(InputError, match="there is no picture yet"):
        answers.inpaint(studio, lambda *_: None, None, painter, *FIELDS)


def test_an_uploaded_picture_gets_the_model_s_size(studio, tmp_path):
    file = tmp_path / "mine.png"
    PIL.Image.new("RGB", (40, 24), "white").save(file)
    text, shown, picture = answers.upload(studio, lambda p: p.shape, lambda *_: None, str(file))
    assert text == "Your picture, its middle square at 8 x 8."
    assert shown == (8, 8, 1)
    assert (picture == 255).all()
    (tmp_path / "no.png").write_text("no")
    with pytest.raises(InputError, match=r"^cannot read no\.png: ") as refused:
        studio.read(str(tmp_path / "no.png"))
    assert str(tmp_path) not in str(refused.value)
    with pytest.raises(InputError, match="nothing was uploaded"):
        studio.read(None)


def test_pictures_are_enlarged_pixel_by_pixel_and_texts_are_no_html():
    shown = markup.figure(np.full((1, 8, 8, 1), 7, np.uint8), "<b>", "&", '"')
    assert "&lt;b&gt;" in shown
    assert "&amp;" in shown
    assert 'alt="&quot;"' in shown
    assert 'data-zoom="96"' in shown
    assert markup.line("<script>", problem=True) == (
        '<p role="alert" class="line problem">&lt;script&gt;</p>'
    )


def test_a_plot_that_is_none_is_refused(tmp_path):
    (tmp_path / "tune.png").write_text("no")
    for name in ("tune.png", "nothing.png"):
        with pytest.raises(InputError, match=name):
            markup.plot(tmp_path / name, "Plot")


def test_a_port_is_reserved_for_this_machine_alone():
    with server.reserve(0) as place:
        host, port = place.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(InputError, match=f"port {port} cannot be used: .*; choose another"):
            server.reserve(port)


def test_what_gradio_would_tell_others_is_turned_off(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ["GRADIO_SHARE"] = "True"
    server.silence(str(tmp_path))
    set_now = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    assert set_now == {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(tmp_path)}
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "m"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no model directory at 'nowhere'"),
        (["--port=70000"], "--port is 70000"),
        (["--port=x"], "--port"),
        (["--port={taken}"], "port {taken} cannot be used"),
        (["--dtype=int4"], "dtype is 'int4'"),
        (["{model}", "--baseline=Q8"], "unknown block 'Q'"),
        (["{model}", "--baseline=H999"], "up to 128 of each"),
        (["{model}", "--plots={tmp}"], "has no tune.png or stability.png"),
        (["--share"], "--share"),
    ],
)
def test_bad_flags_end_in_one_line(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(server, "serve", lambda *_: pytest.fail("began"))
    monkeypatch.setattr(server, "silence", lambda _: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"model": model, "tmp": tmp_path, "taken": taken.getsockname()[1]}
        given = [text.format(**names) for text in arguments]
        if not any(text.startswith("--port") for text in given):
            given.append("--port=0")
        assert run(package_main, "demo", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message.format(**names) in line


def test_gradio_is_imported_where_the_page_is_made_and_not_before():
    code = "import sys, flowturbo_jax.commands.demo; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
