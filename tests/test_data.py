"""Data sets by name, and batches that depend on (seed, step) alone."""

import os
import subprocess
import sys

import numpy as np
import pytest

from flowturbo_jax import data
from flowturbo_jax.interfaces import InputError


@pytest.fixture(scope="module")
def digits():
    return data.open_source("digits")


def numbered(count):
    """A source of `count` examples whose only pixel, and label, is their index."""
    values = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1) / max(count, 1)
    examples = data.ArrayExamples(values, np.arange(count, dtype=np.int32))
    return data.DataSource("numbered", examples, (1, 1, 1), ("index",), examples.fingerprint())


def labels_of(source, batch_size, seed, steps):
    batches = data.batches(source, batch_size, seed)
    return np.stack([batches[step]["label"] for step in steps])


def test_digits_are_the_real_ones_in_the_pixel_range(digits):
    from sklearn.datasets import load_digits

    images, labels = data.arrays(digits)
    bunch = load_digits()
    assert (len(images), digits.shape, images.dtype) == (1797, (8, 8, 1), np.float32)
    np.testing.assert_array_equal((images[..., 0] + 1) * 8, bunch.images)
    np.testing.assert_array_equal(labels, bunch.target)
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert digits.class_names[labels[7]] == "seven"
    assert len(digits.class_names) == 10


def test_example_is_one_image_with_its_label(digits):
    example = digits.examples[5]
    assert isinstance(digits.examples, data.Examples)
    assert (example["data"].shape, example["data"].dtype) == ((8, 8, 1), np.float32)
    assert (example["label"].shape, example["label"].dtype) == ((), np.int32)
    with pytest.raises(IndexError):
        digits.examples[len(digits.examples)]


def test_examples_cannot_be_changed_by_who_reads_them(digits):
    with pytest.raises(ValueError, match="read-only"):
        digits.examples[0]["data"][:] = 0.0


def test_fingerprint_follows_the_content(digits):
    def fingerprint(change):
        images, labels = data.arrays(digits)
        return data.ArrayExamples(*change(images, labels)).fingerprint()

    def touch_a_pixel(images, labels):
        images[3, 2, 1, 0] += 0.125
        return images, labels

    def touch_a_label(images, labels):
        labels[3] += 1
        return images, labels

    assert data.open_source("digits").fingerprint == digits.fingerprint
    assert fingerprint(lambda images, labels: (images, labels)) == digits.fingerprint
    others = [touch_a_pixel, touch_a_label, lambda i, n: (i.reshape(-1, 4, 16, 1), n)]
    assert digits.fingerprint not in [fingerprint(change) for change in others]


