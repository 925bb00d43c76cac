"""Endless batches that depend on (seed, step) alone, whichever process reads which part."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from flowturbo_jax.data.source import DataSource, Draw, Example, UnreadableError, mirror
from flowturbo_jax.interfaces import InputError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
READABLE = -1  # in a batch's "unreadable": the example is the one the order asked for
TRIES = 100  # neighbours tried in place of an example that cannot be read


def batches(
    source: DataSource,
    batch_size: int,
    seed: int,
    flip: bool = False,
    part: tuple[int, int] = (0, 1),
) -> "grain.MapDataset":
    """Makes endless batches; `batches(source, batch_size, seed)[step]` never changes.

    Every epoch is a new order in which each example appears exactly once. A batch may straddle
    two epochs, so none is ever short, and it may be larger than the data set. Random access
    costs no more than the batch's own examples, so a resumed run starts at its step at once.

    Args:
      source: where the examples come from.
      batch_size: examples per batch over all parts, B >= 1, a multiple of the number of parts.
      seed: >= 0; another seed is another, unrelated sequence of orders and of flips.
      flip: exchange left and right in half of the examples.
      part: `(i, n)`: only rows i, i + n, i + 2n, ... of every batch.

    Returns:
      A grain data set of numpy arrays that no accelerator has touched. Batch `step` is `{"data":
      [B / n, H, W, C] float32, "label": [B / n] int32, "unreadable": [B / n] int32}`, the last
      being -1, or the index of an example that could not be read and that its next readable
      neighbour stands in for. Labels have further axes where `source.label` says so.

    Raises:
      InputError: the batch size is below 1, the seed negative, or the source empty or with captions
        that are not tokenised.
    """
    size = _part_size(batch_size, part)
    return _examples(source, seed, flip)[part[0] :: part[1]].batch(size)


def stream(
    source: DataSource,
    batch_size: int,
    seed: int,
    flip: bool = False,
    part: tuple[int, int] = (0, 1),
    first_step: int = 0,
    threads: int = 4,
) -> Iterator[Batch]:
    """The batches of `batches` from first_step on, read ahead of time by threads.

    Args:
      source: as for `batches`, and so are batch_size, seed, flip and part.
      batch_size: see there.
      seed: see there.
      flip: see there.
      part: see there.
      first_step: the step whose batch comes first.
      threads: how many batches are read, decoded and cropped at once, and held ahead of time.

    Raises:
      InputError: as `batches`; or (while iterating) what reading raises.
    """
    import grain

    # A thread per batch: a thread per example takes three times as long where examples are small.
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    rest = batches(source, batch_size, seed, flip, part)[first_step:]
    return iter(rest.to_iter_dataset(ahead))


def order(source: DataSource, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The indices `[B]` of the examples in the batch of a step, without reading them."""
    import grain

    indices = grain.MapDataset.range(len(source.examples)).shuffle(_order_seed(seed)).repeat()
    return np.asarray([indices[step * batch_size + row] for row in range(batch_size)])


class Unreadable:
    """Counts the examples that could not be read, and says when they are too many.

    Args:
      source: where they are.
      limit: the largest fraction of the data set that may be unreadable, in [0, 1].
    """

    def __init__(self, source: DataSource, limit: float):
        self._source, self._limit = source, limit
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, indices: np.ndarray) -> list[str]:
        """Counts the examples of a batch's "unreadable"; returns a line for each new one.

        Raises:
          InputError: there are more than the limit allows.
        """
        new = sorted({int(i) for i in indices if i != READABLE} - self._seen)
        self._seen.update(new)
        lines = [f"cannot read {_reason(self._source, index)}" for index in new]
        total = len(self._source.examples)
        if len(self._seen) > self._limit * total:
            raise InputError(
                f"{len(self._seen)} of {total} examples of {self._source.name} cannot be read, "
                f"more than unreadable_limit {self._limit:g} allows; the last: {lines[-1]}; "
                "mend or remove them, or raise the limit"
            )
        return lines


def _reason(source: DataSource, index: int) -> str:
    try:
        source.examples[index]
    except UnreadableError as error:
        return f"{source.examples.name(index)}: {error}"
    return f"{source.examples.name(index)}: it could not be read before, and now it can"


def _part_size(batch_size: int, part: tuple[int, int]) -> int:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    if batch_size % part[1]:
        raise InputError(f"batch_size {batch_size} is not a multiple of {part[1]} processes.")
    return batch_size // part[1]


def _order_seed(seed: int) -> int:
    # grain orders epoch e by (seed + e), so neighbouring seeds would share all but one epoch;
    # hashed seeds do not.
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _examples(source: DataSource, seed: int, flip: bool) -> "grain.MapDataset":
    """Examples one by one, in the order of all epochs."""
    import grain  # here, because it takes a quarter of a second

    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}.")
    if source.captioned:
        raise InputError(f"{source.name} has captions; only text models train on it")
    if len(source.examples) == 0:
        raise InputError(f"data set {source.name!r} is empty, there is nothing to batch.")
    examples = grain.MapDataset.source(_Readable(source)).shuffle(_order_seed(seed)).repeat()
    if source.draw is None and not flip:
        return examples
    # By position in the order of all epochs: another flip in each epoch, the same in each run.
    draw_seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
    return examples.random_map(partial(_draw, source.draw or mirror, flip), seed=draw_seed)


def _draw(draw: Draw, flip: bool, example: Example, generator: np.random.Generator) -> Example:
    return {**draw(example, generator, flip), "unreadable": example["unreadable"]}


class _Readable:
    """Examples of which every one can be read: a neighbour stands in for one that cannot."""

    def __init__(self, source: DataSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source.examples)

    def __getitem__(self, index: Any) -> Example:
        index, count = int(index), len(self)
        for shift in range(min(TRIES, count)):
            try:
                example = self._source.examples[(index + shift) % count]
            except UnreadableError as error:
                reason = error
                continue
            return {**example, "unreadable": np.asarray(index if shift else READABLE, np.int32)}
        name = self._source.examples.name(index)
        raise InputError(
            f"{self._source.name}: neither {name} ({reason}) nor the examples after it can be read"
        )
