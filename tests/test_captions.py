"""Images with captions: drawn and tokenised for training, and read from folders."""

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from flowturbo_jax import data
from flowturbo_jax.data import captions, digit_captions, pixels, source, texts
from flowturbo_jax.interfaces import InputError

LENGTH = 24


def tokenize(given):
    """A text's first bytes, which is a tokenizer whose ids can be read."""
    rows = [list(text.encode()[:LENGTH].ljust(LENGTH, b"\0")) for text in given]
    return np.array(rows, np.int32)


def text_of(ids):
    return bytes(ids.tolist()).rstrip(b"\0").decode()


def tokenised(of):
    return data.tokenised(of, tokenize, "first bytes")


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    PIL.Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def pets(tmp_path):
    """Four captioned images in nested folders."""
    for seed, (name, text) in enumerate(
        {
            "b.png": "a brown dog",
            "a.jpg": "\ufeffa cat\r\n\r\n  two ears \n",
            "more/c.webp": "日本の犬",
            "more/old/d.e.bmp": "a wolf\u2028at night\n",
        }.items()
    ):
        path = write_image(tmp_path / "pets" / name, seed)
        path.with_suffix(".txt").write_bytes(text.encode())
    return tmp_path / "pets"


TEXTS = {
    "a.jpg": ("a cat", "two ears"),
    "b.png": ("a brown dog",),
    "more/c.webp": ("日本の犬",),
    "more/old/d.e.bmp": ("a wolf\u2028at night",),
}


def open_pets(pets, size=8):
    return data.open_source(f"captions:{pets}", size)


def write_metadata(pets, lines):
    """Writes metadata.jsonl; lines that are no text become JSON."""
    made = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (pets / "metadata.jsonl").write_text("\n".join(made))


def described(**more):
    """Lines of metadata that describe all images, some of them otherwise than given above."""
    found = {name: list(one) for name, one in TEXTS.items()} | more
    return [{"file_name": name, "text": one} for name, one in found.items()]


class Memory:
    """Captioned examples in memory; a pixel of example i is (2 i - 1) / (2 N) left and -1 right."""

    def __init__(self, *given, broken=()):
        self._given, self._broken = given, broken

    def __len__(self):
        return len(self._given)

    def __getitem__(self, index):
        image = np.array([[[index / len(self)], [-1.0]]], np.float32)
        return {"data": image, "captions": self.captions(index)}

    def name(self, index):
        return f"example {index}"

    def captions(self, index):
        if index in self._broken:
            raise data.UnreadableError("it is torn")
        return self._given[index]


def in_memory(*given, broken=(), draw=None):
    examples = Memory(*given, broken=broken)
    return data.DataSource("memory", examples, (1, 2, 1), (), "print", draw=draw, captioned=True)


MANY = [tuple(f"{i} {k}" for k in range(1 + i % 4)) for i in range(10)]


def test_stored_examples_hold_the_ids_of_all_captions():
    made = tokenised(in_memory(*MANY))
    assert (made.label, made.captioned, made.class_names) == (((LENGTH,), "int32"), False, ())
    assert isinstance(made.examples, data.Examples)
    example = made.examples[3]
    np.testing.assert_array_equal(example["captions"], tokenize(MANY[3]))
    assert len(made.examples) == 10
    assert made.examples.name(3) == "example 3"


def test_a_batch_holds_one_caption_of_each_example():
    made = tokenised(in_memory(*MANY))
    batch = data.batches(made, 20, seed=1)[2]
    assert set(batch) == {"data", "label", "unreadable"}
    assert (batch["label"].shape, batch["label"].dtype) == ((20, LENGTH), np.int32)
    for row, index in enumerate(data.order(made, 20, 1, 2)):
        assert text_of(batch["label"][row]) in MANY[index]
        assert batch["data"][row, 0, 0, 0] == np.float32(index / 10)


def test_the_same_seed_and_step_give_the_same_captions_and_another_seed_others():
    def drawn(seed):
        batches = data.batches(tokenised(in_memory(*MANY)), 10, seed, flip=True)
        return [batches[step]["label"] for step in (3, 0, 7)]

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))