@pytest.mark.parametrize("name", ["cifar", "", "Digits", "folders:digits"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(InputError, match=r"known: captions, digit_captions, digits, .*tfds"):
        data.open_source(name)


def test_digits_take_no_argument():
    with pytest.raises(InputError, match="'digits' alone"):
        data.open_source("digits:train")


def test_name_hands_its_argument_to_the_opener(monkeypatch):
    monkeypatch.setitem(data.OPENERS, "numbered", lambda argument, size: numbered(int(argument)))
    assert len(data.open_source("numbered:12").examples) == 12


def test_batch_holds_stacked_examples_in_numpy(digits):
    batch = data.batches(digits, 32, seed=0)[3]
    assert set(batch) == {"data", "label", "unreadable"}
    assert all(type(array) is np.ndarray for array in batch.values())
    assert (batch["data"].shape, batch["data"].dtype) == ((32, 8, 8, 1), np.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((32,), np.int32)


def test_data_and_label_stay_together():
    batch = data.batches(numbered(10), 25, seed=4)[1]
    # Pixels are label / 10 in float32; a wrong pair is off by at least 1.
    np.testing.assert_allclose(batch["data"].ravel() * 10, batch["label"], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 10, 32])
def test_every_epoch_shows_each_example_once(batch_size):
    count, epochs = 10, 6
    steps = range(-(-count * epochs // batch_size))
    stream = labels_of(numbered(count), batch_size, 0, steps).ravel()[: count * epochs]
    orders = stream.reshape(epochs, count)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(count), (epochs, 1)))
    assert len({tuple(order) for order in orders}) == epochs  # 10! orders: no two alike by chance


def test_batch_depends_on_seed_and_step_alone(digits):
    steps = [7, 0, 10**9, 56, 57]
    forwards = labels_of(digits, 16, 3, steps)
    backwards = labels_of(data.open_source("digits"), 16, 3, steps[::-1])[::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert len({tuple(labels) for labels in forwards}) == len(steps)


def test_batch_size_does_not_change_the_order_of_examples(digits):
    small, large = labels_of(digits, 8, 5, range(12)), labels_of(digits, 48, 5, range(2))
    np.testing.assert_array_equal(small.ravel(), large.ravel())


def test_neighbouring_seeds_share_no_epoch():
    count, epochs = 10, 8
    orders = [
        tuple(order)
        for seed in (0, 1, 2, 2**40)
        for order in labels_of(numbered(count), count, seed, range(epochs))
    ]
    assert len(set(orders)) == len(orders)  # 32 of 10! orders: equal by chance once in 7,000


def test_batches_never_end_and_reach_far_steps_at_once(digits):
    read = []

    class Counted:
        def __len__(self):
            return len(digits.examples)

        def __getitem__(self, index):
            read.append(index)
            return digits.examples[index]

        def name(self, index):
            return str(index)

    source = data.DataSource("counted", Counted(), digits.shape, digits.class_names, "")
    batches = data.batches(source, 64, seed=0)
    assert len(batches) > 10**15
    assert batches[10**12]["label"].shape == (64,)
    assert len(read) == 64


def test_batches_start_no_accelerator():
    # With a platform that does not exist, JAX fails as soon as anything asks for a device.
    program = """
import jax
from flowturbo_jax import data
batch = data.batches(data.open_source("digits"), 8, seed=0)[0]
assert batch["data"].shape == (8, 8, 8, 1)
try:
    jax.devices()
except RuntimeError:
    print("numpy only")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "nothing"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "numpy only\n", result.stderr


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_refused(digits, batch_size):
    with pytest.raises(InputError, match=f"got {batch_size}"):
        data.batches(digits, batch_size, seed=0)


def test_negative_seed_is_refused(digits):
    with pytest.raises(InputError, match="seed must not be negative"):
        data.batches(digits, 8, seed=-1)


def test_empty_source_is_refused():
    with pytest.raises(InputError, match="empty"):
        data.batches(numbered(0), 8, seed=0)


def test_stream_is_the_batches_from_a_step_on():
    source = numbered(10)
    batches = data.batches(source, 4, seed=1, flip=True)
    stream = data.stream(source, 4, 1, flip=True, first_step=5, threads=3)
    for step in range(5, 30):
        batch = next(stream)
        for name, array in batches[step].items():
            np.testing.assert_array_equal(batch[name], array)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_together_are_the_whole_batch(digits, parts):
    whole = data.batches(digits, 12, seed=2, flip=True)[9]
    for part in range(parts):
        rows = data.batches(digits, 12, seed=2, flip=True, part=(part, parts))[9]
        streamed = data.stream(digits, 12, 2, flip=True, part=(part, parts), first_step=9)
        for name, array in next(streamed).items():
            np.testing.assert_array_equal(array, whole[name][part::parts])
            np.testing.assert_array_equal(array, rows[name])


def test_half_of_the_examples_are_flipped_anew_in_each_epoch():
    ramp = np.broadcast_to(np.linspace(-1, 1, 4, dtype=np.float32)[:, None], (100, 1, 4, 1)).copy()
    examples = data.ArrayExamples(ramp, np.arange(100, dtype=np.int32))
    source = data.DataSource("ramps", examples, (1, 4, 1), ("index",), examples.fingerprint())
    plain, flipped = data.batches(source, 100, 0), data.batches(source, 100, 0, flip=True)
    falls = []
    for epoch in range(2):
        batch = flipped[epoch]
        np.testing.assert_array_equal(batch["label"], plain[epoch]["label"])
        falling = batch["data"][:, 0, 0, 0] > 0
        np.testing.assert_array_equal(
            np.where(falling[:, None], ramp[0, 0, ::-1, 0], ramp[0, 0, :, 0]),
            batch["data"][:, 0, :, 0],
        )
        falls.append(dict(zip(batch["label"].tolist(), falling.tolist(), strict=True)))
    assert 30 <= sum(falls[0].values()) <= 70  # of 100 coins: outside once in 100,000
    assert falls[0] != falls[1]


def test_order_names_the_examples_of_a_batch():
    source = numbered(10)
    for step in (0, 3, 10**6):
        np.testing.assert_array_equal(
            data.order(source, 7, 5, step), data.batches(source, 7, 5)[step]["label"]
        )


class Broken(data.ArrayExamples):
    """Numbered examples of which some cannot be read."""

    broken = (3, 4)

    def __getitem__(self, index):
        if index in self.broken:
            raise data.UnreadableError("it is torn")
        return super().__getitem__(index)


def broken_source(count=10):
    values = np.zeros((count, 1, 1, 1), np.float32)
    examples = Broken(values, np.arange(count, dtype=np.int32))
    return data.DataSource("torn", examples, (1, 1, 1), ("index",), examples.fingerprint())


def test_an_unreadable_example_is_replaced_and_told():
    source = broken_source()
    batch = data.batches(source, 10, seed=0)[0]
    indices = data.order(source, 10, 0, 0)
    expected = np.where(np.isin(indices, Broken.broken), 5, indices)
    np.testing.assert_array_equal(batch["label"], expected)
    told = np.where(np.isin(indices, Broken.broken), indices, data.READABLE)
    np.testing.assert_array_equal(batch["unreadable"], told)


def test_unreadable_examples_are_named_once_and_limited():
    unreadable = data.Unreadable(broken_source(), limit=0.1)
    assert unreadable.note(np.array([-1, 3, -1])) == ["cannot read example 3: it is torn"]
    assert unreadable.note(np.array([3, -1])) == []
    assert len(unreadable) == 1
    with pytest.raises(
        InputError, match=r"2 of 10 examples of torn .*unreadable_limit 0\.1 .*4: it"
    ):
        unreadable.note(np.array([4]))


def test_a_data_set_without_anything_readable_is_an_error(monkeypatch):
    monkeypatch.setattr(Broken, "broken", range(10))
    with pytest.raises(InputError, match="torn: neither example"):
        data.batches(broken_source(), 2, seed=0)[0]


def test_a_batch_that_does_not_split_over_processes_is_refused(digits):
    with pytest.raises(InputError, match="batch_size 9 is not a multiple of 2 processes"):
        data.batches(digits, 9, seed=0, part=(0, 2))
