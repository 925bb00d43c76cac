"""The config.json of CLIP's text encoders, as transformers has written it over the years."""

import json

import golden
import pytest

from flowturbo_jax.clip_architecture import clip_config
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.models import CLIPTextConfig

TINY = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2}
# Stable Diffusion 2's text_encoder/config.json.
SD2 = {
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "vocab_size": 49408,
}


def test_stable_diffusion_2_is_read():
    assert clip_config(SD2) == CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=23,
        num_heads=16,
        activation="gelu",
        end_token=49407,
    )


def test_the_stored_config_is_read():
    file = golden.FOLDER / "instaflow" / "pipeline" / "text_encoder" / "config.json"
    config = clip_config(json.loads(file.read_text()))
    assert (config.vocab_size, config.end_token, config.num_layers) == (714, 713, 2)
    assert (config.activation, config.max_length) == ("quick_gelu", 77)


def test_what_a_config_does_not_say_is_transformers_default():
    assert clip_config({}) == CLIPTextConfig(
        vocab_size=49408,
        hidden_size=512,
        intermediate_size=2048,
        num_layers=12,
        num_heads=8,
        activation="quick_gelu",
        end_token=49407,
    )


@pytest.mark.parametrize(("given", "wanted"), [(2, 19), (None, 19), (19, 19), (7, 7)])
def test_an_old_end_token_is_the_last_of_the_vocabulary(given, wanted):
    assert clip_config({**TINY, "eos_token_id": given}).end_token == wanted


def test_keys_that_do_nothing_are_accepted():
    # transformers 5, CLIPTextConfig().to_dict(), and keys that version 4 wrote besides.
    silent = {
        "architectures": None,
        "chunk_size_feed_forward": 0,
        "dtype": None,
        "id2label": {"0": "LABEL_0"},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0},
        "max_length": 20,
        "min_length": 0,
        "num_beams": 1,
        "output_attentions": False,
        "output_hidden_states": False,
        "problem_type": None,
        "pruned_heads": {},
        "return_dict": True,
        "task_specific_params": None,
        "tie_word_embeddings": True,
        "top_k": 50,
        "torchscript": False,
        "use_bfloat16": False,
    }
    assert clip_config({**TINY, **silent}) == clip_config(TINY)


def test_the_class_with_a_projection_has_the_same_states():
    given = {**TINY, "architectures": ["CLIPTextModelWithProjection"]}
    assert clip_config(given) == clip_config(TINY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5'; supported is clip_text_model"),
        ({"model_type": "clip", "text_config": {}}, "model_type is 'clip'"),
        ({"architectures": ["T5EncoderModel"]}, "of a 'T5EncoderModel'; supported are CLIPText"),
        ({"architectures": [3]}, "of a 3; supported"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; supported are quick_gelu, gelu"),
        ({"hidden_act": {}}, "hidden_act is {}"),
        ({"rotary\n": 1}, r"the unknown key 'rotary\\n'"),
        ({"quantization_config": {}}, "the unknown key 'quantization_config'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is .*; supported is {}"),
        ({"is_decoder": True}, "is_decoder is True; supported is False"),
        ({"vocab_size": "20"}, "vocab_size is '20'"),
        ({"num_hidden_layers": None}, "num_layers is None"),
        ({"eos_token_id": [19]}, r"end_token is \[19\]"),
        ({"eos_token_id": 20}, "end_token is 20"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_configs_of_something_else_are_refused_in_one_line(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        clip_config({**TINY, **fields})
    assert str(caught.value).isprintable()
