"""What a CLIP tokenizer's folder says, in either of the forms that transformers writes.

Source: transformers tokenization_utils_base.py, _from_pretrained; tokenizers, format of
  tokenizer.json.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.weights.json_file import MAX_JSON, read_json
from flowturbo_jax.weights.regular_file import read_start
from flowturbo_jax.weights.tensor import quoted

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
VOCABULARY, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
LENGTH = 77  # OpenAI's CLIP, and every Stable Diffusion
NO_LENGTH = 10**6  # transformers writes 10^30 where it knows of no limit
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
ROLES = {"bos_token": "start", "eos_token": "end", "pad_token": "pad", "unk_token": "unknown"}
FURTHER = ("additional_special_tokens", "extra_special_tokens")  # lists, or by name in an object
# What tokenizer.json has to say of its model, to be CLIP's.
BPE = {
    "type": ("BPE",),
    "end_of_word_suffix": ("</w>",),
    "continuing_subword_prefix": ("", None),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}

Merges = list[tuple[str, str]]


def read_folder(folder: Path) -> dict[str, Any]:
    """The arguments of a Tokenizer, from its folder.

    Returns:
      `vocabulary`, `merges`, `added` and `length`, and the special tokens that the folder names.

    Raises:
      InputError: a file is missing or damaged, or the tokenizer is of another kind.
    """
    if not os.path.isdir(folder):
        raise InputError("there is no such folder")
    if os.path.isfile(folder / TOKENIZER):
        vocabulary, merges, added = _one_file(read_json(folder / TOKENIZER))
    else:
        missing = [n for n in (VOCABULARY, MERGES) if not os.path.isfile(folder / n)]
        if missing:
            raise InputError(
                f"it has no {' and no '.join(missing)}; looked for {TOKENIZER}, or {VOCABULARY} "
                f"and {MERGES}"
            )
        vocabulary = read_json(folder / VOCABULARY)
        merges = [_pair(line) for line in _lines(folder / MERGES)]
        added = _read_if_there(folder / ADDED)
    settings = _settings(folder)
    added |= _numbered(settings.get("added_tokens_decoder", {}))
    for token, number in added.items():
        if vocabulary.setdefault(token, number) != number:
            raise InputError(f"the files do not agree on the id of {quoted(token)}")
    named = {role: settings.get(key) for key, role in ROLES.items()}
    further = [token for key in FURTHER for token in _listed(settings.get(key))]
    return {
        "vocabulary": vocabulary,
        "merges": merges,
        "added": [*added, *further],
        "length": _length(settings.get("model_max_length")),
        **{role: _content(token) for role, token in named.items() if token is not None},
    }


def _one_file(content: Mapping[str, Any]) -> tuple[dict[str, Any], Merges, dict[str, Any]]:
    """Vocabulary, merges and added tokens of a tokenizer.json, whatever else that says."""
    model = content.get("model")
    if type(model) is not dict:
        raise InputError(f"{TOKENIZER} has no model")
    for key, wanted in BPE.items():
        value = model.get(key)
        if value not in wanted:
            raise InputError(
                f"{TOKENIZER} is none of CLIP's: its {key} is {_shown(value)}, not {wanted[0]!r}"
            )
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if type(vocabulary) is not dict or type(merges) is not list:
        raise InputError(f"{TOKENIZER} has no vocabulary or no merges")
    added = content.get("added_tokens") or []
    if type(added) is not list or not all(type(token) is dict for token in added):
        raise InputError(f"the added_tokens of {TOKENIZER} are no list of tokens")
    numbers = {_content(token): token.get("id") for token in added}
    return vocabulary, [_pair(merge) for merge in merges], numbers


def _lines(path: Path) -> list[str]:
    """The merges of a merges.txt, without the line that names its version."""
    content = read_start(path, MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise InputError(f"{MERGES} is too large; at most {MAX_JSON} bytes are read")
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{MERGES} is no text in UTF-8") from error
    # Not every line that begins with "#" is a comment: "# 1" may be a merge.
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return [line for line in lines if line]


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, which is a pair or "first second"."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if type(pair) is not list or len(pair) != 2 or not all(type(t) is str and t for t in pair):
        raise InputError(f"the merges hold {_shown(merge)}, where two tokens should be")
    return pair[0], pair[1]


def _settings(folder: Path) -> dict[str, Any]:
    """What is said of special tokens and length."""
    settings = _read_if_there(folder / CONFIG)
    name = settings.get("tokenizer_class", CLASSES[0])
    if name not in CLASSES:
        raise InputError(f"it is a {_shown(name)}; supported is {CLASSES[0]}")
    if "added_tokens_decoder" in settings:
        return settings
    # Stable Diffusion 2 pads with "!" by this file, though the other one says otherwise.
    return settings | _read_if_there(folder / SPECIAL)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.isfile(path) else {}


def _numbered(tokens: Any) -> dict[str, int]:
    """Ids by token of an added_tokens_decoder, which has tokens by id."""
    if type(tokens) is not dict or not all(i.isdecimal() and len(i) < 10 for i in tokens):
        raise InputError("the added_tokens_decoder has no tokens by their ids")
    return {_content(token): int(i) for i, token in tokens.items()}


def _listed(tokens: Any) -> list[str]:
    tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens or []
    if type(tokens) is not list:
        raise InputError(f"the special tokens {_shown(tokens)} are no list of tokens")
    return [_content(token) for token in tokens]


def _content(token: Any) -> str:
    """A special token, which is a string or an object with a `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise InputError(f"a special token is {_shown(text)}; it must be a string")
    return text


def _length(given: Any) -> int:
    if given is None or (type(given) in (int, float) and given > NO_LENGTH):
        return LENGTH
    return given


def _shown(value: Any) -> str:
    return quoted(value if isinstance(value, str) else repr(value)[:80])
