"""The words every layer shares: array aliases, the flow contract, and the one error users see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, PyTree, UInt8

Latents = Float[Array, "batch *point"]  # a point on the path; [B, H, W, C] for images
Velocity = Float[Array, "batch *point"]  # dx/dt toward data, shaped like the point it moves
Time = Float[Array, ""]  # flow time: 0 = noise, 1 = data
BatchTime = Float[Array, " batch"]  # one flow time per sample
Labels = Int[Array, " batch"]
Rows = Int[Array, "batch *row"]  # labels [B], or token ids of text and negative text [B, 2, L]
Images = Float[Array, "batch height width channels"]  # pixels in [-1, 1]
ImageBytes = UInt8[Array, "batch height width channels"]
Condition = PyTree[Any]  # labels or text states, batch first
Memory = PyTree[Any]  # what guidance remembers of the last evaluation
Params = PyTree[Any]


class InputError(ValueError):
    """Something the caller gave cannot be used; the message says what, and what to do about it.

    Commands print the message as one line and exit with code 2.
    """


class Moment(NamedTuple):
    """A flow time, with what a flow prepared for it; a difference of two is that of their times.

    Attributes:
      t: flow time `[]`.
      prepared: what `Flow.prepare` made for it, a pytree.
    """

    t: Time
    prepared: Any

    def __sub__(self, other: "Moment") -> Time:
        return self.t - other.t


@jax.tree_util.register_pytree_node_class
class Timeless:
    """A part of what a flow prepares that is the same at all times, so it is kept once.

    Attributes:
      value: a pytree of arrays, without an axis of times; a Moment holds it as it is.
    """

    def __init__(self, value: Any):
        self.value = value

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        """What JAX takes it apart into."""
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> "Timeless":
        """What JAX puts it together from."""
        return cls(*children)


class Flow(NamedTuple):
    """The vector field a sampler integrates, as pure functions over arrays.

    The sampler knows no labels, text, networks or guidance: they are behind these functions. Where
    there is `prepare`, the others may be called with a Moment in place of the flow time t.

    Attributes:
      predict: `(x [B, ...], t []) -> memory`, evaluates the big network at flow time t.
      refine: `(x [B, ...], t [], memory) -> offset`, what to add to a remembered memory, by the
        small network; None when the flow has no refiner.
      drift: `(memory) -> velocity [B, ...]`, the velocity that moves x. Without guidance the
        memory is the velocity itself, which is the default.
      recall: `(memory, t []) -> memory`, what a memory counts as at flow time t, where that depends
        on t (guidance on part of the time); the memory itself by default.
      prepare: `(times [N]) -> prepared`, what depends on the times alone (embeddings, modulations),
        computed for all evaluations at once before the first of them: a pytree of arrays, stacked
        along a first axis `[N]`, but for what stands in a Timeless; None for nothing.
    """

    predict: Callable[[Latents, Time], Memory]
    refine: Callable[[Latents, Time, Memory], Memory] | None = None
    drift: Callable[[Memory], Velocity] = lambda memory: memory
    recall: Callable[[Memory, Time], Memory] = lambda memory, t: memory
    prepare: Callable[[Float[Array, " times"]], Any] | None = None


class State(NamedTuple):
    """What a sample block takes and returns.

    Attributes:
      x: the point on the path, `[B, ...]` float.
      memory: what the block before handed on (PAPER: "velocity handed on"), a pytree.
      history: for multistep blocks, the memories that the last K steps started from, behind a first
        axis `[K]`, the newest last; None in a schedule that has no such block.
    """

    x: Latents
    memory: Memory
    history: Memory | None = None
