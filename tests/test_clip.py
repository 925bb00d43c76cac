"""CLIP's text encoder: parity with transformers, names, causality, precision, bad input."""

import dataclasses
import json
from functools import cache, partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flowturbo_jax import convert
from flowturbo_jax.clip_architecture import clip_config
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.model_directory import abstract_params
from flowturbo_jax.models import CLIPText, CLIPTextConfig
from flowturbo_jax.models.clip import ACTIVATIONS

# The reference's own float32 run is off its float64 run by 2e-6, ours by as much.
STATES = 2e-5
FOLDER = golden.FOLDER / "instaflow" / "pipeline" / "text_encoder"
TINY = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_layers": 2,
    "num_heads": 2,
    "activation": "quick_gelu",
    "end_token": 49,
    "max_length": 7,
}
SD1 = {  # Stable Diffusion 1's, CLIP ViT-L/14
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "activation": "quick_gelu",
    "end_token": 49407,
}
SD2 = SD1 | {  # Stable Diffusion 2's, OpenCLIP ViT-H/14 without its last layer
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_layers": 23,
    "num_heads": 16,
    "activation": "gelu",
}


@cache
def network():
    config = clip_config(json.loads((FOLDER / "config.json").read_text()))
    state, dropped = convert.with_known_names("clip", load_file(FOLDER / "model.safetensors"))
    assert dropped == []
    return CLIPText(config), convert.params_from_state("clip", config, state)


@cache
def stored() -> dict[str, np.ndarray]:
    return golden.arrays("clip/clip_text")


@cache
def tiny():
    encoder = CLIPText(CLIPTextConfig(**TINY))
    return encoder, jax.jit(encoder.initialise, compiler_options=golden.QUICK_COMPILE)(
        jax.random.key(0)
    )


@cache
def compiled(encoder: CLIPText):
    apply = jax.jit(encoder.apply, compiler_options=golden.QUICK_COMPILE)
    return lambda params, ids: apply({"params": params}, jnp.asarray(ids))


@cache
def answers():
    encoder, params = network()
    ids = jnp.asarray(stored()["input_ids"])
    states = jax.jit(encoder.apply)({"params": params}, ids)
    return states, encoder.pooled(states, ids)


def test_states_match_the_reference():
    states, pooled = answers()
    assert states.dtype == pooled.dtype == jnp.float32
    rows = states[stored()["hidden_rows"]]
    assert golden.deviation(rows, stored()["last_hidden_state"]) < STATES
    assert golden.deviation(rows[:2], stored()["last_hidden_state_f64"]) < STATES


def test_pooled_states_match_the_reference():
    assert golden.deviation(answers()[1], stored()["pooled"]) < STATES


def test_float64_reaches_the_reference_to_1e_9():
    with jax.enable_x64(True):
        encoder, params = network()
        encoder = CLIPText(encoder.config, dtype=jnp.float64)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        ids = jnp.asarray(stored()["input_ids"])
        states = jax.jit(encoder.apply)({"params": params}, ids)
        assert states.dtype == jnp.float64
        rows = states[stored()["hidden_rows"][:2]]
        assert golden.deviation(rows, stored()["last_hidden_state_f64"]) < 1e-9
        pooled = encoder.pooled(states, ids)
        assert golden.deviation(pooled, stored()["pooled_f64"]) < 1e-9


def test_the_state_of_the_first_end_token_stands_for_the_text():
    encoder, _ = tiny()
    states = jnp.arange(2 * 5 * 8, dtype=jnp.float32).reshape(2, 5, 8)
    ids = jnp.array(
        [[3, 49, 49, 49, 49], [3, 1, 2, 49, 0]]
    )  # padded with the end token, and with 0
    pooled = encoder.pooled(states, ids)
    np.testing.assert_array_equal(pooled, np.stack([states[0, 1], states[1, 3]]))


def test_official_weights_survive_the_round_trip_bit_for_bit():
    encoder, params = network()
    state = convert.state_from_params("clip", encoder.config, params)
    theirs = load_file(FOLDER / "model.safetensors")
    assert set(state) == set(theirs)
    for name, array in state.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_what_is_no_weight_is_left_out_by_name():
    theirs = load_file(FOLDER / "model.safetensors")
    positions = np.arange(77, dtype=np.int64)[None]
    extra = {
        "text_model.embeddings.position_ids": positions,
        "text_projection.weight": np.zeros((32, 32), np.float32),
    }
    kept, dropped = convert.with_known_names("clip", theirs | extra)
    assert set(kept) == set(theirs)
    assert dropped == list(extra)


def test_names_without_the_prefix_are_known():
    theirs = load_file(FOLDER / "model.safetensors")
    bare = {name.removeprefix("text_model."): array for name, array in theirs.items()}
    bare["embeddings.position_ids"] = np.arange(77)[None]
    kept, dropped = convert.with_known_names("clip", bare)
    assert set(kept) == set(theirs)
    assert dropped == ["embeddings.position_ids"]


def test_a_weight_under_both_names_is_refused():
    name = "final_layer_norm.weight"
    with pytest.raises(InputError, match=f"'text_model.{name}' twice"):
        convert.with_known_names("clip", {name: np.zeros(1), f"text_model.{name}": np.zeros(1)})


