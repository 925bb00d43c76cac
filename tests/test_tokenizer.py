"""CLIP's tokenizer: parity with transformers, both forms of files, cutting, learning, bad files."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import golden
import numpy as np
import pytest

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import CLIPTextConfig
from flowturbo_jax.tokenizer import END, START, Tokenizer, check_fits

FOLDER = golden.FOLDER / "instaflow" / "pipeline" / "tokenizer"
CAPTIONS = ["a red circle", "a red square", "a blue circle above a red square", "don't, 3 times!"]


@cache
def stored() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


@cache
def examples() -> list[dict]:
    return json.loads((golden.FOLDER / "clip" / "tokenizer_examples.json").read_text())


@cache
def small(length: int = 8) -> Tokenizer:
    return unused(length)


def unused(length: int) -> Tokenizer:
    """The same, which has not warned of any text."""
    return Tokenizer.learn(CAPTIONS, 560, length)


@pytest.fixture
def folder(tmp_path):
    """Writes the stored folder without some files, and with others changed."""

    def write(*without: str, **changes: dict) -> Path:
        for file in FOLDER.iterdir():
            if file.name not in without:
                shutil.copyfile(file, tmp_path / file.name)
        for stem, change in changes.items():
            path = tmp_path / f"{stem}.json"
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(content | change))
        return tmp_path

    return write


@pytest.mark.parametrize("without", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_ids_match_the_reference_whichever_files_there_are(folder, without):
    tokenizer = Tokenizer.from_folder(folder(*without))
    texts = [example["text"] for example in examples()]
    ids = tokenizer(texts)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [example["input_ids"] for example in examples()])
    lengths = [example["untruncated_length"] for example in examples()]
    np.testing.assert_array_equal(tokenizer.lengths(texts), lengths)
    assert tokenizer.fingerprint == stored().fingerprint


def test_attributes_are_those_of_the_files():
    tokenizer = stored()
    assert (tokenizer.length, tokenizer.vocab_size) == (77, 714)
    assert (tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token) == (712, 713, 713)


def test_no_texts_have_no_ids():
    assert stored()([]).shape == (0, 77)
    assert stored().lengths([]).shape == (0,)


def test_many_texts_are_as_each_alone():
    texts = [f"the dog {i} in the garden" for i in range(600)]
    ids = stored()(texts)
    for i in (0, 255, 256, 599):
        np.testing.assert_array_equal(ids[i], stored()([texts[i]])[0])


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  The\t\u3000 DOG\n", "the dog"),
        ("cafe\u0301", unicodedata.normalize("NFC", "cafe\u0301")),
        ("the dog's ball,and 12", "the dog 's ball , and 1 2"),
        (f"a{END.upper()}b", f"a {END} b"),
    ],
)
def test_texts_that_only_look_different_have_the_same_ids(text, same):
    np.testing.assert_array_equal(*stored()([text, same]))


def test_a_special_token_inside_a_text_becomes_its_id():
    ids = stored()([f"a{START}b{END}c"])[0]
    assert list(ids[[0, 2, 4, 6]]) == [712, 712, 713, 713]


def test_where_an_exclamation_mark_pads_it_is_special_as_in_transformers(folder):
    # Stable Diffusion 2's: its two files differ, and diffusers' issue 4153 shows these ids.
    tokenizer = Tokenizer.from_folder(folder(special_tokens_map={"pad_token": "!"}))
    assert tokenizer.pad_token == 0
    np.testing.assert_array_equal(tokenizer(["! !!"])[0, :6], [712, 0, 0, 0, 713, 0])
    assert (tokenizer(["! !!"])[0, 5:] == 0).all()
    assert list(stored()(["! !!"])[0, :5]) == [712, 256, 0, 256, 713]
    assert tokenizer.fingerprint != stored().fingerprint


def test_special_tokens_and_length_are_read_in_every_form(folder):
    changed = folder(
        "special_tokens_map.json",
        tokenizer_config={"pad_token": {"content": "a"}, "model_max_length": 20},
    )
    assert (stored()(["b"])[0, 1:3] == [65 + 256, 713]).all()
    tokenizer = Tokenizer.from_folder(changed)
    assert tokenizer.length == 20
    assert list(tokenizer(["b"])[0, 2:5]) == [713, 64, 64]


def test_what_the_files_do_not_say_is_clips(folder):
    changed = folder("special_tokens_map.json", "tokenizer_config.json")
    assert Tokenizer.from_folder(changed).fingerprint == stored().fingerprint
    silent = {"model_max_length": 1e30, "pad_token": None, "extra_special_tokens": {}}
    (changed / "tokenizer_config.json").write_text(json.dumps(silent))
    assert Tokenizer.from_folder(changed).fingerprint == stored().fingerprint


def test_added_tokens_are_one_id_each(folder):
    changed = folder("tokenizer.json", added_tokens={"<my-Cat>": 714})
    tokenizer = Tokenizer.from_folder(changed)
    assert tokenizer.vocab_size == 715
    assert list(tokenizer(["a<My-cat>a"])[0, 1:5]) == [64 + 256, 714, 64 + 256, 713]
    decoder = {"714": {"content": "<my-Cat>"}}
    (changed / "added_tokens.json").unlink()
    (changed / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert Tokenizer.from_folder(changed).fingerprint == tokenizer.fingerprint


def test_truncation_padding_and_merges_as_text_in_tokenizer_json_change_nothing(folder):
    content = json.loads((FOLDER / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content |= {
        "truncation": {"direction": "Left", "max_length": 5, "strategy": "LongestFirst"},
        "padding": {"strategy": {"Fixed": 9}},
        "post_processor": None,
    }
    assert Tokenizer.from_folder(folder(tokenizer=content)).fingerprint == stored().fingerprint


@pytest.mark.parametrize("tokenizer", [stored, small])
def test_a_saved_tokenizer_is_read_back_the_same(tokenizer, tmp_path):
    tokenizer = tokenizer()
    tokenizer.save(tmp_path / "a" / "b")
    files = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert files == {"tokenizer.json", "tokenizer_config.json"}
    back = Tokenizer.from_folder(tmp_path / "a" / "b")
    assert back.fingerprint == tokenizer.fingerprint
    texts = [*CAPTIONS, f"x {END} 猫"]
    np.testing.assert_array_equal(back(texts), tokenizer(texts))


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file"):
        small().save(tmp_path / "file")


def warnings_of(tokenizer: Tokenizer, texts: list[str], caplog) -> list[str]:
    caplog.clear()
    with caplog.at_level("WARNING", logger="absl"):
        tokenizer(texts)
    return [record.getMessage() for record in caplog.records]


def test_a_text_that_is_too_long_is_cut_with_one_warning(caplog):
    fits, long = "a red circle", "a red circle above a blue square"
    assert list(small().lengths([fits, long])) == [5, 9]
    messages = warnings_of(unused(8), [fits, long], caplog)
    assert messages == [
        "a text of 9 tokens is cut to the 8 that the text encoder takes, start and end included; "
        "left out: 'square'"
    ]
    ids = small(8)([long])[0]
    np.testing.assert_array_equal(ids[:7], small(9)([long])[0, :7])
    assert ids[7] == small().end_token


def test_a_text_that_is_cut_again_and_again_is_warned_of_once(caplog):
    tokenizer = unused(8)
    long, other = "a red circle above a blue square", "a blue circle above a red square"
    assert len(warnings_of(tokenizer, [long, long], caplog)) == 1
    assert warnings_of(tokenizer, [long], caplog) == []
    assert len(warnings_of(tokenizer, [long, other], caplog)) == 1
    np.testing.assert_array_equal(tokenizer([long]), small(8)([long]))


def test_what_is_left_out_is_shown_on_one_line_and_not_too_long(caplog):
    tail = "\n\x1b[31mCafé 猫 " + "word " * 500
    (message,) = warnings_of(unused(8), ["a red circle above a red" + tail], caplog)
    assert message.isprintable()
    assert r"left out: '\x1b[31mCafé 猫 word word" in message
    assert message.endswith("...'")
    assert len(message) < 320


def test_threads_may_share_a_tokenizer():
    texts = [f"the {i} dogs are playing in the garden" for i in range(100)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: stored()(texts), range(40)))
    for ids in answers:
        np.testing.assert_array_equal(ids, answers[0])


FORK = """
import os
from flowturbo_jax.tokenizer import Tokenizer
tokenizer = Tokenizer.learn(["a b c"] * 999, 600)
tokenizer(["a b"] * 999)
child = os.fork()
tokenizer(["a b"] * 999)
if not child:
    os._exit(0)
