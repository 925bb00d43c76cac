"""Hyper-parameters of a published CLIP text encoder, from the config.json beside its weights."""

from collections.abc import Mapping
from typing import Any

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import CLIPTextConfig
from flowturbo_jax.models.clip import ACTIVATIONS
from flowturbo_jax.weights.tensor import quoted

MODEL_TYPES = ("clip_text_model",)
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")  # the second has one more matrix
# transformers configuration_clip.py: its names, ours, and what it takes where a file is silent.
KEYS = {
    "vocab_size": ("vocab_size", 49408),
    "hidden_size": ("hidden_size", 512),
    "intermediate_size": ("intermediate_size", 2048),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 8),
    "max_position_embeddings": ("max_length", 77),
    "hidden_act": ("activation", "quick_gelu"),
    "layer_norm_eps": ("layer_norm_epsilon", 1e-5),
}
OLD_END_TOKEN = 2  # what transformers wrote before its pull request 24773, for any vocabulary
FIXED = {  # keys that would change the network, and the one form we have
    "pruned_heads": {},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
}
# Keys that do nothing to the states of a text: those of training, ids of the tokenizer's, and what
# transformers' PretrainedConfig writes for every model, generation of text included.
SILENT = """
    attention_dropout dropout initializer_factor initializer_range projection_dim bos_token_id
    pad_token_id sep_token_id decoder_start_token_id torch_dtype dtype transformers_version
    attn_implementation chunk_size_feed_forward finetuning_task gradient_checkpointing id2label
    label2id num_labels output_attentions output_hidden_states prefix problem_type return_dict
    task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class
    torchscript use_bfloat16 use_cache use_return_dict

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty low_memory max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""


def clip_config(given: Mapping[str, Any]) -> CLIPTextConfig:
    """The hyper-parameters of transformers' CLIPTextModel config.json.

    Raises:
      InputError: the config is of another model, or asks for something this library has not.
    """
    _check_class(given)
    given = {key: value for key, value in given.items() if not key.startswith("_")}
    for key, wanted in FIXED.items():
        if (value := given.get(key, wanted)) != wanted:
            raise InputError(f"the text encoder's {key} is {_shown(value)}; supported is {wanted}")
    known = {"model_type", "architectures", "eos_token_id", *KEYS, *FIXED, *SILENT.split()}
    if unknown := sorted(given.keys() - known):
        raise InputError(f"the text encoder's config has the unknown key {quoted(unknown[0])}")
    fields = {ours: given.get(key, default) for key, (ours, default) in KEYS.items()}
    if fields["activation"] not in tuple(ACTIVATIONS):
        raise InputError(
            f"the text encoder's hidden_act is {_shown(fields['activation'])}; supported are "
            f"{', '.join(ACTIVATIONS)}"
        )
    end_token = given.get("eos_token_id")
    if end_token in (None, OLD_END_TOKEN) and type(fields["vocab_size"]) is int:
        # Old configs say 2 though the tokenizer's end token is the last of the vocabulary, 49407:
        # there transformers takes the state of the highest id, which is the same.
        end_token = fields["vocab_size"] - 1
    return CLIPTextConfig(**fields, end_token=end_token)


def _check_class(given: Mapping[str, Any]) -> None:
    """Refuses the config of another model."""
    if (kind := given.get("model_type", MODEL_TYPES[0])) not in MODEL_TYPES:
        raise InputError(
            f"the text encoder's model_type is {_shown(kind)}; supported is {MODEL_TYPES[0]}, "
            "CLIP's text encoder alone"
        )
    classes = given.get("architectures") or [CLASSES[0]]
    for name in classes if isinstance(classes, list) else [classes]:
        if name not in CLASSES:
            raise InputError(
                f"the text encoder's config is of a {_shown(name)}; supported are "
                f"{', '.join(CLASSES)}"
            )


def _shown(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else f"{value!r:.80}"
