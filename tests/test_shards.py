"""Tar files of images with captions: read where they lie, refused in one line if damaged."""

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from flowturbo_jax import data
from flowturbo_jax.data import folder, pixels, shards, tar_headers, texts
from flowturbo_jax.interfaces import InputError


def image(seed, kind="PNG"):
    generator = np.random.default_rng(seed)
    stream = io.BytesIO()
    PIL.Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


def pack(path, files, form=tarfile.USTAR_FORMAT):
    """Writes a tar file of (name, bytes) pairs, or of (name, member) where it is no plain file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                archive.addfile(member)
    return path


@pytest.fixture
def packed(tmp_path):
    """Two shards with five samples, whose captions are kept in different ways."""
    pack(
        tmp_path / "data/00001.tar",
        [
            ("d/4.jpeg", image(4, "JPEG")),
            ("d/4.json", json.dumps({"caption": "four", "text": "no"}).encode()),
            ("d/5.webp", image(5, "WEBP")),
            ("d/5.json", json.dumps({"caption": None, "text": ["five", " V "]}).encode()),
        ],
    )
    pack(
        tmp_path / "data/00000.tar",
        [
            ("README.md", b"x"),
            ("0.png", image(0)),
            ("0.txt", "zero\n日本\n".encode()),
            ("0.json", b'{"caption": "not this"}'),
            ("1.txt", b" one "),
            ("1.cls", b"7"),
            ("1.mask.png", b"no image"),
            ("1.JPG", image(1, "JPEG")),
            ("alone.txt", b"without an image"),
            ("2.cls", b"7"),
            ("2.png", image(2)),
            ("2.txt", b"two"),
        ],
    )
    return tmp_path / "data"


TEXTS = [("zero", "日本"), ("one",), ("two",), ("four",), ("five", "V")]


def open_shards(argument, size=8):
    return data.open_source(f"shards:{argument}", size)


def captions_in(source):
    return [source.examples.captions(index) for index in range(len(source.examples))]


def test_samples_are_images_with_their_captions(packed):
    source = open_shards(packed)
    assert (source.name, source.shape, source.class_names) == (f"shards:{packed}", (8, 8, 3), ())
    assert source.captioned
    assert isinstance(source.examples, data.CaptionedExamples)
    assert captions_in(source) == TEXTS
    assert list(data.captions_of(source)) == [text for given in TEXTS for text in given]
    contents = [image(0), image(1, "JPEG"), image(2), image(4, "JPEG"), image(5, "WEBP")]
    for index, content in enumerate(contents):
        example = source.examples[index]
        assert example["captions"] == TEXTS[index]
        np.testing.assert_array_equal(example["data"], pixels.decode(content, 8))
    assert source.examples.name(1) == f"1.JPG in {packed}/00000.tar"
    assert source.examples.name(3) == f"d/4.jpeg in {packed}/00001.tar"
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"example {index} of 5"):
            source.examples[index]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_other_letters_are_read(tmp_path, form):
    long = f"./{'d' * 90}/{'日本' * 30}"
    path = pack(tmp_path / "a.tar", [(f"{long}.png", image(3)), (f"{long}.txt", b"a")], form)
    source = open_shards(path)
    assert captions_in(source) == [("a",)]
    assert source.examples.name(0).startswith(long)
    np.testing.assert_array_equal(source.examples[0]["data"], pixels.decode(image(3), 8))


def test_paths_may_be_patterns(packed, monkeypatch):
    pack(packed / "00002.tar", [("6.png", image(6)), ("6.txt", b"six")])
    pack(packed / "more/[00003].tar", [("7.png", image(7)), ("7.txt", b"seven")])

    def count(argument):
        return len(open_shards(f"{packed}/{argument}").examples)

    assert count("") == count("*.tar") == count("{00000..00002}.tar") == 6
    assert count("{0..0}000{1..2}.tar") == count("0000[12].tar") == 3
    assert count("00002.tar") == count("0000?.tar") - 5 == count("more/[00003].tar") == 1
    assert count("**/*.tar") == 7
    monkeypatch.setenv("HOME", str(packed))
    assert len(open_shards("~/{00001..00002}.tar").examples) == 3


def test_the_order_in_which_shards_are_found_or_samples_are_packed_does_not_matter(packed):
    source = open_shards(packed)
    again = open_shards(f"{packed}/0000[10].tar")
    assert (captions_in(again), again.fingerprint) == (TEXTS, source.fingerprint)
    first = pack(packed / "x/a.tar", [("b.txt", b"B"), ("b.png", image(1))])
    assert captions_in(open_shards(first)) == [("B",)]


def test_fingerprint_follows_names_sizes_and_crop(packed, tmp_path):
    found = {open_shards(packed).fingerprint, open_shards(packed, 9).fingerprint}
    parts = [("a.png", image(0)), ("a.txt", b"one")]
    path = packed / "00002.tar"
    for change in (parts, [parts[0], ("a.txt", b"once")], [("b.png", image(0)), ("b.txt", b"one")]):
        pack(path, change)
        found.add(open_shards(packed).fingerprint)
    path.rename(packed / "00003.tar")
    found.add(open_shards(packed).fingerprint)
    assert len(found) == 6
    assert open_shards(packed.rename(tmp_path / "elsewhere")).fingerprint in found


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "'shards:' needs a folder or a path"),
        ("a\0b", r"needs a folder or a path, such as shards:data/\*.tar, got "),
        ("{packed}/nothing", "there is no file .*/nothing; check the path"),
        ("{packed}/*.zip", r"there is no file .*/\*.zip; check the path"),
        (
            "{packed}/{{00000..00003}}.tar",
            "there is no file 2 of the 4 files, such as .*/00002.tar; check",
        ),
        ("{packed}/{{3..1}}.tar", r"the range {3\.\.1} has no numbers"),
        ("{packed}/{{0..999999999}}.tar", r"{0\.\.999999999} has over 100000 numbers"),
        ("{packed}/empty", "empty holds no .tar files"),
        ("{packed}/../data/00000.tar/x", "there is no file"),
    ],
)
def test_what_is_no_path_of_shards_is_refused(packed, argument, message):
    (packed / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        open_shards(argument.format(packed=packed))
    assert str(caught.value).isprintable()


def test_ranges_of_too_many_shards_together_are_refused(packed, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARDS", 3)
    assert len(open_shards(f"{packed}/0000{{0..1}}.tar").examples) == 5
    with pytest.raises(InputError, match="stands for over 3 files, more than are read"):
        open_shards(f"{packed}/{{0..1}}000{{0..1}}.tar")


def test_image_size_is_asked_for(packed):
    with pytest.raises(InputError, match="give image_size, such as 256"):
        open_shards(packed, 0)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(tmp_path, kind):
    path = tmp_path / f"a.tar.{kind}"
    with tarfile.open(path, f"w:{kind}"):
        pass
    with pytest.raises(InputError, match=f"holds compressed files, such as a.tar.{kind}, .* deco"):
        open_shards(tmp_path)
    with pytest.raises(InputError, match=r"a.tar.*: it is compressed, .*; decompress it"):
        open_shards(path)
    path.rename(tmp_path / "b.tar")
    with pytest.raises(InputError, match=r"b.tar: it is compressed, .*; decompress it"):
        open_shards(tmp_path)


def test_a_shard_that_was_cut_anywhere_is_refused(tmp_path):
    parts = [("a.png", image(0)), ("a.txt", b"a"), ("b.png", image(1)), ("b.txt", b"b")]
    path = pack(tmp_path / "a.tar", parts, tarfile.PAX_FORMAT)
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    end = members[-1].offset_data + 512
    ends = {m.offset for m in members} | {m.offset_data + m.size for m in members} | {0, 512, end}
    content = path.read_bytes()
    for length in sorted(ends | {cut - 1 for cut in ends if cut} | {cut + 1 for cut in ends}):
        if length >= end + 512:
            continue
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cannot read .*a.tar: it was cut; copy or make it"):
            open_shards(path)
    path.write_bytes(content[: end + 512])
    assert len(open_shards(path).examples) == 2


def test_a_shard_with_a_damaged_header_is_refused(packed):
    path = packed / "00000.tar"
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        offsets = [member.offset for member in archive]
    for offset in offsets:
        for damage in (b"\xff" * 20, b"\0" * 512):
            changed = content[:offset] + damage + content[offset + len(damage) :]
            path.write_bytes(changed)
            with pytest.raises(InputError, match=r"00000.tar: it is (damaged; copy|no tar file)"):
                open_shards(packed)
    path.write_bytes(b"something else" * 100)
    with pytest.raises(InputError, match=r"00000.tar: it is no tar file"):
        open_shards(packed)


def header(name=b"a.png", size=b"00000000001", kind=b"0", tail=b""):
    """A block that begins a member, with whatever a hostile program may write."""
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124 : 124 + len(size)] = name, b"0000644\0", size
    block[156:157], block[257:263] = kind, b"ustar\0"
    block[345 : 345 + len(tail)] = tail
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" * 12
HUGE = b"\x80" + b"\0" * 3 + b"\x7f" * 8


@pytest.mark.parametrize(
    "content",
    [
        header(size=NEGATIVE),
        header(size=b"\xff" * 10 + b"\xfe\x00"),  # -512, which leads back to this header
        header(size=HUGE),
        header(kind=b"x", size=NEGATIVE),
        header(kind=b"x", size=HUGE),
        header(kind=b"x", size=b"00000001000") + b"9999999 path=a\n".ljust(512, b"\0"),
        header(kind=b"x", size=b"00000000015") + b"13 size=-999\n".ljust(512, b"\0") + header(),
        header(kind=b"x", size=b"00000001000") * 3000,
        header(kind=b"L", size=HUGE),
        header(kind=b"L", size=b"00000000000") * 3000,
        header(kind=b"S") + b"x" * 512,
        header(kind=b"K", size=b"77777777777") + bytes(2048),
        header(size=b"nonsense"),
    ],
)
def test_hostile_headers_are_refused_at_once(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content + bytes(1024))
    with pytest.raises(InputError) as caught:
        open_shards(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    assert str(caught.value).isprintable()


def test_headers_larger_than_any_member_needs_are_not_read(tmp_path):
    path = pack(tmp_path / "a.tar", [("d" * 20_000 + ".png", image(0))], tarfile.PAX_FORMAT)
    with pytest.raises(InputError, match="it is damaged"):
        open_shards(path)


@pytest.mark.parametrize(
    "name", ["../../etc/x", "/etc/x", "C:\\x", "a\nb", "\x1b[2J", "-rf", "~/x", "%s%n"]
)
def test_hostile_names_stay_names(tmp_path, name):
    path = pack(tmp_path / "a.tar", [(f"{name}.png", image(0)), (f"{name}.txt", b"a")])
    before = sorted(tmp_path.rglob("*"))
    source = open_shards(path)
    assert captions_in(source) == [("a",)]
    assert source.examples.name(0).isprintable()
    assert sorted(tmp_path.rglob("*")) == before == [path]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
@pytest.mark.parametrize("name", ["a.png", "a.txt"])
def test_links_and_devices_are_no_images_or_captions(tmp_path, kind, name):
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, "/etc/passwd"
    parts = {"a.png": image(0), "a.txt": b"a", name: member}
    path = pack(tmp_path / "a.tar", parts.items())
    with pytest.raises(InputError, match=f"'{name}' in it is no plain file"):
        open_shards(path)
    pack(path, [("a.png", image(0)), ("a.txt", b"a"), ("b.cls", member), ("folder", member)])
    assert len(open_shards(path).examples) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([("b.png", b"")], "1 images in shards:.* have no caption, such as b.png in .*x.tar; each"),
        ([("b.png", b""), ("c.jpg", b"")], "2 images in shards:.*, such as b.png in"),
        ([("b.png", b""), ("c.txt", b""), ("b.txt", b"")], "1 images in .*, such as b.png in"),
        ([("b.png", b""), ("b.jpg", b""), ("b.txt", b"")], "'b.png' and 'b.jpg' in it are parts"),
        ([("b.txt", b""), ("b.txt", b""), ("b.png", b"")], "'b.txt' and 'b.txt' in it are parts"),
        (
            [("b.cls", b""), ("a.png", b""), ("a.txt", b"")],
            "x.tar: it holds the sample 'a' twice; remove or rename one",
        ),
    ],
)
def test_samples_that_are_not_whole_are_refused(packed, more, message):
    pack(packed / "x.tar", [("a.png", image(0)), ("a.txt", b"a"), *more])
    with pytest.raises(InputError, match=message) as caught:
        open_shards(packed)
    assert str(caught.value).isprintable()


def test_samples_of_one_name_in_two_shards_are_two(packed):
    pack(packed / "x.tar", [("0.png", image(8)), ("0.txt", b"another")])
    assert captions_in(open_shards(packed)) == [*TEXTS, ("another",)]


def test_shards_without_images_are_refused_unless_others_have_some(packed):
    path = pack(packed / "x.tar", [("a.txt", b"a"), ("folder/b.cls", b"3")])
    assert captions_in(open_shards(packed)) == TEXTS
    with pytest.raises(InputError, match=r"holds no images \(.jpg, .jpeg, .png, .webp"):
        open_shards(path)
    assert captions_in(open_shards(pack(path, []).parent)) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "its caption cannot be read: it is no text in UTF-8"),
        ("a.txt", b" \n", "its caption is empty"),
        ("a.json", b"{", "its caption cannot be read: it is no JSON"),
        ("a.json", b"[]", "wanted is a JSON object, not a value of type list"),
        ("a.json", b'{"key": 3}', "nothing stands where a text must be"),
        ("a.json", b'{"caption": ""}', "its text is empty"),
        ("a.json", b"x" * (texts.MAX_TEXT + 1), "it has a part of more than 1048576 bytes"),
    ],
)
def test_a_damaged_caption_is_unreadable(packed, name, content, message):
    pack(packed / "x.tar", [("a.png", image(0)), (name, content)])
    source = open_shards(packed)
    with pytest.raises(data.UnreadableError, match=message) as caught:
        source.examples[5]
    assert str(caught.value).isprintable()
    with pytest.raises(data.UnreadableError, match=message):
        source.examples.captions(5)
    assert len(list(data.captions_of(source))) == 7


def test_damaged_and_huge_images_are_unreadable(packed, monkeypatch):
    pack(packed / "x.tar", [("a.png", b"no image"), ("a.txt", b"a")])
    source = open_shards(packed)
    with pytest.raises(data.UnreadableError, match="it is no JPEG"):
        source.examples[5]
    assert source.examples.captions(5) == ("a",)
    assert folder.MAX_FILE == shards.MAX_FILE
    monkeypatch.setattr(shards, "MAX_FILE", 7)
    with pytest.raises(data.UnreadableError, match="a part of more than 7 bytes"):
        open_shards(packed).examples[5]


def test_shards_that_change_or_go_after_opening_are_unreadable(packed):
    source = open_shards(packed)
    with (packed / "00000.tar").open("ab") as file:
        file.write(b"\0")
    (packed / "00001.tar").unlink()
    with pytest.raises(data.UnreadableError, match="it changed after it was opened; start again"):
        source.examples[0]
    with pytest.raises(data.UnreadableError, match="No such file"):
        source.examples[3]


def test_a_failing_machine_is_no_unreadable_example(packed, monkeypatch):
    source = open_shards(packed)

    def fail(*args):
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(InputError, match=r"0.png in .*00000.tar: Too many open files; raise"):
        source.examples[0]


def tokenised(source):
    def tokenize(given):
        return np.array([[len(text), ord(text[0]) if text else 0] for text in given], np.int32)

    return data.tokenised(source, tokenize, "lengths")


def test_threads_read_the_same_batches(packed):
    source = tokenised(open_shards(packed))
    batches = data.batches(source, 4, seed=3, flip=True)
    stream = data.stream(tokenised(open_shards(packed)), 4, 3, flip=True, first_step=2, threads=4)
    drawn = set()
    for step in range(2, 14):
        batch = next(stream)
        for name, array in batches[step].items():
            np.testing.assert_array_equal(batch[name], array)
        drawn |= {tuple(row) for row in batch["label"].tolist()}
    every = [text for given in TEXTS for text in given]
    assert drawn == {(len(text), ord(text[0])) for text in every}


def test_several_threads_read_the_same(packed):
    source = open_shards(packed)
    expected = [source.examples[index] for index in range(5)]
    with ThreadPoolExecutor(8) as pool:
        for index, example in enumerate(pool.map(source.examples.__getitem__, list(range(5)) * 20)):
            assert example["captions"] == expected[index % 5]["captions"]
            np.testing.assert_array_equal(example["data"], expected[index % 5]["data"])


def test_unreadable_samples_are_replaced_and_named(packed):
    pack(packed / "x.tar", [("a.png", b"no image"), ("a.txt", b"a")])
    source = tokenised(open_shards(packed))
    batch = data.batches(source, 6, seed=0)[0]
    assert [int(index) for index in batch["unreadable"] if index != data.READABLE] == [5]
    lines = data.Unreadable(source, limit=0.5).note(batch["unreadable"])
    assert lines == [
        f"cannot read a.png in {packed}/x.tar: it is no JPEG, PNG, WebP, BMP or GIF image"
    ]


def test_many_samples_take_little_memory(tmp_path):
    parts = [(f"{i:08d}.{suffix}", b"x") for i in range(2000) for suffix in ("jpg", "txt")]
    examples = open_shards(pack(tmp_path / "a.tar", parts)).examples
    (shard,) = examples._shards
    assert shard.samples.nbytes + len(shard.names) < 50 * len(examples)
    assert tar_headers.MAX_HEADERS < 1 << 20