print(os.waitpid(child, 0)[1], tokenizer.fingerprint)
"""


def test_a_fork_says_nothing_and_another_process_learns_the_same():
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"0 {Tokenizer.learn(['a b c'] * 999, 600).fingerprint}\n"
    assert done.stderr == ""


def test_learning_merges_the_most_frequent_pairs_first():
    tokenizer = Tokenizer.learn(["aab aab aab", "cc cc"], 514 + 3, 20)
    assert tokenizer.vocab_size == 517
    # "aab" becomes a ab</w> and then aab</w>; both come before cc</w>.
    assert list(tokenizer(["aab cc ab"])[0, :6]) == [515, 513, 514, 512, 516, 516]


def test_a_learnt_vocabulary_has_the_form_of_clips():
    theirs = json.loads((FOLDER / "vocab.json").read_text())
    ours = Tokenizer.learn(CAPTIONS, 10_000)._vocabulary
    assert len(ours) < 700  # there are no more pairs
    assert list(ours)[:512] == sorted(theirs, key=theirs.get)[:512]
    assert list(ours)[-2:] == [START, END]
    assert list(ours.values()) == list(range(len(ours)))


def test_a_learnt_tokenizer_takes_what_it_has_never_seen():
    tokenizer = Tokenizer.learn(["a"], 514)
    ids = tokenizer(["Ünseen 猫 😀 \x00 9"])[0]
    assert (ids[:-1] >= 0).all()
    assert tokenizer.end_token not in ids[: tokenizer.lengths(["Ünseen 猫 😀 \x00 9"])[0] - 1]


@pytest.mark.parametrize(
    ("captions", "size", "message"),
    [
        ([], 600, "there are no captions"),
        (["a"], 513, r"vocab_size is 513; it must be an integer in 514\.\."),
        (["a"], 600.0, r"vocab_size is 600\.0"),
        (["a", 3], 600, "a text is a value of type int"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_learnt_of_is_refused(captions, size, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.learn(captions, size)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([3], "a text is a value of type int; give a string"),
        (["a", None], "a text is a value of type NoneType"),
        ([b"a"], "a text is a value of type bytes"),
        ("a red circle", "'a red circle' is one text where a list of texts is wanted"),
        (["\ud800\n"], r"the text '\\ud800\\n' is not valid Unicode"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_text_is_refused(texts, message):
    for method in (small(), small().lengths):
        with pytest.raises(InputError, match=message):
            method(texts)


MODEL = {"type": "BPE", "end_of_word_suffix": "</w>"}


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        (
            ("tokenizer.json", "vocab.json"),
            {},
            r"no vocab\.json; looked for tokenizer\.json, or vocab\.json and merges\.txt",
        ),
        (("tokenizer.json", "merges.txt"), {}, r"no merges\.txt; looked for"),
        ((), {"tokenizer": {"model": None}}, r"tokenizer\.json has no model"),
        ((), {"tokenizer": {"model": {"type": "WordPiece"}}}, "its type is 'WordPiece', not 'BPE'"),
        (
            (),
            {"tokenizer": {"model": {"type": "BPE"}}},
            "its end_of_word_suffix is 'None', not '</w>'",
        ),
        ((), {"tokenizer": {"model": MODEL}}, "has no vocabulary or no merges"),
        (
            (),
            {"tokenizer": {"model": MODEL | {"vocab": {}, "merges": ["a b c"]}}},
            "the merges hold 'a b c', where two tokens should be",
        ),
        (
            (),
            {
                "tokenizer": {
                    "model": MODEL | {"vocab": {"a": 0}, "merges": [["a", "a"]]},
                    "added_tokens": None,
                }
            },
            "the merges do not fit the vocabulary: it has no 'aa', which 'a a' needs",
        ),
        ((), {"tokenizer": {"added_tokens": [3]}}, "added_tokens of tokenizer.json are no list"),
        ((), {"tokenizer": {"added_tokens": [{"id": 1, "content": 2}]}}, "a special token is '2'"),
        (
            (),
            {"tokenizer": {"added_tokens": [{"id": 1, "content": START}]}},
            r"do not agree on the id of '<\|startoftext\|>'",
        ),
        ((), {"tokenizer": {"added_tokens": [{"id": 999, "content": "x-x"}]}}, "are not 0, 1, 2"),
        ((), {"tokenizer": {"added_tokens": [{"id": "714", "content": "x-x"}]}}, "are not 0, 1, 2"),
        (("tokenizer.json",), {"vocab": {"a": True}}, "are not 0, 1, 2"),
        (("tokenizer.json",), {"vocab": {"": 714}}, "the token '', which is no text"),
        (("tokenizer.json",), {"vocab": {"\ud800": 714}}, r"the token '\\ud800', which"),
        ((), {"special_tokens_map": {"bos_token": "[CLS]"}}, r"the vocabulary has no '\[CLS\]'"),
        ((), {"special_tokens_map": {"pad_token": 7}}, "a special token is '7'"),
        ((), {"special_tokens_map": {"pad_token": {}}}, "a special token is 'None'"),
        ((), {"special_tokens_map": {"additional_special_tokens": "x"}}, "'x' are no list"),
        ((), {"tokenizer_config": {"tokenizer_class": "T5Tokenizer"}}, "it is a 'T5Tokenizer'"),
        ((), {"tokenizer_config": {"model_max_length": 2}}, "the length is 2; it must be"),
        ((), {"tokenizer_config": {"model_max_length": "77"}}, "the length is '77'"),
        ((), {"tokenizer_config": {"added_tokens_decoder": {"x": "y"}}}, "no tokens by their ids"),
        ((), {"tokenizer_config": {"added_tokens_decoder": {"714": None}}}, "token is 'None'"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_folders_that_do_not_fit_are_refused_in_one_line(folder, without, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_folder(folder(*without, **changes))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b'{"a": ', "as JSON"),
        ("vocab.json", b"[]", "must hold a JSON object"),
        ("merges.txt", b"\xff\xfe", r"merges\.txt is no text in UTF-8"),
        ("merges.txt", b"t h\nth e", "it has no 'the', which 'th e' needs"),
        ("merges.txt", b"t h\nthe", "the merges hold 'the', where two tokens"),
        ("merges.txt", b"t h\n" * (1 << 20) + b"t", r"merges\.txt is too large"),
    ],
)
def test_damaged_files_are_refused_in_one_line(folder, name, content, message):
    damaged = folder("tokenizer.json")
    (damaged / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_folder(damaged)
    assert str(caught.value).isprintable()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_a_pipe_among_the_files_is_not_waited_for(folder):
    changed = folder("tokenizer.json", "merges.txt")
    os.mkfifo(changed / "merges.txt")
    with pytest.raises(InputError, match=r"it has no merges\.txt"):
        Tokenizer.from_folder(changed)


def test_a_tokenizer_that_an_encoder_cannot_take_is_refused():
    config = CLIPTextConfig(714, 8, 8, 1, 1, "gelu", end_token=713)
    check_fits(stored(), config)
    check_fits(small(8), config)
    with pytest.raises(InputError, match="714 ids, but the text encoder has embeddings of 713"):
        check_fits(stored(), CLIPTextConfig(713, 8, 8, 1, 1, "gelu", end_token=712))
    short = CLIPTextConfig(714, 8, 8, 1, 1, "gelu", end_token=713, max_length=76)
    with pytest.raises(InputError, match="texts of 77 tokens, but the text encoder takes 76"):
        check_fits(stored(), short)


def test_all_that_decides_on_ids_is_in_the_fingerprint():
    vocabulary, merges = stored()._vocabulary, stored()._merges

    def fingerprint(**changes) -> str:
        return Tokenizer(**{"vocabulary": vocabulary, "merges": merges} | changes).fingerprint

    assert fingerprint() == stored().fingerprint
    assert fingerprint(pad=END) == fingerprint(vocabulary=dict(reversed(vocabulary.items())))
    others = [
        fingerprint(length=76),
        fingerprint(pad="!"),
        fingerprint(unknown="!"),
        fingerprint(added=["!"]),
        fingerprint(merges=merges[:-1]),
        fingerprint(vocabulary=vocabulary | {"more": 714}),
    ]
    assert len({fingerprint(), *others}) == 7
