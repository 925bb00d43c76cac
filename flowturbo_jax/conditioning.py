"""What a batch says its samples show, as training takes it: labels, token ids or text states."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import data, model_directory
from flowturbo_jax.interfaces import Condition, InputError, Params
from flowturbo_jax.model_directory import Model
from flowturbo_jax.models import CLIPTextConfig
from flowturbo_jax.tokenizer import Tokenizer

SAMPLES = 8  # prompts of the pictures on the way


class Conditioning(NamedTuple):
    """How a network is told what a sample shows.

    Attributes:
      source: the data set, whose batches hold in "label" what `embed` takes.
      frozen: what `null` and `embed` need beside the batch, as arguments of a program.
      null: `(frozen) -> row`, what says nothing; None where there is no such row.
      embed: `(frozen, rows [B, ...]) -> condition` of the networks.
      prompts: texts to sample pictures of; () where there are labels for that.
    """

    source: data.DataSource
    frozen: dict[str, Any]
    null: Callable[[dict[str, Any]], Any] | None
    embed: Callable[[dict[str, Any], Any], Condition]
    prompts: tuple[str, ...] = ()


def of_labels(network_config: Any, source: data.DataSource) -> Conditioning:
    """Labels, which networks take as they are; InputError for data without classes."""
    if source.captioned or source.label[0]:
        raise InputError(
            f"{source.name} has captions and no classes; train a model of texts on it, or give "
            "data with classes, such as folder:DIR"
        )
    label = network_config.null_label
    null = None if label is None else lambda frozen: label
    return Conditioning(source, {}, null, lambda frozen, rows: rows)


def of_new_texts(
    fields: dict[str, Any], source: data.DataSource, width: int
) -> tuple[Conditioning, Tokenizer, CLIPTextConfig]:
    """Token ids of a tokenizer that is learnt from the captions, for a text encoder to be trained.

    Args:
      fields: hyper-parameters of the text encoder, as CLIPTextConfig has them: num_layers,
        num_heads, and beside others vocab_size and max_length, which the tokenizer is made for.
      source: captioned data.
      width: of the states that the predictor takes.

    Raises:
      InputError: the data have no captions, or the hyper-parameters are wrong.
    """
    if not source.captioned:
        raise InputError(
            f"{source.name} has no captions; a predictor of texts is trained on pairs of image "
            "and caption, such as captions:DIR (cached text states are for refiners)"
        )
    fields = {"max_length": 77, **fields}
    try:
        captions = itertools.chain([""], data.captions_of(source))
        tokenizer = Tokenizer.learn(captions, fields.get("vocab_size", 1000), fields["max_length"])
        config = CLIPTextConfig(
            **{
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "activation": "gelu",
                **fields,
                "vocab_size": tokenizer.vocab_size,
                "end_token": tokenizer.end_token,
            }
        )
    except TypeError as error:
        raise InputError(f"config key model.text_encoder: {error}") from error
    empty = tokenizer([""])[0]
    made = Conditioning(
        _tokenised(source, tokenizer),
        {},
        lambda frozen: empty,
        lambda frozen, rows: rows,
        _samples(data.captions_of(source)),
    )
    return made, tokenizer, config


def of_texts(teacher: Model, directory: str, source: data.DataSource) -> Conditioning:
    """Token ids or cached text states, for networks that take the states of a trained encoder.

    Args:
      teacher: the model whose text encoder it is.
      directory: where it lies, for messages.
      source: captioned data, or cached latents with text states.

    Raises:
      InputError: the data have neither captions nor text states, or those of another encoder.
    """
    encoder = teacher.text_encoder

    def encoded(frozen: dict[str, Any], ids: Any) -> Condition:
        return encoder.apply({"params": frozen["text_encoder"]}, ids)

    empty = jnp.asarray(teacher.tokenizer([""]))
    if source.captioned:
        return Conditioning(
            _tokenised(source, teacher.tokenizer),
            {"text_encoder": teacher.text_encoder_params, "empty": np.asarray(empty[0])},
            lambda frozen: frozen["empty"],
            encoded,
            _samples(data.captions_of(source)),
        )
    text = None if source.latents is None else source.latents.text
    if text is None:
        raise InputError(
            f"{source.name} has no captions, and {directory} is a model of texts; give pairs of "
            "image and caption, such as captions:DIR, or latents:DIR encoded from such"
        )
    found = model_directory.text_fingerprint(teacher.text_encoder_params, teacher.tokenizer)
    if text.fingerprint != found:
        raise InputError(
            f"the text states in {source.latents.directory} were made with another text encoder "
            f"than that of {directory}; encode the captions again with --text-encoder={directory}"
        )
    states = jax.jit(encoder.apply)({"params": teacher.text_encoder_params}, empty)[0]
    return Conditioning(
        source,
        {"empty": np.asarray(states)},
        lambda frozen: frozen["empty"],
        lambda frozen, rows: rows.astype(jnp.float32),
        tuple(text.samples),
    )


def frozen_with(conditioning: Conditioning, predictor_params: Params | None) -> Any:
    """What a step is given of parameters that do not change; see `predictor_of`."""
    if not conditioning.frozen:
        return predictor_params
    return {"predictor": predictor_params, **conditioning.frozen}


def predictor_of(conditioning: Conditioning, frozen: Any) -> Params:
    """The predictor's parameters among those of `frozen_with`."""
    return frozen["predictor"] if conditioning.frozen else frozen


def _tokenised(source: data.DataSource, tokenizer: Tokenizer) -> data.DataSource:
    made = data.tokenised(source, tokenizer, tokenizer.fingerprint)
    return dataclasses.replace(made, captioned=False)


def _samples(captions: Any) -> tuple[str, ...]:
    """The first few different captions."""
    found = dict.fromkeys(itertools.islice(captions, 64 * SAMPLES))
    return tuple(itertools.islice(found, SAMPLES))
