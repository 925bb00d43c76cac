"""What generating images of classes and of texts share: one program from noise to bytes."""

from typing import Any

import jax
import jax.numpy as jnp

from flowturbo_jax.interfaces import ImageBytes, InputError, Latents
from flowturbo_jax.pipelines import programs
from flowturbo_jax.pipelines.editing import Editing, Seeds
from flowturbo_jax.pipelines.pipeline import GuidanceInterval, Wanted, in_batches
from flowturbo_jax.pipelines.plan import Plan, WantedSchedule
from flowturbo_jax.pipelines.requests import (
    check_batch_size,
    check_noise,
    seeds_and_indices,
)


class Generation(Editing):
    """New images, and edited ones, of what rows of an array say: labels, or tokens of texts."""

    def _generated(
        self, rows: Any, seeds: Seeds, first_index: int, plan: Plan, batch_size: int | None
    ) -> ImageBytes:
        """Samples one image per row of what is wanted."""
        self._check_shows_images()
        seeds, indices = seeds_and_indices(seeds, first_index, len(rows))

        def sampled(some: Any) -> ImageBytes:
            arguments = self._arguments(seeds[some], indices[some], rows[some], plan)
            return self._run(programs.sample_images, plan, arguments)

        return in_batches(sampled, len(rows), batch_size)

    def compile(
        self,
        batch_size: int,
        *,
        schedule: WantedSchedule = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> None:
        """Compiles the program of a batch size, so that no later `__call__` of it waits for that.

        Args:
          batch_size: number of images of the calls, or their `batch_size`.
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
        arguments = self._arguments(seeds, indices, self.placeholders(batch_size), plan)
        self._program(programs.sample_images, arguments, self._static(plan))

    def _arguments(self, seeds: Any, indices: Any, labels: Any, plan: Plan) -> tuple[Any, ...]:
        return (self.params, self._decoder, seeds, indices, labels, *plan.arguments)

    def sample_latents(
        self,
        noise: Latents,
        labels: Wanted,
        *,
        schedule: WantedSchedule = None,
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
        labels = self.rows(labels)
        if len(labels) != len(noise):
            raise InputError(f"{len(labels)} labels for {len(noise)} noises; one each is needed")
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        start = (self.params, noise, labels)
        return programs.sample_latents(*start, *plan.arguments, **self._static(plan))

    def check(
        self,
        labels: Wanted,
        schedule: WantedSchedule,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
    ) -> None:
        """Refuses what `__call__` would refuse, without sampling.

        Raises:
          InputError: a label, schedule or guidance the model cannot take.
        """
        self._check_shows_images()
        self.rows(labels)
        self.plan(schedule, guidance_scale, guidance, guidance_interval)
