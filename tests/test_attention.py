"""Attention: the formula, its precision, and which implementation is chosen where."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax.models.attention import attend, choose, for_device


def heads(shape=(2, 5, 3, 8), scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [(scale * rng.standard_normal(shape)).astype(dtype) for _ in range(3)]


def formula(q, k, v):
    """In float64, pair by pair."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            logits = q[b, :, n] @ k[b, :, n].T / np.sqrt(q.shape[3])
            weights = np.exp(logits - logits.max(1, keepdims=True))
            out[b, :, n] = weights / weights.sum(1, keepdims=True) @ v[b, :, n]
    return out


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 1, 1, 1), (3, 16, 2, 72)])
def test_attention_is_its_formula(shape):
    q, k, v = heads(shape)
    np.testing.assert_allclose(attend(*map(jnp.asarray, (q, k, v))), formula(q, k, v), atol=2e-6)


def test_there_may_be_other_numbers_of_keys_than_of_queries():
    q, _, _ = heads((2, 5, 3, 8))
    _, k, v = heads((2, 7, 3, 8))
    np.testing.assert_allclose(attend(*map(jnp.asarray, (q, k, v))), formula(q, k, v), atol=2e-6)


def test_a_causal_query_sees_no_later_key():
    q, k, v = heads((2, 5, 3, 8))
    out = attend(*map(jnp.asarray, (q, k, v)), causal=True)
    for place in range(5):
        seen = formula(q[:, place : place + 1], k[:, : place + 1], v[:, : place + 1])
        np.testing.assert_allclose(out[:, place : place + 1], seen, atol=2e-6)
    jnn = partial(jax.nn.dot_product_attention, is_causal=True)
    np.testing.assert_allclose(out, jnn(*map(jnp.asarray, (q, k, v))), atol=2e-6)


def test_gradients_through_a_causal_mask_are_those_of_jax_nn():
    given = [jnp.asarray(a) for a in heads()]

    def slopes(function):
        return jax.grad(lambda *qkv: jnp.square(function(*qkv)).sum(), argnums=(0, 1, 2))(*given)

    own = slopes(partial(attend, causal=True))
    reference = slopes(partial(jax.nn.dot_product_attention, is_causal=True))
    for a, b in zip(own, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_float64_is_float64_throughout():
    with jax.enable_x64(True):
        q, k, v = heads(dtype=np.float64)
        out = attend(*map(jnp.asarray, (q, k, v)))
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, formula(q, k, v), rtol=1e-13, atol=1e-14)


def test_logits_far_from_zero_overflow_nothing():
    q, k, v = heads(scale=40.0)
    out = np.asarray(attend(*map(jnp.asarray, (q, k, v))))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, formula(q, k, v), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("size", [64, 72])
def test_in_bfloat16_logits_and_softmax_are_in_float32(size):
    """Large logits that differ little: in bfloat16 they, or their scale, would be off by 0.4 %."""
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in heads((2, 64, 3, size), scale=3.0))
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    # Weights and result are bfloat16, which makes 2.8e-3 here; a scale rounded to bfloat16 makes
    # 5.7e-3 at heads of 72, and a softmax in bfloat16 1.5e-2.
    assert np.abs(np.asarray(out, np.float64) - formula(q, k, v)).mean() < 4e-3


def test_gradients_are_those_of_jax_nn():
    q, k, v = map(jnp.asarray, heads())

    def loss(function):
        return lambda *given: jnp.square(function(*given)).sum()

    own = jax.grad(loss(attend), argnums=(0, 1, 2))(q, k, v)
    reference = jax.grad(loss(jax.nn.dot_product_attention), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(own, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "size", "capability", "implementation", "why"),
    [
        ("cpu", jnp.bfloat16, 64, None, "xla", "cpu has no cuDNN"),
        ("tpu", jnp.bfloat16, 64, None, "xla", "tpu has no cuDNN"),
        ("gpu", jnp.float32, 72, "9.0", "xla", "not float32"),
        ("gpu", jnp.bfloat16, 72, "9.0", "cudnn", "heads of 72"),  # SiT-XL/2
        ("gpu", jnp.bfloat16, 72, "8.0", "cudnn", "heads of 72"),
        ("gpu", jnp.float16, 64, "8.9", "cudnn", "float16"),
        ("gpu", jnp.bfloat16, 72, "7.5", "xla", "this is 7.5"),
        ("gpu", jnp.bfloat16, 68, "9.0", "xla", "multiple of 8"),
        ("gpu", jnp.bfloat16, 136, "8.0", "xla", "up to 128, not 136"),
        ("gpu", jnp.bfloat16, 136, "9.0", "cudnn", "heads of 136"),
        ("gpu", jnp.bfloat16, 512, "9.0", "xla", "up to 256, not 512"),  # the VAE's
        ("gpu", jnp.bfloat16, 64, None, "xla", "none of NVIDIA's"),
    ],
)
def test_the_implementation_follows_device_dtype_and_head(
    platform, dtype, size, capability, implementation, why
):
    chosen, reason = choose(platform, dtype, size, capability)
    assert chosen == implementation
    assert why in reason


def test_an_amd_gpu_is_no_nvidia_gpu():
    device = types.SimpleNamespace(platform="gpu", compute_capability="gfx90a")
    assert for_device(device, jnp.bfloat16, 64) == ("xla", "the GPU is none of NVIDIA's")


def test_a_gpu_whose_jax_has_no_cudnn_says_why():
    if jax.default_backend() == "gpu":
        pytest.skip("this JAX has cuDNN")
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    chosen, reason = for_device(device, jnp.bfloat16, 64)
    assert chosen == "xla"
    assert reason.startswith("JAX has no cuDNN attention here: ")


@pytest.mark.gpu
def test_cudnn_attention_agrees_with_the_formula_on_a_gpu():
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in heads((4, 256, 16, 72)))
    chosen, reason = for_device(jax.devices()[0], jnp.bfloat16, 72)
    assert chosen == "cudnn", reason
    out = np.asarray(jax.jit(lambda *given: attend(*given, "cudnn"))(q, k, v), np.float32)
    assert np.abs(out - formula(q, k, v)).max() < 2e-2  # bfloat16 has 8 bits
