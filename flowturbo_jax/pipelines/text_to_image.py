"""From texts to images: text encoder, noise, sampler and decoding as one compiled program."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from flowturbo_jax.interfaces import ImageBytes, InputError
from flowturbo_jax.pipelines.generation import Generation
from flowturbo_jax.pipelines.pipeline import GuidanceInterval
from flowturbo_jax.pipelines.plan import WantedSchedule

Prompts = str | Sequence[str] | np.ndarray | jax.Array
SHOWN = 60  # letters of a text in a message


class TextToImage(Generation):
    """Images of what texts say, from a model directory: new ones, and edited ones.

    Wherever a method takes labels, it takes prompts: one text for each image, or what `tokens` made
    of prompts and negative prompts. Texts are encoded once, and the keys and values of all
    cross-attention computed once, whatever the number of steps.
    """

    takes_text = True

    def __call__(
        self,
        prompts: Prompts,
        *,
        negative_prompts: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] | np.ndarray = 0,
        first_index: int = 0,
        schedule: WantedSchedule = None,
        guidance_scale: float | jax.Array | None = None,
        guidance: str | None = None,
        guidance_interval: GuidanceInterval = None,
        batch_size: int | None = None,
    ) -> ImageBytes:
        """Samples one image per prompt.

        Image i depends on its prompts and noise alone, and its noise on (seed, index) alone.

        Args:
          prompts: what the images are to show: `[B]` texts, one text, or `tokens` of them.
          negative_prompts: what guidance leads away from, one for all or one each; the empty text
            if None. Without guidance they do nothing.
          seeds: one seed for all, whose images have the indices first_index, first_index + 1, ...;
            or one seed per image, each the first image of its seed.
          first_index: where the indices of a single seed start, to continue an earlier batch.
          schedule: which block makes each step, or "fast", "balanced" or "best" where the model
            was tuned; if None H1P5R3, or H1P6 where there is no refiner.
          guidance_scale: 1 is no guidance; the model's default if None.
          guidance: "paired", "official" (of all channels) or "none"; the model's default if None.
          guidance_interval: first and last flow time of guidance; all of the time if None.
          batch_size: images computed at a time, all if None. The last batch is filled up and cut,
            so other numbers of prompts compile nothing.

        Returns:
          Images `[B, H, W, C]` uint8 of the model's size; for another, see `at_size`.

        Raises:
          InputError: a prompt, seed, schedule, guidance or batch size the model cannot take.
        """
        if negative_prompts is not None or isinstance(prompts, str):
            prompts = self.tokens(prompts, negative_prompts)
        plan = self.plan(schedule, guidance_scale, guidance, guidance_interval)
        return self._generated(self.rows(prompts), seeds, first_index, plan, batch_size)

    def tokens(
        self, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None = None
    ) -> np.ndarray:
        """What every method takes in place of prompts, and the only way to give negative ones.

        A text that is too long for the encoder is cut, with a warning that shows what was cut.

        Args:
          prompts: one text, or `[B]`.
          negative_prompts: one for all, or one each; the empty text if None.

        Returns:
          Token ids `[B, 2, L]` int32, of a prompt and of its negative prompt.

        Raises:
          InputError: there are none, or they are no texts, or not as many of both.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise InputError("there are no prompts; give one text for each image")
        negative = "" if negative_prompts is None else negative_prompts
        if not isinstance(negative, str):
            negative = list(negative) if isinstance(negative, Iterable) else [negative]
            if len(negative) != len(prompts):
                raise InputError(
                    f"{len(negative)} negative prompts for {len(prompts)} prompts; give one, or "
                    "one for each"
                )
        _check_texts([*prompts, *([negative] if isinstance(negative, str) else negative)])
        ids = self.model.tokenizer(prompts)
        other = self.model.tokenizer([negative] if isinstance(negative, str) else negative)
        return np.stack([ids, np.broadcast_to(other, ids.shape)], axis=1)

    def at_size(self, height: int, width: int) -> "TextToImage":
        """The same model for images of another size; parameters and programs are shared.

        Args:
          height: in pixels, as width a multiple of 64 for Stable Diffusion's networks.
          width: in pixels.

        Raises:
          InputError: the networks cannot make images of that size.
        """
        description = self.model.description.resized(height, width)
        other = copy.copy(self)
        other.model = dataclasses.replace(self.model, description=description)
        other._ready, other._mapped = {}, {}
        return other

    def rows(self, wanted: Prompts) -> Any:
        if isinstance(wanted, jax.core.Tracer):
            return wanted
        if isinstance(wanted, str):
            wanted = [wanted]
        array = isinstance(wanted, np.ndarray | jax.Array)
        if not array or wanted.dtype.kind == "U":
            return self.tokens(wanted)
        encoder = self.model.description.text_encoder
        length = self.model.tokenizer.length
        if wanted.dtype != np.int32 or wanted.ndim != 3 or wanted.shape[1:] != (2, length):
            raise InputError(
                f"tokens are {wanted.dtype}{list(wanted.shape)}; wanted are texts, or what "
                f"`tokens` makes of them: int32[B, 2, {length}]"
            )
        ids = np.asarray(wanted)
        if not len(ids) or ids.min() < 0 or ids.max() >= encoder.vocab_size:
            raise InputError(f"token ids must be 0 to {encoder.vocab_size - 1}, of 1 or more texts")
        return ids

    def placeholders(self, count: int) -> np.ndarray:
        return self._no_rows(count)

    def _no_rows(self, count: int) -> np.ndarray:
        return np.repeat(self.tokens(""), count, axis=0)


def _check_texts(texts: Sequence[Any]) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"a prompt is {str(text)[:SHOWN]!r}, no text; give texts")
