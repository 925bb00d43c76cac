"""Scaled dot-product attention: cuDNN's fused kernel where it can, written out where it cannot."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Heads = Float[Array, "batch tokens heads size"]
KeyHeads = Float[Array, "batch keys heads size"]  # as many as queries in self-attention

IMPLEMENTATIONS = ("xla", "cudnn")
Chosen = str | tuple[tuple[int, str], ...]  # one of those for all heads, or one by head size
# What cuDNN's fused attention takes: NVIDIA, "cuDNN Frontend: Scaled Dot Product Attention".
HEAD_MULTIPLE, HEAD_LIMIT, HEAD_LIMIT_HOPPER = 8, 128, 256


def choose(
    platform: str, dtype: Any, head_size: int, compute_capability: str | None = None
) -> tuple[str, str]:
    """Which implementation a network is to use, and why.

    Args:
      platform: as `jax.default_backend()` names it.
      dtype: of queries, keys and values.
      head_size: width of a head.
      compute_capability: of an NVIDIA GPU, such as "9.0"; None where it is not known.

    Returns:
      "xla" or "cudnn", and the reason.
    """
    if platform not in ("gpu", "cuda"):
        return "xla", f"the {platform} has no cuDNN"
    if compute_capability is None:
        return "xla", "the GPU is none of NVIDIA's"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return "xla", f"cuDNN's attention takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    capability = float(compute_capability)
    if capability < 8:
        return "xla", f"cuDNN's attention needs compute capability 8.0, this is {capability}"
    limit = HEAD_LIMIT_HOPPER if capability >= 9 else HEAD_LIMIT
    if head_size % HEAD_MULTIPLE or head_size > limit:
        return "xla", (
            f"cuDNN's attention takes heads of a multiple of {HEAD_MULTIPLE} up to {limit}, "
            f"not {head_size}"
        )
    return "cudnn", f"{jnp.dtype(dtype).name} heads of {head_size}"


def for_device(device: Any, dtype: Any, head_size: int) -> tuple[str, str]:
    """`choose` for a device, and where that is cuDNN, whether JAX can have it here.

    Args:
      device: a `jax.Device`.
      dtype: of queries, keys and values.
      head_size: width of a head.

    Returns:
      "xla" or "cudnn", and the reason.
    """
    capability = getattr(device, "compute_capability", None)
    if not re.fullmatch(r"\d+\.\d+", str(capability)):  # an AMD GPU has a name there
        capability = None
    implementation, reason = choose(device.platform, dtype, head_size, capability)
    if implementation == "cudnn":
        heads = jax.ShapeDtypeStruct((1, HEAD_MULTIPLE, 1, head_size), dtype)
        try:
            jax.eval_shape(lambda h: attend(h, h, h, "cudnn"), heads)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            return "xla", f"JAX has no cuDNN attention here: {error}"
    return implementation, reason


def for_head(chosen: Chosen, head_size: int) -> str:
    """The implementation that heads of that size take.

    Args:
      chosen: one for heads of any size, or pairs of a head size and its own.
      head_size: width of a head.

    Raises:
      KeyError: nothing was chosen for that size.
    """
    return chosen if isinstance(chosen, str) else dict(chosen)[head_size]


def attend(
    q: Heads, k: KeyHeads, v: KeyHeads, implementation: str = "xla", causal: bool = False
) -> Heads:
    """Attention, `softmax(q k^T / sqrt(size)) v` for each head.

    "xla" writes it out: heads first, so that each product is one batched matrix product; softmax
    in float32 (float64 for float64), and divided by its sum only after the second product, where
    the array is smaller. On CPU that takes a third of the time of `jax.nn.dot_product_attention`
    (docs/speed.md). "cudnn" is that function's fused kernel.

    Args:
      q: queries `[B, T, N, H]` float.
      k: keys `[B, S, N, H]`, dtype of q.
      v: values, as k.
      implementation: one of IMPLEMENTATIONS; see `choose`.
      causal: each query sees the keys up to its own place only.

    Returns:
      `[B, T, N, H]`, dtype of q.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    exact = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    logits = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=exact)
    # Not q before the product: 72^-0.5 is 0.15 % off in bfloat16.
    logits = logits * jnp.asarray(q.shape[-1] ** -0.5, exact)
    if causal:
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(seen[None, None], logits, -jnp.inf)
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - highest)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("bnts,bnsh->bnth", weights.astype(v.dtype), v, preferred_element_type=exact)
    return jnp.swapaxes((mixed / total).astype(q.dtype), 1, 2)
