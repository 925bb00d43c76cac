"""Files of prompts: text and JSON lines, refused in one line where nothing can be read."""

import pytest

from flowturbo_jax import data
from flowturbo_jax.data import prompts
from flowturbo_jax.interfaces import InputError


def test_a_text_has_a_prompt_in_each_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeffa red fox\r\n\r\n# a remark\n  日本の犬 \n   # another\na red fox\nno #1".encode()
    )
    assert data.read_prompts(path) == ["a red fox", "日本の犬", "a red fox", "no #1"]
    assert data.read_prompts(str(path)) == data.read_prompts(path)


def test_json_lines_have_texts_or_captions(tmp_path):
    path = tmp_path / "prompts.JSONL"
    path.write_text('{"text": "# one ", "id": 3}\n\n{"caption": "two"}\n{"text": ["three"]}\n')
    assert data.read_prompts(path) == ["# one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt has no prompts; write one in each line"),
        ("p.txt", b"\n # only a remark\n", "p.txt has no prompts"),
        ("p.txt", b"caf\xe9", "cannot read prompts from .*p.txt: it is no text in UTF-8"),
        ("p.jsonl", b"\n", "p.jsonl has no prompts"),
        ("p.jsonl", b"a red fox", "p.jsonl, line 1: it is no JSON"),
        ("p.jsonl", b'{"text": "a"}\n{"prompt": "b"}', "p.jsonl, line 2: nothing stands where a"),
        ("p.jsonl", b'{"text": ""}', "p.jsonl, line 1: its text is empty"),
        ("p.jsonl", b'{"text": ["a", "b"]}', "p.jsonl, line 1: it has several texts"),
        ("p.jsonl", b'{"text": "caf\xe9"}', "p.jsonl, line 1: it is no text in UTF-8"),
        ("no\n.txt", b"", r"no\\n.txt' has no prompts"),
    ],
)
def test_what_holds_no_prompts_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        data.read_prompts(tmp_path / name)
    assert str(caught.value).isprintable()


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"cannot read .*gone.txt: No such file"):
        data.read_prompts(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="it is a folder"):
        data.read_prompts(tmp_path)
    monkeypatch.setattr(prompts, "MAX_FILE", 3)
    (tmp_path / "long.txt").write_text("long")
    with pytest.raises(InputError, match=r"long.txt has more than 3 bytes; split it"):
        data.read_prompts(tmp_path / "long.txt")
