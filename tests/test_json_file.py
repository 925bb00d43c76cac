"""JSON beside weights: objects of bounded size, and indices that name files beside them only."""

import json
import time
from pathlib import Path

import pytest

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.json_file import MAX_JSON, MAX_SHARDS, read_index, read_json


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "model.index.json"


def test_an_object_is_read(file):
    value = {"a": [1, 2.5, None, {"é": "ß"}]}
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text(json.dumps(value, ensure_ascii=False), encoding=encoding)
        assert read_json(file) == read_json(str(file)) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "as JSON: 'Expecting value"),
        (b'{"a": }', "as JSON: 'Expecting value"),
        (b'{"a": "\xff"}', "as JSON: it is no text in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "it is no text in UTF-8"),
        (b"[" * 200_000, "as JSON: 'maximum recursion depth"),
        (b'{"a":' * 200_000, "as JSON: 'maximum recursion depth"),
        (b'{"a":' + b"9" * 5000 + b"}", "as JSON: 'Exceeds the limit"),
        (b"[{}]", "must hold a JSON object, not a value of type list"),
        (b'"\x1b[2J"', "as JSON: 'Invalid control character"),
        (b"[" + b"{}," * (MAX_JSON // 3) + b"{}]", "too large for a JSON file"),
    ],
)
def test_other_contents_are_refused_in_one_line(file, content, message):
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_json(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_an_index_lists_shards_in_order_with_their_tensors(file):
    file.write_text(json.dumps({"weight_map": {"b": "2 of 2.bin", "a": "1-x.bin", "c": "1-x.bin"}}))
    assert list(read_index(file).items()) == [("1-x.bin", {"a", "c"}), ("2 of 2.bin", {"b"})]


@pytest.mark.parametrize("name", ["a" * 201, "a/b", "\ud800.bin", "\x1b.bin", "...", " ", None, {}])
def test_an_index_names_files_beside_it_only(file, name):
    file.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="as a shard; wanted is a file name") as caught:
        read_index(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_long_name_takes_no_time(file):
    file.write_text(json.dumps({"weight_map": {"a": "a" * 1_000_000 + "!"}}))
    start = time.monotonic()
    with pytest.raises(InputError, match="as a shard"):
        read_index(file)
    assert time.monotonic() - start < 2  # a regular expression that backtracks takes hours


def test_too_many_shards_are_refused(file):
    weight_map = {f"t{i}": f"s{i}.bin" for i in range(MAX_SHARDS)}
    file.write_text(json.dumps({"weight_map": weight_map}))
    assert len(read_index(file)) == MAX_SHARDS
    file.write_text(json.dumps({"weight_map": {**weight_map, "more": "more.bin"}}))
    with pytest.raises(InputError, match="names over 1000 shards"):
        read_index(file)
