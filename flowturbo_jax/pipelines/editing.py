"""What can be done with images that are there: edit, inpaint, remove, and go back to noise."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import masks as mask_arrays
from flowturbo_jax.interfaces import ImageBytes, InputError, Latents
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.pipelines import edit_programs
from flowturbo_jax.pipelines.pipeline import (
    GuidanceInterval,
    Pipeline,
    Wanted,
    in_batches,
)
from flowturbo_jax.pipelines.plan import WantedSchedule
from flowturbo_jax.pipelines.requests import check_model_images, seeds_and_indices
from flowturbo_jax.sampler import INVERSION, check_reversible
from flowturbo_jax.schedule import Schedule

Seeds = int | Sequence[int] | np.ndarray


class Editing(Pipeline):
    """The tasks that start from images. Noise and batches are those of generation."""

    def edit(
        self,
        images: ImageBytes | np.ndarray,
        labels: Wanted,
        *,
        strength: float | jax.Array,
        source_labels: Wanted | None = None,
        inversion: WantedSchedule = None,
        seeds: Seeds = 0,
        first_index: int = 0,
        schedule: WantedSchedule = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
        batch_size: int | None = None,
    ) -> ImageBytes:
        """Takes images part of the way back to noise, and samples on under labels (SDEdit).

        All steps of the schedule are made on what is left of the way, so a small strength costs as
        much as a large one, and is integrated more finely.

        Args:
          images: `[B, H, W, C]` uint8 of the model's size.
          labels: of what they are to become, as in `__call__`, one each.
          strength: how far back, in [0, 1]: 0 gives the images (through the VAE, if there is one),
            1 forgets them. Another strength compiles nothing.
          source_labels: of what they are. If given, the way back is the flow's own, from data to
            noise, instead of mixing with noise: seeds do not matter then, and more of the image
            stays.
          inversion: the schedule of that way, of E, H, P and A, unguided; H1P11 if None.
          seeds: of the noise to mix with, as in `__call__`, as are the rest.
          first_index: where the indices of a single seed start.
          schedule: which block makes each step from there on.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.
          batch_size: images computed at a time, all if None.

        Returns:
          Images `[B, H, W, C]` uint8.

        Raises:
          InputError: as `__call__`, or images, strength or inversion are not such.

        Source: SDEdit (Meng et al. 2022), on the path of PAPER section 1; PAPER section 8.
        """
        images = self._given(images)
        labels = self._labels(labels, len(images))
        sources, way = None, None
        if source_labels is not None:
            sources = self._labels(source_labels, len(images))
            way = backwards(INVERSION if inversion is None else inversion)
        elif inversion is not None:
            raise InputError("inversion needs source_labels: what the images show")
        seeds, indices = seeds_and_indices(seeds, first_index, len(images))
        strength = check_strength(strength)
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        parameters = (self.params, self._vae_params())

        def edited(rows: Any) -> ImageBytes:
            given = (images[rows], None if sources is None else sources[rows], strength)
            noise = (seeds[rows], indices[rows])
            arguments = (*parameters, *given, *noise, labels[rows], *plan.arguments)
            return self._run(edit_programs.edit, plan, arguments, inversion=way)

        return in_batches(edited, len(images), batch_size)

    def inpaint(
        self,
        images: ImageBytes | np.ndarray,
        masks: Any,
        labels: Wanted,
        *,
        soften: float = 0,
        tries: int = 1,
        seeds: Seeds = 0,
        first_index: int = 0,
        schedule: WantedSchedule = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
        batch_size: int | None = None,
    ) -> ImageBytes:
        """Repaints a region of images; every other pixel stays as it is, to the last bit.

        Args:
          images: `[B, H, W, C]` uint8 of the model's size.
          masks: true or white = repaint: `[B, H, W]` or `[H, W]` (one for all), bool or uint8.
            An empty mask gives the image, a full one a new image.
          labels: of the whole pictures to be, as in `__call__`, one each.
          soften: pixels around the mask over which repainted and given picture are blended.
          tries: how often each step is made: all but the last are taken back with fresh noise, so
            that the new part can adapt to the known one. As many times the evaluations.
          seeds: as in `__call__`, as are the rest.
          first_index: where the indices of a single seed start.
          schedule: which block makes each step.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.
          batch_size: images computed at a time, all if None.

        Returns:
          Images `[B, H, W, C]` uint8.

        Raises:
          InputError: as `__call__`, or images, masks, soften or tries are not such.

        Source: PAPER section 8; RePaint (Lugmayr et al. 2022) for the tries.
        """
        images = self._given(images)
        masks = mask_arrays.as_masks(masks, images.shape)
        labels = self._labels(labels, len(images))
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        weights = mask_arrays.weights(masks, soften=soften)
        noise = seeds_and_indices(seeds, first_index, len(images))
        return self._repaint(images, weights, noise, labels, plan, tries, batch_size)

    def remove(
        self,
        images: ImageBytes | np.ndarray,
        masks: Any,
        labels: Wanted | None = None,
        *,
        margin: float | None = None,
        soften: float = 0,
        tries: int = 1,
        seeds: Seeds = 0,
        first_index: int = 0,
        schedule: WantedSchedule = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
        batch_size: int | None = None,
    ) -> ImageBytes:
        """Removes objects: repaints their masks and a margin around them.

        Args:
          images: as in `inpaint`, as are those not named here.
          masks: of the objects, from any segmentation tool.
          labels: of what remains; if None, the model is asked for no class in particular.
          margin: pixels that the masks are widened by, against the edges and shadows that masks
            leave; a 64th of the picture's side, rounded up, if None.
          soften: pixels around that over which both pictures are blended.
          tries: how often each step is made.
          seeds: of the noise.
          first_index: where the indices of a single seed start.
          schedule: which block makes each step.
          guidance_scale: with labels only.
          guidance: with labels only.
          guidance_interval: with labels only.
          batch_size: images computed at a time, all if None.

        Returns:
          Images `[B, H, W, C]` uint8; what is outside the masks, margin and blended edge stays.

        Raises:
          InputError: as `inpaint`, or there are no labels and the model knows no null class.
        """
        images = self._given(images)
        masks = mask_arrays.as_masks(masks, images.shape)
        if labels is None:
            asked = isinstance(guidance_scale, jax.core.Tracer) or guidance_scale not in (None, 1)
            if asked or guidance not in (None, "none") or guidance_interval is not None:
                raise InputError(
                    "without labels nothing can be guided; give labels, or no guidance"
                )
            labels = self._no_rows(len(images))
            guidance, guidance_scale = "none", None
        else:
            labels = self._labels(labels, len(images))
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        margin = default_margin(images.shape[1:]) if margin is None else margin
        weights = mask_arrays.weights(masks, margin, soften)
        noise = seeds_and_indices(seeds, first_index, len(images))
        return self._repaint(images, weights, noise, labels, plan, tries, batch_size)

    def invert(
        self,
        images: ImageBytes | np.ndarray,
        labels: Wanted,
        *,
        schedule: str | Schedule | LearntSolver = INVERSION,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
        batch_size: int | None = None,
    ) -> Latents:
        """The noise that images came from, by integrating the flow backwards.

        `sample_latents` of that noise under the same labels and guidance gives the images back, up
        to the error of both ways; under other labels it edits them.

        Args:
          images: `[B, H, W, C]` uint8 of the model's size.
          labels: of what they are, one each.
          schedule: of E, H, P and A; a refiner and a learnt solver go forward only.
          guidance_scale: as in `__call__`, but without a scale or a mode there is no guidance.
          guidance: "paired", "official" or "none".
          guidance_interval: first and last flow time of guidance; all of the time if None.
          batch_size: images computed at a time, all if None.

        Returns:
          Noise `[B, H, W, C]` float32, of the shape of the model's latents.

        Raises:
          InputError: as `__call__`, or images are not such, or the schedule refines.
        """
        images = self._given(images)
        labels = self._labels(labels, len(images))
        if guidance is None and guidance_scale is None:
            guidance = "none"
        way = backwards(schedule)
        plan = self.plan(way, guidance_scale, guidance, guidance_interval)
        parameters = (self.params, self._vae_params())

        def inverted(rows: Any) -> Latents:
            arguments = (*parameters, images[rows], labels[rows], *plan.arguments)
            return self._run(edit_programs.invert, plan, arguments)

        return in_batches(inverted, len(images), batch_size)

    def _repaint(
        self,
        images: np.ndarray,
        weights: np.ndarray,
        noise: tuple[np.ndarray, np.ndarray],
        labels: np.ndarray,
        plan: Any,
        tries: int,
        batch_size: int | None,
    ) -> ImageBytes:
        """Repaints images by how much of the new picture each pixel gets."""
        whole = isinstance(tries, numbers.Integral) and not isinstance(tries, bool)
        if not whole or tries < 1:
            raise InputError(f"tries is {tries!r}; it must be a positive whole number")
        parameters = (self.params, self._vae_params())

        def repainted(rows: Any) -> ImageBytes:
            given = (images[rows], weights[rows], *(part[rows] for part in noise), labels[rows])
            arguments = (*parameters, *given, *plan.arguments)
            return self._run(edit_programs.inpaint, plan, arguments, tries=int(tries))

        return in_batches(repainted, len(images), batch_size)

    def _given(self, images: Any) -> Any:
        self._check_shows_images()
        try:
            images = images if isinstance(images, jax.core.Tracer) else np.asarray(images)
        except ValueError as error:
            raise InputError("images are a list of several sizes; give one array") from error
        check_model_images(images, self.model.description)
        return images

    def _labels(self, labels: Wanted, count: int) -> Any:
        labels = self.rows(labels)
        if len(labels) != count:
            raise InputError(f"{len(labels)} labels for {count} images; one each is needed")
        return labels


def default_margin(shape: tuple[int, ...]) -> int:
    """By how many pixels `remove` widens masks of images `[H, W, C]`, if it is not told."""
    return math.ceil(max(shape[:2]) / 64)


def check_strength(strength: Any) -> Any:
    """A strength as float32.

    Args:
      strength: number, or an array `[]` of JAX.

    Raises:
      InputError: it is no number in [0, 1].
    """
    if isinstance(strength, jax.core.Tracer) and strength.ndim == 0:
        return strength.astype(jnp.float32)
    if isinstance(strength, jax.Array | np.ndarray) and strength.shape == ():
        strength = strength.item()
    number = isinstance(strength, numbers.Real) and not isinstance(strength, bool)
    if not number or not 0 <= strength <= 1:
        raise InputError(
            f"strength is {strength!r}; it must be a number from 0 (the image) to 1 (a new one)"
        )
    return np.float32(strength)


def backwards(schedule: str | Schedule | LearntSolver) -> Schedule:
    """A schedule that can go from data to noise; InputError if it is none."""
    if isinstance(schedule, LearntSolver):
        schedule = schedule.schedule
    return check_reversible(Schedule.parse(schedule))