def test_over_epochs_every_caption_is_drawn_about_as_often():
    batches = data.batches(tokenised(in_memory(("0", "1", "2", "3"))), 400, seed=0)
    drawn = [text_of(ids) for ids in batches[0]["label"]]
    counts = [drawn.count(caption) for caption in "0123"]
    assert min(counts) > 65  # of 100 expected, at a deviation of 9: once in 10,000
    assert drawn[:200] != drawn[200:]


def test_flips_do_not_hang_on_the_caption():
    batch = data.batches(tokenised(in_memory(("a", "b"))), 400, seed=0, flip=True)[0]
    flipped = batch["data"][:, 0, 0, 0] == -1.0
    second = np.array([text_of(ids) == "b" for ids in batch["label"]])
    for of in (second, ~second):
        assert 65 < (flipped & of).sum() < 135  # of 100 expected, at a deviation of 9
    plain = data.batches(tokenised(in_memory(("a", "b"))), 400, seed=0)[0]
    assert (plain["data"][:, 0, 1, 0] == -1.0).all()


def test_what_else_a_source_draws_is_drawn_after_the_caption():
    def double(example, generator, flip):
        return {**example, "data": 2 * example["data"]}

    made = tokenised(in_memory(*MANY, draw=double))
    batch = data.batches(made, 4, seed=0)[0]
    np.testing.assert_array_equal(batch["data"][:, 0, 1, 0], np.full(4, -2, np.float32))
    assert set(batch) == {"data", "label", "unreadable"}


def test_threads_and_parts_read_the_same_batches():
    made = tokenised(in_memory(*MANY))
    batches = data.batches(made, 6, seed=3, flip=True)
    stream = data.stream(made, 6, 3, flip=True, first_step=2, threads=4)
    parts = [data.batches(made, 6, 3, flip=True, part=(part, 2)) for part in range(2)]
    for step in range(2, 10):
        batch, first, second = next(stream), parts[0][step], parts[1][step]
        for name, array in batches[step].items():
            np.testing.assert_array_equal(batch[name], array)
            np.testing.assert_array_equal(first[name], array[::2])
            np.testing.assert_array_equal(second[name], array[1::2])


def test_an_unreadable_example_is_replaced_by_a_neighbour_with_its_own_caption():
    made = tokenised(in_memory(*MANY, broken=(3, 4)))
    batch = data.batches(made, 10, seed=0)[0]
    order = data.order(made, 10, 0, 0)
    broken = np.isin(order, (3, 4))
    np.testing.assert_array_equal(batch["unreadable"], np.where(broken, order, data.READABLE))
    for ids, index in zip(batch["label"], np.where(broken, 5, order), strict=True):
        assert text_of(ids) in MANY[index]
    assert data.Unreadable(made, 1.0).note(np.array([3])) == ["cannot read example 3: it is torn"]


def test_captions_come_in_order_without_those_that_cannot_be_read():
    expected = [text for index, given in enumerate(MANY) if index not in (3, 4) for text in given]
    torn = in_memory(*MANY, broken=(3, 4))
    assert list(data.captions_of(torn)) == expected
    assert list(data.captions_of(tokenised(torn))) == expected
    with pytest.raises(InputError, match="digits has no captions"):
        data.captions_of(data.open_source("digits"))


def test_captions_that_are_not_tokenised_make_no_batches():
    for read in (data.batches, data.stream):
        with pytest.raises(InputError, match="memory has captions; only text models train on it"):
            read(in_memory(*MANY), 2, 0)


def test_labels_are_not_tokenised():
    with pytest.raises(InputError, match="digits has no captions to tokenise"):
        tokenised(data.open_source("digits"))
    with pytest.raises(InputError, match="memory has no captions to tokenise"):
        tokenised(tokenised(in_memory(*MANY)))


def test_fingerprint_follows_the_tokenizer():
    plain = in_memory(*MANY)
    first = data.tokenised(plain, tokenize, "one").fingerprint
    assert first == data.tokenised(plain, tokenize, "one").fingerprint
    assert len({plain.fingerprint, first, data.tokenised(plain, tokenize, "two").fingerprint}) == 3


