"""Folders of images: a class per sub-folder, sorted names, clear refusals, damaged files named."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from flowturbo_jax import class_names, data
from flowturbo_jax.data import folder, pixels
from flowturbo_jax.interfaces import InputError


def write_image(path, seed=0, width=12, height=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    image = PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
    image.save(path, "PNG" if path.suffix.lower() == ".png" else None)
    return path


@pytest.fixture
def pets(tmp_path):
    """Three cats and two dogs."""
    for seed, name in enumerate(
        ["dog/b.jpg", "dog/a.png", "cat/3.webp", "cat/10.PNG", "cat/2.bmp"]
    ):
        write_image(tmp_path / "pets" / name, seed)
    return tmp_path / "pets"


def open_pets(pets, size=8):
    return data.open_source(f"folder:{pets}", size)


def names_of(source):
    return [source.examples.name(index) for index in range(len(source.examples))]


def test_classes_and_files_are_sorted_by_name(pets):
    source = open_pets(pets)
    assert source.class_names == ("cat", "dog")
    assert names_of(source) == [
        f"{pets}/{name}"
        for name in ("cat/10.PNG", "cat/2.bmp", "cat/3.webp", "dog/a.png", "dog/b.jpg")
    ]
    assert [int(source.examples[index]["label"]) for index in range(5)] == [0, 0, 0, 1, 1]


def test_example_is_the_cropped_image_with_its_label(pets):
    source = open_pets(pets)
    assert isinstance(source.examples, data.Examples)
    assert (source.name, source.shape) == (f"folder:{pets}", (8, 8, 3))
    example = source.examples[3]
    assert (example["label"].shape, example["label"].dtype) == ((), np.int32)
    expected = pixels.decode((pets / "dog/a.png").read_bytes(), 8)
    np.testing.assert_array_equal(example["data"], expected)
    assert example["data"].dtype == np.float32
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"example {index} of 5"):
            source.examples[index]


def test_folders_within_a_class_belong_to_it(pets):
    write_image(pets / "cat/young/1.png")
    write_image(pets / "cat/young/wild/1.png")
    source = open_pets(pets)
    assert source.class_names == ("cat", "dog")
    assert [Path(name).relative_to(pets).as_posix() for name in names_of(source)] == [
        "cat/10.PNG",
        "cat/2.bmp",
        "cat/3.webp",
        "cat/young/1.png",
        "cat/young/wild/1.png",
        "dog/a.png",
        "dog/b.jpg",
    ]
    assert source.examples[4]["label"] == 0


def test_hidden_and_other_files_are_passed_over(pets):
    plain = open_pets(pets)
    for name in ("README.md", "cat/notes.txt", "cat/.4.png", ".git/5.png", "cat/.thumbs/6.png"):
        path = pets / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"something")
    (pets / "dog/not_an_image").write_bytes(b"")
    assert names_of(open_pets(pets)) == names_of(plain)
    assert open_pets(pets).fingerprint == plain.fingerprint


def test_names_of_any_letters_are_read(pets):
    for name in ("übung/naïve ☃.png", "übung/日本.png", "übung/a, b;c\n.png", "-x/--.png"):
        write_image(pets / name)
    source = open_pets(pets)
    assert source.class_names == ("-x", "cat", "dog", "übung")
    batch = data.batches(source, len(source.examples), 0)[0]
    assert (batch["unreadable"] == data.READABLE).all()
    assert all(name.isprintable() for name in names_of(source))
    assert f"{pets}/übung/日本.png" in names_of(source)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_files_whose_names_are_no_text_are_read(pets):
    os.rename(pets / "dog/a.png", os.fsencode(pets) + b"/dog/\xff.png")
    source = open_pets(pets)
    assert source.examples[4]["data"].shape == (8, 8, 3)
    assert source.examples.name(4).isprintable()
    os.rename(os.fsencode(pets) + b"/dog", os.fsencode(pets) + b"/\xffdog")
    with pytest.raises(InputError, match="not UTF-8 text; rename it"):
        open_pets(pets)


def test_links_are_followed_and_circles_are_not(pets, tmp_path):
    far = write_image(tmp_path / "far/away/1.png").parent
    (pets / "cat/link.png").symlink_to(far / "1.png")
    (pets / "dog/more").symlink_to(far)
    (pets / "fox").symlink_to(far)
    (pets / "dog/self").symlink_to(pets / "dog")
    (pets / "dog/above").symlink_to(pets)
    source = open_pets(pets)
    inside = [Path(name).relative_to(pets).as_posix() for name in names_of(source)]
    assert source.class_names == ("cat", "dog", "fox")
    assert "cat/link.png" in inside
    assert "dog/more/1.png" in inside
    assert inside[-1] == "fox/1.png"
    assert not any("self" in name for name in inside)
    assert not any("above" in name for name in inside)
    assert source.examples[len(inside) - 1]["data"].shape == (8, 8, 3)


def test_imagenets_folders_get_imagenets_names(tmp_path):
    lines = class_names.IMAGENET.read_text().splitlines()
    ids = [line.split("\t")[0] for line in lines if not line.startswith("#")]
    first = write_image(tmp_path / ids[0] / "1.png")
    for name in ids[1:]:
        (tmp_path / name).mkdir()
        os.link(first, tmp_path / name / "1.png")
    source = open_pets(tmp_path)
    assert source.class_names == class_names.imagenet_class_names()
    assert source.examples[207]["label"] == 207
    first.unlink()
    first.parent.rmdir()
    assert open_pets(tmp_path).class_names == tuple(ids[1:])


def test_fingerprint_follows_names_sizes_and_crop(pets, tmp_path):
    found = {open_pets(pets).fingerprint}

    def changed(size=8):
        before = len(found)
        found.add(open_pets(pets, size).fingerprint)
        return len(found) > before

    assert not changed()
    assert changed(size=9)
    (pets / "dog/a.png").rename(pets / "dog/c.png")
    assert changed()
    with (pets / "dog/c.png").open("ab") as file:
        file.write(b"\0")
    assert changed()
    (pets / "dog/c.png").rename(pets / "cat/c.png")
    assert changed()
    (pets / "dog").rename(pets / "wolf")
    assert changed()
    (pets / "cat/c.png").unlink()
    assert changed()
    moved = pets.rename(tmp_path / "elsewhere")
    assert open_pets(moved).fingerprint in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p / "nothing", "there is no folder .*/nothing; check the name"),
        (lambda p: p / "dog/a.png", "a.png is a file; give the folder that has a sub-folder"),
        (lambda p: p / "dog", "dog holds images itself, such as .*; move them into sub-folders"),
        (lambda p: write_image(p / "x.jpeg").parent, "holds images itself, such as x.jpeg"),
        (lambda p: (p / "fox").mkdir() or p, "fox holds no images .*; add some, or remove"),
        (lambda p: (p / "fox/in").mkdir(parents=True) or p / "fox", "no sub-folder of .*fox holds"),
        (lambda p: (p / "fox").mkdir() or p / "fox", "fox has no sub-folders; it needs one for"),
        (
            lambda p: (
                write_image(p / "in/train/1.png") and write_image(p / "in/val/1.png") and p / "in"
            ),
            "of .*/in are splits and no classes; open one of them, such as folder:.*/in/train",
        ),
        (lambda p: "", "'folder:' needs the name of a folder"),
        (lambda p: "a\0b", r"no folder can be called 'a\\x00b'"),
    ],
)
def test_what_is_no_folder_of_classes_is_refused(pets, change, message):
    with pytest.raises(InputError, match=message) as caught:
        open_pets(change(pets))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", [0, -1])
def test_image_size_is_asked_for(pets, size):
    with pytest.raises(InputError, match="give image_size, such as 256"):
        open_pets(pets, size)


def test_a_folder_that_cannot_be_listed_is_refused(pets, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # root may list everything, so no permission is taken away here
        if path.endswith(b"/dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(folder.os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot list .*/dog: Permission denied; check who may"):
        open_pets(pets)


def test_home_is_written_with_a_tilde(pets, monkeypatch):
    monkeypatch.setenv("HOME", str(pets.parent))
    assert len(open_pets("~/pets").examples) == 5


def test_what_cannot_be_read_is_unreadable_and_says_why(pets):
    source = open_pets(pets)
    (pets / "cat/10.PNG").unlink()
    (pets / "cat/2.bmp").write_bytes(b"")
    (pets / "cat/3.webp").unlink()
    (pets / "cat/3.webp").mkdir()
    (pets / "dog/a.png").unlink()
    os.mkfifo(pets / "dog/a.png")
    (pets / "dog/b.jpg").write_text("not an image")
    reasons = ["No such file", "the file is empty", "a folder", "no regular file", "no JPEG"]
    for index, reason in enumerate(reasons):
        with pytest.raises(data.UnreadableError, match=reason) as caught:
            source.examples[index]
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE])
def test_a_failing_machine_is_no_unreadable_example(pets, monkeypatch, number):
    source = open_pets(pets)
    opened = os.open

    def fail(path, *args):
        if str(path).endswith("2.bmp"):
            raise OSError(number, os.strerror(number), path)
        return opened(path, *args)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(InputError, match=f"cannot read .*2.bmp: {os.strerror(number)}; "):
        source.examples[1]
    assert source.examples[0]["label"] == 0


def test_a_huge_file_is_unreadable_without_reading_it(pets):
    source = open_pets(pets)
    os.truncate(pets / "cat/2.bmp", folder.MAX_FILE + 1)  # a hole, which takes no room
    with pytest.raises(data.UnreadableError, match="more than 1000000000 bytes"):
        source.examples[1]


def test_a_link_to_nothing_is_an_unreadable_example(pets):
    (pets / "dog/c.png").symlink_to(pets / "gone.png")
    (pets / "dog/d.png").symlink_to(pets / "dog/d.png")
    source = open_pets(pets)
    assert len(source.examples) == 7
    for index in (5, 6):
        with pytest.raises(data.UnreadableError):
            source.examples[index]


def test_unreadable_files_are_replaced_and_named(pets):
    source = open_pets(pets)
    broken = pets / "cat/3.webp"
    broken.write_bytes(broken.read_bytes()[:-20])
    batch = data.batches(source, 5, seed=0)[0]
    indices = data.order(source, 5, 0, 0)
    np.testing.assert_array_equal(batch["unreadable"], np.where(indices == 2, 2, data.READABLE))
    np.testing.assert_array_equal(batch["label"], np.where(indices <= 1, 0, 1))
    lines = data.Unreadable(source, limit=0.5).note(batch["unreadable"])
    assert len(lines) == 1
    assert lines[0].startswith(f"cannot read {broken}: ")


def test_batches_and_stream_are_the_same_every_time(pets):
    first, second = open_pets(pets), open_pets(pets)
    batches = data.batches(first, 4, seed=3, flip=True)
    stream = data.stream(second, 4, 3, flip=True, first_step=2, threads=3)
    flipped = 0
    for step in range(2, 12):
        batch = next(stream)
        for name, array in batches[step].items():
            np.testing.assert_array_equal(batch[name], array)
        for index, image in zip(data.order(first, 4, 3, step), batch["data"], strict=True):
            stored = first.examples[int(index)]["data"]
            flipped += not (image == stored).all()
            assert (image == stored).all() or (image == stored[:, ::-1]).all()
    assert 8 <= flipped <= 32  # of 40 coins: outside once in 10,000


def test_several_threads_read_the_same(pets):
    source = open_pets(pets)
    expected = [source.examples[index]["data"] for index in range(5)]
    with ThreadPoolExecutor(8) as pool:
        for index, example in enumerate(pool.map(source.examples.__getitem__, list(range(5)) * 20)):
            np.testing.assert_array_equal(example["data"], expected[index % 5])


def test_many_names_take_little_memory():
    files = {b"n%08d" % label: b"%08d.JPEG\0" * 1300 % tuple(range(1300)) for label in range(100)}
    examples = folder.FolderExamples(b"images", files, 8)
    assert len(examples) == 130_000
    assert examples.name(0) == "images/n00000000/00000000.JPEG"
    assert examples.name(1299) == "images/n00000000/00001299.JPEG"
    assert examples.name(1300) == "images/n00000001/00000000.JPEG"
    assert examples.name(129_999) == "images/n00000099/00001299.JPEG"
    held = sum(len(value) for value in vars(examples).values() if isinstance(value, bytes))
    held += sum(value.nbytes for value in vars(examples).values() if isinstance(value, np.ndarray))
    assert held < 25 * len(examples)  # bytes; a Python string alone takes 60


def test_no_device_is_touched(pets):
    # With a platform that does not exist, JAX fails as soon as anything asks for a device.
    program = """
import sys
from flowturbo_jax import data
source = data.open_source(f"folder:{sys.argv[1]}", 8)
assert data.batches(source, 4, seed=0)[0]["data"].shape == (4, 8, 8, 3)
assert "tensorflow" not in sys.modules and "tensorflow_datasets" not in sys.modules
print("numpy only")
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(pets)],
        env={**os.environ, "JAX_PLATFORMS": "nothing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("numpy only\n", "")
