"""Matrix products in int8 or fp8, through qwix: smaller weights, faster where the hardware can.

Weights are quantized once, when a model is loaded, with a scale for each output channel; tokens as
they come, with a scale for each token, so that an image does not depend on the others of its batch.
A scale is the largest absolute value over that of the type: no data is needed.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import InputError, Params
from flowturbo_jax.model_directory import Model

KINDS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
BLOCKS = r"blocks/(attention/(qkv|out)|mlp/(up|down))"  # the layers of all tokens


class QuantizedKernel(NamedTuple):
    """What stands in place of a linear layer's kernel, which is about `values * scales`.

    Attributes:
      values: `[..., inputs, outputs]` int8 or float8_e4m3fn.
      scales: `[..., 1, outputs]` float32.
    """

    values: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedModel(Model):
    """A model whose networks multiply in int8 or fp8.

    Attributes:
      quantization: "int8" or "fp8".
      original: fingerprints of the weights that were quantized, which are this model's.
    """

    quantization: str
    original: Mapping[str, str | None]

    @property
    def fingerprints(self) -> dict[str, str | None]:
        return dict(self.original)


def check_kind(kind: str | None) -> str | None:
    """A kind of quantization that can be done here, or None for none.

    Raises:
      InputError: it is neither "int8" nor "fp8", or qwix is not installed.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"quantization is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind is not None:
        _qwix()
    return kind


def quantize(model: Model, kind: str) -> QuantizedModel:
    """A model whose transformer blocks multiply in int8 or fp8.

    Quantized are the linear layers of attention and of the MLP, where the time goes: two thirds of
    the weights. All else stays as it is, the VAE too. The embeddings and the final layer are 1 or
    2 % of the weights, and would cost about as much accuracy as all blocks do. The modulation of
    the blocks, a third, is computed for a few vectors only: there is no time to win, and its errors
    are the same for all tokens of an image. (Measured: tests/quantized.py --layers.)

    Args:
      model: as loaded.
      kind: "int8" or "fp8" (float8_e4m3fn), of weights and tokens.

    Returns:
      The model with other predictor and refiner modules and parameters; its fingerprints are those
      of the weights it was made of.

    Raises:
      InputError: another kind, qwix is not installed, the predictor has no transformer blocks, or
        the model is quantized already.
    """
    if isinstance(model, QuantizedModel):
        raise InputError(f"the model is quantized to {model.quantization} already; load it anew")
    networks: dict[str, Any] = {}
    for name in ("predictor", "refiner"):
        module, params = getattr(model, name), getattr(model, f"{name}_params")
        if module is not None:
            networks[name], networks[f"{name}_params"] = quantize_network(module, params, kind)
    kept = {field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}
    return QuantizedModel(**{**kept, **networks}, quantization=kind, original=model.fingerprints)


def quantize_network(
    module: nn.Module, params: Params, kind: str, layers: str = BLOCKS
) -> tuple[nn.Module, Params]:
    """A network that multiplies in int8 or fp8 in some layers, and its parameters.

    Args:
      module: one whose linear layers are `nn.Dense`.
      params: its parameters, float32; the layers of a loop may be stacked.
      kind: "int8" or "fp8".
      layers: regular expression of the paths of linear layers, such as "blocks/mlp/up".

    Returns:
      A module of a subclass, which equals that of another call for an equal module and kind; and
      parameters with a QuantizedKernel in place of each of those layers' kernels.

    Raises:
      InputError: another kind, qwix is not installed, or no layer has such a path.
    """
    check_kind(kind)
    found = []

    def leaf(path: Any, array: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not re.fullmatch(f"(?:{layers})/kernel", name):
            return array
        found.append(name)
        return _quantized(jnp.asarray(array), kind)

    quantized = jax.tree_util.tree_map_with_path(leaf, params)
    if not found:
        raise InputError(
            f"{type(module).__name__} has no layers that can be quantized; leave quantization out"
        )
    fields = (field.name for field in dataclasses.fields(module) if field.init)
    given = {name: getattr(module, name) for name in fields if name not in ("parent", "name")}
    return _quantized_class(type(module), kind)(**given), quantized


def cast(params: Params, dtype: Any) -> Params:
    """Parameters on the device in a dtype, but for quantized kernels, which stay as they are."""

    def leaf(value: Any) -> Any:
        return value if isinstance(value, QuantizedKernel) else jnp.asarray(value, dtype)

    return jax.tree.map(leaf, params, is_leaf=lambda value: isinstance(value, QuantizedKernel))


def _qwix() -> Any:
    try:
        import qwix  # here, since only quantized models need it, and it takes a second
    except ImportError as error:
        raise InputError(
            "quantization needs qwix; install it with  pip install 'qwix>=0.1.8,<0.2'  or leave "
            "quantization out"
        ) from error
    return qwix


@functools.partial(jax.jit, static_argnames="kind")
def _quantized(kernel: Float[Array, "*stack inputs outputs"], kind: str) -> QuantizedKernel:
    """A kernel, or several stacked, with a scale for each output channel.

    `qwix.quantize_params` would take the axis of a stack for that of the inputs.
    """
    axes = [axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2]
    found = _qwix().quantize(kernel, KINDS[kind], channelwise_axes=axes)
    return QuantizedKernel(found.qvalue, found.scale)


@functools.cache
def _quantized_class(network: type[nn.Module], kind: str) -> type[nn.Module]:
    """A network's subclass whose `apply` multiplies by quantized kernels.

    One for each class and kind: equal modules share a compiled program.
    """

    def apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_linear):
            return network.apply(self, *args, **kwargs)

    return type(f"{network.__name__}_{kind}", (network,), {"apply": nn.nowrap(apply)})


def _linear(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """What any module's method gives; `nn.Dense.__call__`, where its kernel is quantized."""
    layer = context.module
    if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
        return call(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    if not isinstance(kernel, QuantizedKernel):
        return call(*args, **kwargs)
    out = _product(*args, kernel)
    if layer.use_bias:
        bias = layer.get_variable("params", "bias").astype(out.dtype)
        out = out + jnp.broadcast_to(bias, out.shape)
    return out.astype(layer.dtype)


@jax.custom_jvp
def _product(
    x: Float[Array, "*rows inputs"], kernel: QuantizedKernel
) -> Float[Array, "*rows outputs"]:
    """The product in the kernel's type, summed in int32 or float32; every row has a scale.

    Rounding has no slope, so its derivative by x is that of the product it stands for; the kernel
    is not trained.
    """
    qwix, last = _qwix(), x.ndim - 1
    rows = qwix.quantize(x.astype(jnp.float32), kernel.values.dtype, channelwise_axes=range(last))
    columns = qwix.QArray(kernel.values, kernel.scales)
    # qwix multiplies sums in int32 by scales in float32, which strict dtype promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return qwix.dot_general(rows, columns, (((last,), (0,)), ((), ())))


@_product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, _) = primals, tangents
    weights = kernel.values.astype(jnp.float32) * jnp.broadcast_to(
        kernel.scales, kernel.values.shape
    )
    return _product(x, kernel), dx.astype(jnp.float32) @ weights