def test_missing_and_extra_weights_are_named():
    encoder, _ = network()
    state = load_file(FOLDER / "model.safetensors")
    del state["text_model.encoder.layers.1.mlp.fc2.bias"]
    state["visual_projection.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(InputError, match="do not fit this clip model") as caught:
        convert.params_from_state("clip", encoder.config, state)
    assert "layers.1.mlp.fc2.bias" in str(caught.value)
    assert "visual_projection.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "count"),
    [(SD1, 123_060_480), (SD2, 340_387_840)],  # transformers, sum of p.numel()
)
def test_published_encoders_have_as_many_parameters_as_published(fields, count):
    params = abstract_params(CLIPText(CLIPTextConfig(**fields)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    layers = jax.tree.leaves(params["layers"])
    assert {leaf.shape[0] for leaf in layers} == {fields["num_layers"]}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_later_tokens_do_not_change_earlier_states():
    encoder, params = tiny()
    ids = jnp.array([[1, 2, 3, 4, 5, 6, 7]])
    states = compiled(encoder)(params, ids)
    changed = compiled(encoder)(params, ids.at[0, 4].set(40))
    np.testing.assert_array_equal(states[:, :4], changed[:, :4])
    assert (jnp.abs(states - changed)[0, 4:].max(axis=-1) > 1e-3).all()
    short = compiled(encoder)(params, ids[:, :3])
    assert golden.deviation(short, states[:, :3]) < 1e-6


def test_the_texts_of_a_batch_do_not_touch_each_other():
    states, _ = answers()
    encoder, params = network()
    alone = jax.jit(encoder.apply)({"params": params}, jnp.asarray(stored()["input_ids"][3:4]))
    assert golden.deviation(alone, states[3:4]) < STATES


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + jax.scipy.special.erf(x / np.sqrt(2.0)))),
        ("quick_gelu", lambda x: x / (1 + jnp.exp(-1.702 * x))),
    ],
)
def test_activations_are_what_they_are_called(activation, formula):
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(ACTIVATIONS[activation](x), formula(x), atol=2e-6)


def test_the_activation_matters():
    ids = jnp.array([[1, 2, 3, 49]])
    quick, params = tiny()
    exact = CLIPText(dataclasses.replace(quick.config, activation="gelu"))
    states, other = (compiled(encoder)(params, ids) for encoder in (quick, exact))
    assert 1e-3 < golden.deviation(states, other) < 0.3


def test_bfloat16_is_off_by_its_rounding():
    encoder, params = network()
    half = CLIPText(encoder.config, dtype=jnp.bfloat16)
    rows = stored()["hidden_rows"]
    states = jax.jit(half.apply)({"params": params}, jnp.asarray(stored()["input_ids"][rows]))
    assert states.dtype == jnp.float32
    theirs = stored()["last_hidden_state"]
    error = np.linalg.norm(states - theirs) / np.linalg.norm(theirs)
    # bfloat16 rounds to 2^-9 of a value; the products of two layers add up to a few times that.
    assert 2**-10 < error < 8 * 2**-9


def test_gradients_are_the_slopes():
    with jax.enable_x64(True):
        encoder, params = tiny()
        encoder = CLIPText(encoder.config, dtype=jnp.float64)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)
        probe = jnp.asarray(rng.normal(size=(1, 4, 8)))

        @partial(jax.jit, compiler_options=golden.QUICK_COMPILE)
        @jax.value_and_grad
        def along(step):
            moved = jax.tree.map(lambda a, d: a + step * d, params, direction)
            return jnp.sum(encoder.apply({"params": moved}, jnp.array([[1, 2, 3, 49]])) * probe)

        slope = along(0.0)[1]
        step = 1e-6  # central differences are off by its square, and by rounding over it
        differences = (along(step)[0] - along(-step)[0]) / (2 * step)
        assert abs(slope - differences) < 1e-6 * abs(slope)


def test_the_program_does_not_grow_with_the_layers():
    def size(layers: int) -> int:
        encoder = CLIPText(CLIPTextConfig(**TINY | {"num_layers": layers}))
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        variables = {"params": abstract_params(encoder)}
        return len(str(jax.make_jaxpr(encoder.apply)(variables, ids)).splitlines())

    assert size(2) == size(12)


def test_ids_outside_of_the_vocabulary_do_not_pass_for_others():
    encoder, params = tiny()
    states = compiled(encoder)(params, [[1, 49, 3], [1, 50, 3]])
    assert jnp.isfinite(states[0]).all()
    assert jnp.isnan(states[1]).all()


def test_texts_that_are_too_long_are_refused():
    encoder, params = tiny()
    with pytest.raises(InputError, match="8 tokens long; this text encoder takes at most 7"):
        encoder.apply({"params": params}, jnp.zeros((1, 8), jnp.int32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size is 0; it must be an integer in 1\.\."),
        ({"hidden_size": 8.0}, r"hidden_size is 8\.0"),
        ({"hidden_size": 9}, "hidden_size 9 is not divisible by num_heads 2"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_heads": True}, "num_heads is True"),
        ({"max_length": "77"}, "max_length is '77'"),
        ({"activation": "relu"}, "activation is 'relu'; it must be one of quick_gelu, gelu"),
        ({"activation": ["gelu"]}, "activation is"),
        ({"end_token": 50}, "end_token is 50; it must be an id below vocab_size, 50"),
        ({"end_token": -1}, "end_token is -1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_hyper_parameters_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        CLIPTextConfig(**TINY | fields)
