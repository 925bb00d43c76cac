"""One batch as callers sample it, with the program behind the call: what a benchmark measures."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from flowturbo_jax import path
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.plan import Plan


class Compiled(NamedTuple):
    """What compiling a program took, and what the compiler says of it.

    Attributes:
      trace_seconds: wall time from Python to what the compiler takes, in s.
      compile_seconds: wall time of the compiler, in s.
      memory_bytes: of arguments, results and everything in between; None where it does not say.
    """

    trace_seconds: float
    compile_seconds: float
    memory_bytes: int | None


class BatchCall:
    """Samples a batch: images, or latents of a model that has no VAE to decode them.

    Args:
      pipe: the model.
      plan: how to sample.
      batch_size: number of images.

    Attributes:
      labels: the classes in turn, `[B]` int32; of a model of texts the ids of empty ones,
        `[B, 2, L]` int32, which take as long as any.
      start: what noise is drawn from, seeds and indices `[B]` uint32; or where a program begins
        with noise, that.
      shows_images: whether the result is images.
    """

    def __init__(self, pipe: Generation, plan: Plan, batch_size: int):
        self.pipe, self.plan, self.batch_size = pipe, plan, batch_size
        description = pipe.model.description
        classes = max(description.predictor.num_classes, 1)
        in_turn = (np.arange(batch_size) % classes).astype(np.int32)
        self.labels = pipe.placeholders(batch_size) if pipe.takes_text else in_turn
        self.start: Any = (np.zeros(batch_size, np.uint32), np.arange(batch_size, dtype=np.uint32))
        # As the pipeline decides it.
        self.shows_images = description.vae is not None or description.image_shape[-1] in (1, 3)
        if not self.shows_images:
            seeds, indices = (jnp.asarray(numbers) for numbers in self.start)
            self.start = path.sample_noise(seeds, indices, description.predictor.shape)

    def __call__(self) -> jax.Array:
        """Images `[B, H, W, C]` uint8 or latents float32, perhaps still being computed."""
        if self.shows_images:
            return self.pipe(self.labels, seeds=0, **self.plan.settings)
        return self.pipe.sample_latents(self.start, self.labels, **self.plan.settings)

    def compile(self) -> None:
        """Makes the program, or loads it where programs are kept, so that no call waits for it."""
        if self.shows_images:
            self.pipe.compile(self.batch_size, **self.plan.settings)
        else:
            self._lower().compile()

    def compile_anew(self) -> Compiled:
        """Makes the program, whatever is kept on disk; where nothing is kept, calls find it."""
        with _nothing_kept():
            begin = time.perf_counter()
            lowered = self._lower()
            traced = time.perf_counter()
            program = lowered.compile()
            done = time.perf_counter()
        found, memory = program.memory_analysis(), None
        if found is not None:
            memory = found.argument_size_in_bytes + found.output_size_in_bytes
            memory += found.temp_size_in_bytes - found.alias_size_in_bytes
        return Compiled(traced - begin, done - traced, memory)

    @property
    def decoder_params(self) -> Any:
        """Parameters of the VAE's decoder by its name; empty where there is none."""
        vae = self.pipe.model.vae_params or {}
        return {name: half for name, half in vae.items() if name == "decoder"}

    def _lower(self) -> Any:
        plan, pipe = self.plan, self.pipe
        start = (self.decoder_params, *self.start) if self.shows_images else (self.start,)
        arguments = shapes_of((pipe.params, *start, self.labels, *plan.arguments))
        program = programs.sample_images if self.shows_images else programs.sample_latents
        return program.lower(
            *arguments,
            networks=programs.Networks(pipe.model),
            schedule=plan.schedule,
            guidance=plan.guidance,
        )


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes of a pytree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), tree)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Compiles what is compiled within, even where JAX's persistent cache has it."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