def test_a_tokenizer_of_another_kind_is_refused():
    with pytest.raises(InputError, match=r"int64 \[1, 24\] of 1 captions; it must make int32"):
        data.tokenised(in_memory(*MANY), lambda given: tokenize(given).astype(np.int64), "")
    with pytest.raises(InputError, match=r"makes int32 \[24\] of 1"):
        data.tokenised(in_memory(*MANY), lambda given: tokenize(given)[0], "")
    longest = data.tokenised(
        in_memory(("a", "bc")), lambda given: tokenize(given)[:, : max(map(len, given))], ""
    )
    with pytest.raises(InputError, match=r"makes int32 \[2, 2\] of 2 captions; .* one L"):
        longest.examples[0]


def test_text_files_beside_the_images_are_their_captions(pets):
    found = open_pets(pets)
    assert (found.name, found.shape, found.class_names) == (f"captions:{pets}", (8, 8, 3), ())
    assert (found.captioned, found.label) == (True, ((), "int32"))
    assert isinstance(found.examples, data.CaptionedExamples)
    assert len(found.examples) == 4
    for index, (name, given) in enumerate(TEXTS.items()):
        assert found.examples.name(index) == f"{pets}/{name}"
        example = found.examples[index]
        assert example["captions"] == found.examples.captions(index) == given
        np.testing.assert_array_equal(example["data"], pixels.decode((pets / name).read_bytes(), 8))
    with pytest.raises(IndexError):
        found.examples[4]


def test_captions_of_a_folder_are_listed_without_decoding(pets):
    for name in TEXTS:
        (pets / name).write_bytes(b"no image")
    assert list(data.captions_of(open_pets(pets))) == [
        text for given in TEXTS.values() for text in given
    ]


def test_metadata_comes_before_text_files(pets):
    write_metadata(
        pets,
        [
            {"file_name": "./more/c.webp", "text": " a dog of Japan ", "width": 12},
            "",
            {"file_name": "a.jpg", "text": ["one", "two"]},
            {"file_name": "more/old/d.e.bmp", "text": "line\nbreak"},
            "   ",
            {"text": "half", "file_name": "b.png"},
            {"file_name": "a.jpg", "text": "three"},
        ],
    )
    found = open_pets(pets)
    assert [found.examples.captions(index) for index in range(4)] == [
        ("one", "two", "three"),
        ("half",),
        ("a dog of Japan",),
        ("line\nbreak",),
    ]


def test_the_same_captions_from_either_place_are_the_same_data(pets):
    beside = open_pets(pets)
    write_metadata(pets, described())
    assert open_pets(pets).fingerprint == beside.fingerprint
    write_metadata(pets, described()[::-1])  # whatever the order of the lines
    assert open_pets(pets).fingerprint == beside.fingerprint


def test_fingerprint_of_a_folder_follows_names_sizes_captions_and_crop(pets):
    found = {open_pets(pets).fingerprint, open_pets(pets, 9).fingerprint}
    (pets / "b.txt").write_text("a brown cat")
    found.add(open_pets(pets).fingerprint)
    (pets / "b.txt").write_text("a brown\ncat")
    found.add(open_pets(pets).fingerprint)
    (pets / "b.png").write_bytes((pets / "b.png").read_bytes() + b"\0")
    found.add(open_pets(pets).fingerprint)
    for suffix in ("png", "txt"):
        (pets / f"b.{suffix}").rename(pets / f"c.{suffix}")
    found.add(open_pets(pets).fingerprint)
    assert len(found) == 6
    assert open_pets(pets.rename(pets.parent / "elsewhere")).fingerprint in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p / "nothing", "there is no folder .*/nothing; check the name"),
        (lambda p: p / "b.png", "b.png is a file; give the folder that holds the images"),
        (lambda p: (p / "empty").mkdir() or p / "empty", r"empty holds no images \(.png, .jpg"),
        (lambda p: "", "'captions:' needs the name of a folder"),
        (lambda p: "a\0b", r"no folder can be called 'a\\x00b'"),
        (
            lambda p: (p / "b.txt").unlink() or (p / "more/c.txt").unlink() or p,
            r"2 of 4 images have no caption, such as b.png; write each into a file of .*\.txt",
        ),
        (lambda p: (p / "b.txt").write_text(" \n\n") and p, r"b.txt is empty; write a caption"),
        (
            lambda p: (p / "b.txt").write_bytes(b"caf\xe9") and p,
            r"cannot read .*b.txt: it is no text in UTF-8; save it as such",
        ),
        (
            lambda p: os.truncate(p / "b.txt", texts.MAX_TEXT + 1) or p,
            "b.txt has more than 1048576 bytes",
        ),
        (
            lambda p: (p / "b.txt").unlink() or os.mkfifo(p / "b.txt") or p,
            "1 of 4 images have no caption, such as b.png",
        ),
    ],
)
def test_what_is_no_folder_of_captioned_images_is_refused(pets, change, message):
    with pytest.raises(InputError, match=message) as caught:
        open_pets(change(pets))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", [0, -1])
