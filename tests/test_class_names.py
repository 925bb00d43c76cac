"""Class names: ImageNet's list, names from a file, and the label a name stands for."""

import json
import tomllib
from pathlib import Path

import pytest

from flowturbo_jax.class_names import (
    IMAGENET,
    imagenet_class_names,
    label_of,
    read_class_names,
)
from flowturbo_jax.interfaces import InputError

ROOT = Path(__file__).parent.parent
NAMES = ("crane", "tench, Tinca tinca", "red fox, fox", "crane", "fox", "wolf, fox", "T-shirt")


def test_imagenet_has_1000_classes_in_the_order_of_their_wordnet_ids():
    lines = [line for line in IMAGENET.read_text().splitlines() if not line.startswith("#")]
    ids = [line.split("\t")[0] for line in lines]
    assert len(set(ids)) == 1000
    assert ids == sorted(ids)
    assert len(imagenet_class_names()) == 1000
    assert all(name == name.strip() != "" for name in imagenet_class_names())


@pytest.mark.parametrize(
    ("label", "name"),
    [  # the labels of the official SiT and DiT sample scripts, first, last, and a few more
        (0, "tench"),
        (88, "macaw"),
        (207, "golden retriever"),
        (279, "Arctic fox"),
        (360, "otter"),
        (387, "lesser panda"),
        (387, "red panda"),
        (417, "balloon"),
        (974, "geyser"),
        (979, "valley"),
        (999, "toilet tissue"),
    ],
)
def test_imagenet_names_are_at_the_known_labels(label, name):
    assert label_of(name, imagenet_class_names()) == label


def test_every_imagenet_entry_means_its_own_label():
    names = imagenet_class_names()
    labels = {name: [label for label, other in enumerate(names) if other == name] for name in names}
    assert [name for name, found in labels.items() if len(found) > 1] == ["crane"]
    for name, (label, *more) in labels.items():
        assert more or label_of(name, names) == label


def test_the_list_is_part_of_the_installed_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert IMAGENET.name in project["tool"]["setuptools"]["package-data"]["flowturbo_jax"]


@pytest.mark.parametrize("number", [3, "3", " 3 ", "+3", "03"])
def test_a_number_is_the_label(number):
    assert label_of(number, NAMES) == 3


@pytest.mark.parametrize("number", [9999, "9999", -1, "-1"])
def test_a_number_is_not_checked_here(number):
    assert label_of(number, NAMES) == int(number)


@pytest.mark.parametrize(
    "name",
    ["tench", "Tinca tinca", "TINCA_tinca", "tinca-tinca", " tench ", "Tench,Tinca  tinca"],
)
def test_case_spaces_and_joiners_do_not_matter(name):
    assert label_of(name, NAMES) == 1


def test_joiners_in_the_entries_do_not_matter_either():
    assert label_of("t shirt", NAMES) == label_of("T_Shirt", NAMES) == 6


def test_a_whole_entry_comes_before_one_of_several_names():
    assert label_of("fox", NAMES) == 4
    assert label_of("maillot", imagenet_class_names()) == 638  # 639 is "maillot, tank suit"


def test_a_name_of_several_classes_is_refused_with_their_numbers():
    with pytest.raises(InputError, match=r"'crane' .* 0 \(crane\), 3 \(crane\); give the number"):
        label_of("crane", NAMES)
    with pytest.raises(InputError, match=r"134 \(crane\), 517 \(crane\)"):
        label_of("Crane", imagenet_class_names())
    with pytest.raises(InputError, match=r"387 \(lesser panda, .*\), 388 \(giant panda, .*\)"):
        label_of("panda", imagenet_class_names())
    with pytest.raises(InputError, match=r"4 \(thing, e\), \.\.\.; give the number"):
        label_of("thing", [f"thing, {letter}" for letter in "abcdefgh"])


@pytest.mark.parametrize(
    ("name", "suggestions"),
    [
        ("goldn retriever", r"near it are 207 \(golden retriever\), 208 "),
        ("fox", r"277 \(red fox, Vulpes vulpes\), 278 \(kit fox"),
        ("jack-o-lantern", r"607 \(jack-o'-lantern\)"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, suggestions):
    with pytest.raises(InputError, match=f"no class is called {name!r}; .*{suggestions}") as error:
        label_of(name, imagenet_class_names())
    assert str(error.value).endswith("; give a name, or a number from 0 to 999")
    assert str(error.value).count("(") <= 3


@pytest.mark.parametrize("name", ["", " ", ",", "qqqqqq", "9" * 5000])
def test_a_name_near_nothing_is_refused_without_suggestions(name):
    with pytest.raises(InputError, match=r"'; give a name, or a number from 0 to 999"):
        label_of(name, imagenet_class_names())


def test_a_name_is_refused_where_the_classes_have_none():
    assert label_of("5", ()) == 5
    with pytest.raises(InputError, match="'otter', but these classes have no names; give a number"):
        label_of("otter", ())


@pytest.mark.parametrize(
    "text",
    [
        "cat\nsea lion\ndog\n",
        "\ufeffcat\r\n sea lion \r\ndog",
        json.dumps(["cat", "sea lion", "dog"]),
    ],
)
def test_class_names_are_read_from_lines_or_a_json_list(tmp_path, text):
    path = tmp_path / "names.txt"
    path.write_bytes(text.encode())
    assert read_class_names(path, 3) == read_class_names(str(path), 3) == ("cat", "sea lion", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog\n", "has 2 class names, but there are 3 classes"),
        (b"a\nb\nc\nd\n", "has 4 class names, but there are 3 classes"),
        (b"", "has 0 class names"),
        (b"cat\n\ndog\n", "class 1 in .* is ''; it must be a name"),
        (b'["cat", 2, "dog"]', "class 1 in .* is 2; it must be a name"),
        (b'["cat", "dog"', "not a JSON list"),
        (b"\xff\xfe\x00c", "not UTF-8 text"),
    ],
)
def test_a_file_of_other_than_the_wanted_names_is_refused(tmp_path, content, message):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_class_names(path, 3)
    assert str(path) in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"names\.txt: No such file"):
        read_class_names(tmp_path / "names.txt", 3)
    with pytest.raises(InputError, match="cannot read class names"):
        read_class_names(tmp_path, 3)
