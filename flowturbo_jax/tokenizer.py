"""CLIP's tokenizer: texts to the ids that its text encoder takes.

A text is put in the form NFC, in lower case and with single spaces, and split into words: runs
of letters, single digits, runs of other characters, and endings such as 's. The UTF-8 bytes of a
word, the last one marked by `</w>`, are merged pair by pair in the order in which the pairs were
learnt, and each piece that is left has an id.

Source: Radford et al., arXiv 2103.00020, section 2.4; transformers tokenization_clip.py. Against
OpenAI's simple_tokenizer.py, HTML entities stay as they are.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import CLIPTextConfig
from flowturbo_jax.models.clip import MAX_SIZE, MAX_VOCABULARY
from flowturbo_jax.tokenizer_files import CONFIG, LENGTH, TOKENIZER, read_folder
from flowturbo_jax.weights.tensor import quoted

START, END = "<|startoftext|>", "<|endoftext|>"  # transformers tokenization_clip.py
WORD_END = "</w>"
# transformers tokenization_clip.py, after its special tokens, which are found before.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
BATCH = 256  # texts encoded at a time: what is known of each token takes far more than its id
SHOWN = 200  # characters of a text in a warning

TokenRows = Int32[np.ndarray, "texts length"]


class Tokenizer:
    """Texts to ids `[N, length]`: start, what the text says, end, and padding.

    Threads may share it: it changes nothing of itself but which texts it has warned of.

    Attributes:
      length: ids of every text, start and end included.
      vocab_size: how many ids there are.
      start_token: id that begins every text.
      end_token: id that ends it.
      pad_token: id that fills it up; CLIP's is the end token, Stable Diffusion 2's is 0.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        length: int = LENGTH,
        start: str = START,
        end: str = END,
        pad: str | None = None,
        unknown: str | None = None,
        added: Iterable[str] = (),
    ):
        """Builds a tokenizer of its tables.

        Args:
          vocabulary: ids 0, 1, 2, ... by token.
          merges: pairs of tokens to merge, the first ones first.
          length: ids of every text.
          start: token that begins every text.
          end: token that ends it.
          pad: token that fills it up; `end` if None.
          unknown: token for bytes that the vocabulary has not; `end` if None.
          added: further tokens which a text may hold as they are. Those named above always may, as
            in transformers: where "!" pads, the "!" of a text has its id.

        Raises:
          InputError: the tables do not fit each other.
        """
        if type(length) is not int or not 3 <= length <= MAX_SIZE:
            raise InputError(
                f"the length is {length!r:.80}; it must be an integer in 3..{MAX_SIZE}"
            )
        self._roles = (start, end, end if pad is None else pad, end if unknown is None else unknown)
        self._added = sorted({*self._roles, *added})
        _check_tables(vocabulary, merges, self._added)
        self._vocabulary, self._merges = dict(vocabulary), list(merges)
        self.length, self.vocab_size = length, len(vocabulary)
        self.start_token, self.end_token, self.pad_token = (
            self._vocabulary[token] for token in self._roles[:3]
        )
        self._warned_of: set[int] = set()  # hashes of texts that were cut
        self._encoder = _encoder(self._vocabulary, self._merges, self._roles, self._added)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads a tokenizer's folder as transformers or `save` writes it.

        Args:
          folder: with tokenizer.json, or vocab.json and merges.txt; special tokens and length are
            those of tokenizer_config.json and special_tokens_map.json where these are there.

        Raises:
          InputError: a file is missing or damaged, or the tokenizer is none of CLIP's.
        """
        try:
            return cls(**read_folder(Path(folder)))
        except InputError as error:
            raise InputError(f"no tokenizer can be read from {folder}: {error}") from error

    @classmethod
    def learn(cls, captions: Iterable[str], vocab_size: int, length: int = LENGTH) -> "Tokenizer":
        """A tokenizer whose merges are the most frequent pairs of the given texts.

        Args:
          captions: texts to learn of; the same ones give the same tokenizer.
          vocab_size: the most ids there may be; 514 are taken before the first merge.
          length: ids of every text.

        Raises:
          InputError: there are no captions, or they are no texts, or the sizes cannot be.
        """
        library = _library()
        letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        symbols = [*letters, *(letter + WORD_END for letter in letters)]
        least = len(symbols) + 2
        if type(vocab_size) is not int or not least <= vocab_size <= MAX_VOCABULARY:
            raise InputError(
                f"vocab_size is {vocab_size!r:.80}; it must be an integer in {least}.."
                f"{MAX_VOCABULARY}"
            )
        captions = _texts(list(captions))
        if not captions:
            raise InputError("there are no captions to learn a tokenizer of; give some texts")
        learner = _pipeline(library.models.BPE(end_of_word_suffix=WORD_END))
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            # Given beforehand, since the order of ids decides between pairs of equal frequency.
            special_tokens=symbols[len(letters) :],
            initial_alphabet=letters,
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        learner.train_from_iterator(captions, trainer)
        merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
        tokens = dict.fromkeys([*symbols, *("".join(pair) for pair in merges), START, END])
        return cls({token: i for i, token in enumerate(tokens)}, merges, length=length)

    def __call__(self, texts: Sequence[str]) -> TokenRows:
        """The ids of texts; one that is too long is cut, with a warning that shows what was cut.

        The same text is warned of once, however often it is asked for, as in training.

        Args:
          texts: N texts, of any characters.

        Returns:
          Ids `[N, length]` int32.

        Raises:
          InputError: they are no texts.
        """
        rows = np.full((len(texts), self.length), self.pad_token, np.int32)
        room = self.length - 2
        for row, text, encoding in zip(rows, texts, self._encoded(texts), strict=True):
            ids = encoding.ids
            if len(ids) > room and hash(text) not in self._warned_of:
                self._warned_of.add(hash(text))
                rest = text[encoding.offsets[room][0] :]
                logging.warning(
                    "a text of %d tokens is cut to the %d that the text encoder takes, start and "
                    "end included; left out: %s",
                    *(len(ids) + 2, self.length, _on_one_line(rest)),
                )
            ids = [self.start_token, *ids[:room], self.end_token]
            row[: len(ids)] = ids
        return rows

    def lengths(self, texts: Sequence[str]) -> Int32[np.ndarray, " texts"]:
        """How many ids texts would have uncut, start and end included, `[N]` int32.

        Raises:
          InputError: they are no texts.
        """
        return np.array([len(encoding.ids) + 2 for encoding in self._encoded(texts)], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over all that decides on ids, in hexadecimal; whatever files it came from."""
        tokens = sorted(self._vocabulary, key=self._vocabulary.__getitem__)
        content = [tokens, self._merges, self._roles, self._added, self.length]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers reads too.

        Raises:
          InputError: they cannot be written.
        """
        folder = Path(folder)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.length,
            **dict(zip(names, self._roles, strict=True)),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKENIZER).write_text(self._encoder.to_str(), encoding="utf-8")
            (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror}") from error

    def _encoded(self, texts: Sequence[str]) -> Iterator[Any]:
        """What the library makes of each text, without start and end."""
        texts = _texts(texts)
        for first in range(0, len(texts), BATCH):
            batch = list(texts[first : first + BATCH])
            yield from self._encoder.encode_batch(batch, add_special_tokens=False)


def check_fits(tokenizer: Tokenizer, config: CLIPTextConfig) -> None:
    """Refuses a tokenizer whose ids a text encoder cannot take.

    Raises:
      InputError: it has more ids than the encoder has embeddings, or longer texts.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the text encoder has embeddings of "
            f"{config.vocab_size}; give the tokenizer it was trained with"
        )
    if tokenizer.length > config.max_length:
        raise InputError(
            f"the tokenizer makes texts of {tokenizer.length} tokens, but the text encoder takes "
            f"{config.max_length}; give the tokenizer it was trained with"
        )


