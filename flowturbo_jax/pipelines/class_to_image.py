"""From labels to images: condition, noise, sampler and decoding as one compiled program."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flowturbo_jax.interfaces import ImageBytes, InputError
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.pipeline import ClassLabels, GuidanceInterval
from flowturbo_jax.pipelines.plan import WantedSchedule
from flowturbo_jax.pipelines.requests import check_labels


class ClassToImage(Generation):
    """Images of given classes from a model directory: new ones, and edited ones."""

    def __call__(
        self,
        labels: ClassLabels,
        *,
        seeds: int | Sequence[int] | np.ndarray = 0,
        first_index: int = 0,
        schedule: WantedSchedule = None,
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
            was tuned, which also says how to guide; if None H1P5R3, or H1P6 without a refiner.
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
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        return self._generated(self.rows(labels), seeds, first_index, plan, batch_size)

    def rows(self, labels: ClassLabels) -> Any:
        return check_labels(labels, self.model.description)

    def placeholders(self, count: int) -> np.ndarray:
        return np.zeros(count, np.int32)

    def _no_rows(self, count: int) -> np.ndarray:
        predictor = self.model.description.predictor
        if not predictor.num_classes:
            return np.zeros(count, np.int32)
        if predictor.null_label is None:
            raise InputError(
                "this model was trained without label dropout, so it paints classes only; give "
                "labels of what is to remain"
            )
        return np.full(count, predictor.null_label, np.int32)