def test_image_size_is_asked_for(pets, size):
    with pytest.raises(InputError, match="give image_size, such as 256"):
        open_pets(pets, size)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "b.png", "te', "line 2: it is no JSON"),
        ("[]", "line 2: wanted is a JSON object, not a value of type list"),
        ("[" * 100_000, "line 2: it is no JSON"),
        ({"text": "a"}, "line 2: its file_name must be the name of an image"),
        ({"file_name": 3, "text": "a"}, "line 2: its file_name must be"),
        ({"file_name": "b.png"}, "line 2: nothing stands where a text must be"),
        ({"file_name": "b.png", "text": 3}, "line 2: a value of type int stands where a text"),
        ({"file_name": "b.png", "text": ["a", None]}, "line 2: nothing stands where a text"),
        ({"file_name": "b.png", "text": " "}, "line 2: its text is empty"),
        ({"file_name": "b.png", "text": []}, "line 2: its list of texts is empty"),
        ('{"file_name": "b.png", "text": "\\ud800"}', "line 2: its text has half of a character"),
        ({"file_name": "../pets/b.png", "text": "a"}, "line 2: file_name '../pets/b.png' leaves"),
        ({"file_name": "/etc/b.png", "text": "a"}, "line 2: file_name '/etc/b.png' leaves the"),
        ({"file_name": "x.png", "text": "a"}, "line 2: file_name is 'x.png', and no image"),
        ({"file_name": "b.txt", "text": "a"}, "line 2: file_name is 'b.txt', and no image"),
        ({"file_name": "more", "text": "a"}, "line 2: file_name is 'more', and no image"),
        ({"file_name": "a\0\n", "text": "a"}, r"line 2: file_name is .*, and no image"),
        ('{"file_name": "\\ud800", "text": "a"}', r"line 2: no file can be called '.ud800'"),
        ({"file_name": "b.png", "text": "x" * texts.MAX_TEXT}, "line 2: it has more than 1048576"),
    ],
)
def test_a_damaged_line_of_metadata_is_named(pets, line, message):
    write_metadata(pets, [described()[0], line, *described()[1:]])
    with pytest.raises(InputError, match=f"metadata.jsonl, {message}") as caught:
        open_pets(pets)
    assert str(caught.value).isprintable()


def test_images_that_metadata_does_not_describe_are_counted(pets):
    write_metadata(pets, described()[2:])
    with pytest.raises(InputError, match=r"2 of 4 images have no caption, such as a.jpg; give"):
        open_pets(pets)
    (pets / "metadata.jsonl").unlink()
    (pets / "metadata.jsonl").symlink_to(pets / "gone")
    with pytest.raises(InputError, match=r"cannot read .*metadata.jsonl: No such file"):
        open_pets(pets)
    (pets / "metadata.jsonl").unlink()
    (pets / "metadata.jsonl").write_bytes(b'{"file_name": "b.png", "text": "caf\xe9"}')
    with pytest.raises(InputError, match=r"metadata.jsonl, line 1: it is no text in UTF-8"):
        open_pets(pets)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_images_whose_names_are_no_text_have_captions(pets):
    for suffix in (b".png", b".txt"):
        os.rename(os.fsencode(pets) + b"/b" + suffix, os.fsencode(pets) + b"/\xff" + suffix)
    assert list(data.captions_of(open_pets(pets)))[-1] == "a brown dog"
    lines = [line for line in described() if line["file_name"] != "b.png"]
    write_metadata(pets, [*lines, {"file_name": "\udcff.png", "text": "a dog"}])
    assert list(data.captions_of(open_pets(pets)))[-1] == "a dog"


