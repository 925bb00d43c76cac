"""The demo page as people use it: served by the real command, in a real browser.

The browser is the system's Chromium, without a window. Where there is none these tests are skipped,
but never in CI (CI=true).
"""

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 60_000  # ms; compiling on a busy machine takes some
A_CLICK_LATER = 350  # ms; sooner it would be taken for a slip
# Writes down every other machine that a Python process wants to reach.
WATCHER = """
import os, sys

def watch(event, args):
    if event == "socket.connect":
        host = args[1][0] if isinstance(args[1], tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    if host not in (None, "", "localhost", "127.0.0.1", b"127.0.0.1"):
        with open(os.environ["WATCHED"], "a") as file:
            print(event, host, file=file)

sys.addaudithook(watch)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("CI") != "true",
        reason="no Chromium: apt-get install chromium (bash .ci/run does it)",
    ),
]


class Demo(NamedTuple):
    """A running demo, what it says, and what it wanted from other machines."""

    process: subprocess.Popen
    url: str
    log: Path
    watched: Path


def start(folder: Path, *arguments: str) -> Demo:
    (folder / "sitecustomize.py").write_text(WATCHER)
    log, watched = folder / "log", folder / "watched"
    environment = {
        **os.environ,
        "FLOWTURBO_CACHE": str(folder / "cache"),  # nothing is compiled yet
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "WATCHED": str(watched),
        "HOME": str(folder),
        "GRADIO_SHARE": "True",  # what a user has set for other pages does not count here
        "GRADIO_ANALYTICS_ENABLED": "True",
        "HTTP_PROXY": "http://proxy.invalid:1",
    }
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "flowturbo_jax", "demo", "--port=0", *arguments],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
            cwd=folder,
        )
    first = process.stdout.readline()
    assert first.startswith("http://127.0.0.1:"), log.read_text()
    return Demo(process, first.split()[0], log, watched)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    running = start(tmp_path_factory.mktemp("demo"))
    yield running
    running.process.kill()
    running.process.wait()
    running.process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail("CI has no Chromium; .ci/run installs it")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def visit(demo, browser):
    """Opens the page as a new visitor; at last nobody has asked for, or met, anything bad."""
    asked, problems, visits = [], [], []

    def open_page(size=DESKTOP) -> Page:
        visits.append(browser.new_context(viewport=size))
        page = visits[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda said: said.type in ("error", "warning") and problems.append(said.text),
        )
        page.goto(demo.url)
        expect(page.locator("#generate")).to_be_visible(timeout=PATIENCE)
        page.get_by_label("1", exact=True).check()
        return page

    yield open_page
    for context in visits:
        context.close()
    here = urlsplit(demo.url).netloc
    outside = [url for url in asked if urlsplit(url).scheme not in ("data", "blob")]
    assert [url for url in outside if urlsplit(url).netloc != here] == []
    assert problems == []
    assert "Traceback" not in demo.log.read_text()


def pixels(page: Page, place: str, index: int = 0) -> np.ndarray:
    """The shown image of a place, `[8, 8]`: its enlarged pixels made small again."""
    image = page.locator(f"{place} img").nth(index)
    image.wait_for(timeout=PATIENCE)
    zoom = int(image.get_attribute("data-zoom"))
    content = base64.b64decode(image.get_attribute("src").partition(",")[2])
    shown = np.asarray(PIL.Image.open(io.BytesIO(content)))
    small = shown[zoom // 2 :: zoom, zoom // 2 :: zoom, 0]
    np.testing.assert_array_equal(shown[..., 0], small.repeat(zoom, 0).repeat(zoom, 1))
    return small


def generate(page: Page, seed: int) -> list[np.ndarray]:
    """What a visitor sees after a click: Heun's image and FlowTurbo's."""
    page.locator("#seed input").fill(str(seed))
    page.wait_for_timeout(A_CLICK_LATER)
    page.locator("#generate").click()
    both_of_seed(page, seed)
    return [pixels(page, "#generated", index) for index in (0, 1)]


def both_of_seed(page: Page, seed: int) -> None:
    shown = page.locator(f'#generated img[alt*="seed {seed},"]')
    expect(shown).to_have_count(2, timeout=PATIENCE)


def open_part(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def take(page: Page) -> None:
    page.get_by_role("button", name="Generate one").locator("visible=true").click()


def test_it_compiles_once_and_shows_both_methods_with_their_times(visit):
    page = visit()
    page.locator("#seed input").fill("5")
    page.locator("#generate").click()
    expect(page.get_by_text("compiling H8 for 1 image (once)").first).to_be_visible(
        timeout=PATIENCE
    )
    both_of_seed(page, 5)
    heun, fast = page.locator("#generated figcaption").all_inner_texts()
    assert re.fullmatch(r"Heun H8\s+16 evaluations, [0-9.]+ ms/image", heun)
    assert re.fullmatch(
        r"FlowTurbo H1P1Rc2@0.5\s+3 evaluations \+ 4 refiner, [0-9.]+ ms/image", fast
    )
    first, second = (pixels(page, "#generated", index) for index in (0, 1))
    assert first.shape == (8, 8)
    assert 0 < np.abs(first.astype(int) - second).mean() < 64  # of the same noise
    page.get_by_text("times as fast.").wait_for()


def test_a_mask_drawn_with_the_mouse_is_made_anew_and_nothing_else(visit):
    page = visit()
    open_part(page, "Inpaint")
    take(page)
    canvas = page.locator("#painter canvas").nth(1)
    canvas.wait_for()
    source = page.evaluate(
        """() => { const canvas = document.querySelector("#painter canvas");
        return [...canvas.getContext("2d").getImageData(0, 0, 8, 8).data]; }"""
    )
    source = np.array(source, np.uint8).reshape(8, 8, 4)[..., 0]
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    cell = box["width"] / 8
    page.mouse.move(box["x"] + 0.5 * cell, box["y"] + 2.5 * cell)
    page.mouse.down()
    page.mouse.move(box["x"] + 7.5 * cell, box["y"] + 2.5 * cell, steps=3)
    page.mouse.up()
    page.locator("#seed input").fill("9")
    page.locator("#class input").fill("8: eight")
    page.locator("#inpaint").click()
    made = pixels(page, "#inpainted")
    kept = np.arange(8) != 2
    np.testing.assert_array_equal(made[kept], source[kept])
    assert (made[2] != source[2]).any()
    page.get_by_text("Made anew as eight").wait_for()


def test_nothing_painted_is_said_so(visit):
    page = visit()
    open_part(page, "Inpaint")
    page.locator("#inpaint").click()
    expect(page.get_by_role("alert")).to_contain_text("there is no picture yet", timeout=PATIENCE)
    take(page)
    page.locator("#painter canvas").nth(1).wait_for()
    page.wait_for_timeout(A_CLICK_LATER)
    page.locator("#inpaint").click()
    expect(page.get_by_role("alert")).to_contain_text("nothing is painted yet", timeout=PATIENCE)


def test_a_picture_is_uploaded_and_edited(visit, tmp_path):
    page = visit()
    open_part(page, "Edit")
    brought = tmp_path / "my picture.png"
    side = np.linspace(0, 255, 48).astype(np.uint8)
    PIL.Image.fromarray(np.broadcast_to(side, (48, 48))).save(brought)
    files = page.locator('input[type="file"]')
    files.first.set_input_files(brought)
    source = pixels(page, "#edit-source")
    assert (np.diff(source.astype(int), axis=1) > 0).all()
    page.locator("#edit").click()
    assert pixels(page, "#edited").shape == (8, 8)
    (tmp_path / "fake.png").write_text("this is no picture")
    files.first.set_input_files(tmp_path / "fake.png")
    expect(page.get_by_role("alert")).to_contain_text("cannot read fake.png", timeout=PATIENCE)
    np.testing.assert_array_equal(pixels(page, "#edit-source"), source)


def test_bad_input_is_one_clear_line_and_the_page_goes_on(visit):
    page = visit()
    for field, text, message in (
        ("#schedule input", "banana", "banana"),
        ("#schedule input", "R3H1", "begin with H, P or E"),
        ("#schedule input", "H1P999", "up to 128 of each"),
        ("#schedule input", "H1" * 100, "200 letters"),
        ("#class input", "<b>hippo</b>", "no class is called '<b>hippo</b>'"),
        ("#class input", "77", "class 77 is out of range"),
        ("#seed input", "-1", "give a whole number from 0 to 4294967295"),
        ("#seed input", "1.5", "the seed is 1.5"),
        ("#seed input", "", "the seed is empty"),
        ("#guidance input", "99", "give a number from 0 to 20"),
    ):
        right = page.locator(field).input_value()
        page.locator(field).fill(text)
        page.wait_for_timeout(A_CLICK_LATER)
        page.locator("#generate").click()
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text(message, timeout=PATIENCE)
        assert "\n" not in alert.inner_text().strip()
        page.locator(field).fill(right)
    page.wait_for_timeout(A_CLICK_LATER)
    generate(page, 3)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_fifty_quick_clicks_leave_it_as_it_was(visit, demo):
    page = visit()
    page.evaluate(
        """() => { const button = document.querySelector("#generate");
        for (let i = 0; i < 50; i++) button.click(); }"""
    )
    button = page.locator("#generate")
    for _ in range(50):
        button.click(delay=0, no_wait_after=True)
    first = generate(page, 7)
    np.testing.assert_array_equal(generate(page, 7), first)
    assert demo.process.poll() is None


def test_two_visitors_at_once_get_their_own(visit):
    pages = visit(), visit()
    alone = [generate(page, seed) for page, seed in zip(pages, (11, 12), strict=True)]
    assert not np.array_equal(alone[0], alone[1])
    for page, seed in zip(pages, (12, 11), strict=True):
        page.locator("#seed input").fill(str(seed))
    for page in pages:
        page.locator("#generate").click(no_wait_after=True)
    both_of_seed(pages[0], 12)
    both_of_seed(pages[1], 11)
    for page, wanted in zip(pages, reversed(alone), strict=True):
        found = [pixels(page, "#generated", index) for index in (0, 1)]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_part_fits_the_screen(visit, size):
    page = visit(size)
    generate(page, 3)
    for name in ("Generate", "Edit", "Inpaint", "Plots"):
        open_part(page, name)
        if name in ("Edit", "Inpaint"):
            take(page)
            shown = {"Edit": "#edit-source img", "Inpaint": "#painter canvas >> nth=1"}[name]
            page.locator(shown).wait_for()
        if name == "Plots":
            expect(page.locator(".plot img")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_it_is_served_under_its_own_name_only(visit, demo):
    request = visit().request
    assert request.get(demo.url).ok
    assert request.get(demo.url, headers={"Host": "elsewhere.example"}).status == 400
    for path in ("gradio_api/file=/etc/passwd", "gradio_api/info", "monitoring", "docs"):
        answer = request.get(f"{demo.url}/{path}")
        assert "root:" not in answer.text()


def test_ctrl_c_ends_it_in_one_line_and_it_asked_nobody_for_anything(demo, browser):
    before = demo.log.read_text()
    page = browser.new_page()
    page.goto(demo.url)
    expect(page.locator("#generate")).to_be_visible(timeout=PATIENCE)
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(timeout=30) == 130
    page.close()
    assert demo.log.read_text().removeprefix(before) == "interrupted\n"
    assert not demo.watched.exists(), demo.watched.read_text()