def _library() -> Any:
    """The package tokenizers."""
    try:
        import tokenizers  # here, since only models that take text need it
    except ImportError as error:
        raise InputError("texts need tokenizers; install it: pip install tokenizers") from error
    # Threads of its own, which a text needs not, would make it warn when the process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return tokenizers


def _pipeline(model: Any) -> Any:
    """CLIP's normalisation and splitting into words, before a model of merges."""
    library = _library()
    normalizers, splitters = library.normalizers, library.pre_tokenizers
    pipeline = library.Tokenizer(model)
    pipeline.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(library.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    pipeline.pre_tokenizer = splitters.Sequence(
        [
            splitters.Split(library.Regex(WORDS), behavior="removed", invert=True),
            splitters.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return pipeline


def _encoder(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    roles: tuple[str, str, str, str],
    added: list[str],
) -> Any:
    """The library's tokenizer of tables that have been checked."""
    library = _library()
    start, end, _, unknown = roles
    model = library.models.BPE(
        vocabulary,
        merges,
        unk_token=unknown,
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
        fuse_unk=False,
    )
    encoder = _pipeline(model)
    # Normalised: found in what has been put in lower case, whichever case the text has them in.
    tokens = [library.AddedToken(t, normalized=True, special=True) for t in added]
    encoder.add_special_tokens(tokens)
    # For others who read what `save` writes; here start and end are added without it.
    encoder.post_processor = library.processors.RobertaProcessing(
        (end, vocabulary[end]), (start, vocabulary[start]), False, False
    )
    encoder.decoder = library.decoders.ByteLevel()
    return encoder


def _check_tables(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Iterable[str]
) -> None:
    """Refuses tables that do not fit each other, at which the library would panic."""
    ids = list(vocabulary.values())
    if any(type(i) is not int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise InputError("the ids of the vocabulary are not 0, 1, 2, ... with each of them once")
    if len(ids) > MAX_VOCABULARY:
        raise InputError(f"the vocabulary has {len(ids)} tokens; at most {MAX_VOCABULARY} are read")
    for token in vocabulary:
        if not token or not _is_unicode(token):
            raise InputError(f"the vocabulary has the token {quoted(token)}, which is no text")
    for first, second in merges:
        for token in (first, second, first + second):
            if token not in vocabulary:
                raise InputError(
                    f"the merges do not fit the vocabulary: it has no {quoted(token)}, which "
                    f"{quoted(f'{first} {second}')} needs"
                )
    if missing := [token for token in added if token not in vocabulary]:
        raise InputError(f"the vocabulary has no {quoted(missing[0])}, which is a special token")


def _texts(texts: Sequence[str]) -> Sequence[str]:
    """The texts, after a check that they are."""
    if isinstance(texts, str):
        raise InputError(f"{quoted(texts)} is one text where a list of texts is wanted")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"a text is a value of type {type(text).__name__}; give a string")
        if not _is_unicode(text):
            raise InputError(
                f"the text {quoted(text)} is not valid Unicode: it has half a character"
            )
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _on_one_line(text: str) -> str:
    shown = repr(text.strip()[:SHOWN])
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 4]}...{shown[-1]}"