def test_a_damaged_image_is_unreadable(pets):
    found = tokenised(open_pets(pets))
    (pets / "b.png").write_bytes(b"no image")
    with pytest.raises(data.UnreadableError, match="it is no JPEG"):
        found.examples[1]
    batch = data.batches(found, 4, seed=0)[0]
    assert [int(i) for i in batch["unreadable"] if i != data.READABLE] == [1]
    lines = data.Unreadable(found, 0.5).note(batch["unreadable"])
    assert lines == [f"cannot read {pets}/b.png: it is no JPEG, PNG, WebP, BMP or GIF image"]


def test_many_captions_take_little_memory():
    table = captions.CaptionTable((f"caption {i}", "x") for i in range(50_000))
    assert table[0] == ("caption 0", "x")
    assert table[49_999] == ("caption 49999", "x")
    held = sum(sys.getsizeof(value) for value in vars(table).values())
    assert held < 48 * 50_000  # bytes; 14 of text, two ends and a total, and room to grow


def test_digits_have_several_captions_that_name_them():
    found = data.open_source("digit_captions")
    plain, labels = data.arrays(data.open_source("digits"))
    assert (found.name, found.shape, found.captioned) == ("digit_captions", (8, 8, 1), True)
    np.testing.assert_array_equal(found.examples.labels, labels)
    for index in (0, 7, 1796):
        example = found.examples[index]
        np.testing.assert_array_equal(example["data"], plain[index])
        assert example["captions"] == digit_captions.digit_captions(labels[index])
    assert found.fingerprint != data.open_source("digits").fingerprint


def test_every_phrasing_is_another_and_tells_the_digit():
    assert "a handwritten seven" in digit_captions.digit_captions(7)
    assert "an handwritten eight" not in digit_captions.digit_captions(8)
    assert "somebody wrote an eight" in digit_captions.digit_captions(8)
    everything = [one for label in range(10) for one in digit_captions.digit_captions(label)]
    assert len(set(everything)) == 10 * len(digit_captions.PHRASINGS) >= 60
    for label, word in enumerate(digit_captions.WORDS):
        for one in digit_captions.digit_captions(label):
            assert (word in one) != (str(label) in one)
    for label in (-1, 10):
        with pytest.raises(InputError, match=f"a digit is from 0 to 9, got {label}"):
            digit_captions.digit_captions(label)


def test_captioned_digits_take_no_argument_or_other_size():
    with pytest.raises(InputError, match="called 'digit_captions' alone, got 'digit_captions:x'"):
        data.open_source("digit_captions:x")
    with pytest.raises(InputError, match="digits are 8 pixels wide"):
        data.open_source("digit_captions", 16)


def test_every_source_says_what_its_labels_are():
    digits = data.open_source("digits")
    assert (digits.label, digits.captioned) == (((), "int32"), False)
    fields = source.DataSource.__dataclass_fields__
    assert list(fields)[-2:] == ["label", "captioned"]  # others give the first ones by position


def test_no_device_is_touched(pets):
    # With a platform that does not exist, JAX fails as soon as anything asks for a device.
    program = """
import sys
import numpy as np
from flowturbo_jax import data
source = data.open_source(f"captions:{sys.argv[1]}", 8)
source = data.tokenised(source, lambda texts: np.zeros((len(texts), 3), np.int32), "zeros")
assert data.batches(source, 4, seed=0)[0]["label"].shape == (4, 3)
assert "tensorflow_datasets" not in sys.modules
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
