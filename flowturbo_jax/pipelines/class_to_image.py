"""From labels to images: condition, noise, sampler and decoding as one compiled program."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax.interfaces import ImageBytes, InputError, Latents
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.editing import Editing
from flowturbo_jax.pipelines.pipeline import ClassLabels, GuidanceInterval, in_batches
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.requests import (
    check_batch_size,
    check_labels,
    check_noise,
    seeds_and_indices,
)
from flowturbo_jax.schedule import Schedule


class ClassToImage(Editing):
    """Images of given classes from a model directory: new ones, and edited ones."""

    def __call__(
        self,
        labels: ClassLabels,
        *,
        seeds: int | Sequence[int] | np.ndarray = 0,
        first_index: int = 0,
        schedule: str | Schedule | None = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
        batch_size: int | None = None,
    ) -> ImageBytes:
        """Samples one image per label.

        Image i depends on its label and noise alone, and its noise on (seed, index) alone.

        Args:
          labels: `[B]`, class numbers, or names such as "golden retriever".
          seeds: one seed for all, whose images have the indices first_index, first_index + 1, ...;
            or one seed per image, each the first image of its seed.
          first_index: where the indices of a single seed start, to continue an earlier batch.
          schedule: which block makes each step, or "fast", "balanced" or "best" where the model
            was tuned, which also says how to guide; H1P5R3 if None.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.
          batch_size: images computed at a time, all if None. The last batch is filled up and cut,
            so other numbers of labels compile nothing.

        Returns:
          Images `[B, H, W, C]` uint8.

        Raises:
          InputError: a label, seed, schedule, guidance or batch size the model cannot take.
        """
        self._check_shows_images()
        labels = check_labels(labels, self.model.description)
        seeds, indices = seeds_and_indices(seeds, first_index, len(labels))
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)

        def sampled(rows: Any) -> ImageBytes:
            arguments = self._arguments(seeds[rows], indices[rows], labels[rows], plan)
            return self._run(programs.sample_images, plan, arguments)

        return in_batches(sampled, len(labels), batch_size)

    def compile(
        self,
        batch_size: int,
        *,
        schedule: str | Schedule | None = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> None:
        """Compiles the program of a batch size, so that no later `__call__` of it waits for that.

        Args:
          batch_size: number of labels of the calls, or their `batch_size`.
          schedule: as in `__call__`, as are the rest.
          guidance_scale: any; it matters only where it turns guidance on.
          guidance: "paired", "official" or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.

        Raises:
          InputError: as `__call__`.
        """
        check_batch_size(batch_size)
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        seeds, indices = seeds_and_indices(0, 0, batch_size)
        arguments = self._arguments(seeds, indices, np.zeros(batch_size, np.int32), plan)
        self._program(programs.sample_images, arguments, self._static(plan))

    def _arguments(self, seeds: Any, indices: Any, labels: Any, plan: Plan) -> tuple[Any, ...]:
        return (self.params, self._decoder, seeds, indices, labels, *plan.arguments)

    def sample_latents(
        self,
        noise: Latents,
        labels: ClassLabels,
        *,
        schedule: str | Schedule | None = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> Latents:
        """Samples latents from given noise.

        Args:
          noise: `[B, H, W, C]` float32, the model's latent shape.
          labels: as in `__call__`, as are the rest.
          schedule: as in `__call__`, as are the rest.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.

        Returns:
          Latents `[B, H, W, C]` float32.

        Raises:
          InputError: as `__call__`, or the noise is of another shape.
        """
        noise = jnp.asarray(noise)
        check_noise(noise, self.model.description)
        labels = check_labels(labels, self.model.description)
        if len(labels) != len(noise):
            raise InputError(f"{len(labels)} labels for {len(noise)} noises; one each is needed")
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        start = (self.params, noise, labels)
        return programs.sample_latents(*start, *plan.arguments, **self._static(plan))

    def check(
        self,
        labels: ClassLabels,
        schedule: str | Schedule,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> None:
        """Refuses what `__call__` would refuse, without sampling.

        Raises:
          InputError: a label, schedule or guidance the model cannot take.
        """
        self._check_shows_images()
        check_labels(labels, self.model.description)
        self.plan(schedule, guidance_scale, guidance, guidance_interval)
