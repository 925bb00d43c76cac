"""What training notices at every step: its input, its numbers, requests to stop."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from flowturbo_jax import data
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.train_config import TrainConfig
from flowturbo_jax.training_watch import Feed, Watch


class Torn(data.ArrayExamples):
    """Examples of which some cannot be read."""

    torn = (3,)

    def __getitem__(self, index):
        if index in self.torn:
            raise data.UnreadableError("it is torn")
        return super().__getitem__(index)


@pytest.fixture
def torn():
    examples = Torn(np.zeros((40, 8, 8, 1), np.float32), np.arange(40, dtype=np.int32) % 10)
    return data.DataSource("torn", examples, (8, 8, 1), ("x",) * 10, "")


def config(**fields):
    return TrainConfig.create(tiny.recipe(**fields))


def metrics(loss=1.0, signals=(0.0, 0.0)):
    return {"loss": jnp.asarray(loss), "signals": jnp.asarray(signals)}


def watch(tmp_path, feed=None, kept="the checkpoint of step 4 is kept"):
    source = data.open_source("digits")
    return Watch(config(), source, feed or Feed(config(), source, 0), tmp_path, lambda: kept)


def test_unreadable_examples_are_named_and_counted(torn, capsys):
    feed = Feed(config(unreadable_limit=0.1), torn, 0)
    for _ in range(10):  # two epochs of 40
        assert np.isfinite(feed.next(threading.Event())["data"]).all()
    assert capsys.readouterr().out == "cannot read example 3: it is torn\n"
    assert len(feed.unreadable) == 1


def test_too_many_unreadable_examples_are_an_error(torn):
    feed = Feed(config(unreadable_limit=0.02), torn, 0)
    step = data.order(torn, 40, config().seed, 0).tolist().index(3) // 8
    for _ in range(step):
        feed.next(threading.Event())
    with pytest.raises(InputError, match="1 of 40 examples of torn cannot be read"):
        feed.next(threading.Event())


def test_among_several_processes_a_failure_is_signalled_before_it_is_raised(
    torn, tmp_path, monkeypatch
):
    monkeypatch.setattr("flowturbo_jax.parallel.part", lambda: (1, 2))
    monkeypatch.setattr(Torn, "torn", tuple(range(10)))
    feed = Feed(config(unreadable_limit=0.1), torn, 0)
    going, batches = threading.Event(), []
    while feed.failure is None:
        batches.append(feed.next(going))
    assert batches[-1]["signals"][:, 1].all()  # a last batch, so that the others need not wait
    assert feed.next(going)["signals"][:, 1].all()
    looking = watch(tmp_path, feed)
    looking.see(1, metrics(), at_once=True)
    with pytest.raises(InputError, match="examples of torn cannot be read"):
        looking.see(2, metrics(signals=(0.0, 0.5)), at_once=True)
    with pytest.raises(InputError, match="another process cannot read its data"):
        watch(tmp_path).see(2, metrics(signals=(0.0, 0.5)), at_once=True)


def test_each_row_knows_its_place_in_the_whole_batch(torn, monkeypatch):
    whole = Feed(config(unreadable_limit=0.1), torn, 3).next(threading.Event())
    for index in range(2):
        monkeypatch.setattr("flowturbo_jax.parallel.part", lambda i=index: (i, 2))
        part = Feed(config(unreadable_limit=0.1), torn, 3).next(threading.Event())
        for name in ("data", "label", "index"):
            np.testing.assert_array_equal(part[name], whole[name][part["index"]])


def test_steps_are_looked_at_one_late_unless_asked(tmp_path):
    looking = watch(tmp_path)
    bad = metrics(loss=jnp.nan)
    assert not looking.see(1, bad, at_once=False)
    with pytest.raises(InputError, match=r"loss is nan at step 1, .*; the checkpoint of step 4"):
        looking.see(2, metrics(), at_once=False)
    with pytest.raises(InputError, match="at step 1,"):
        watch(tmp_path).see(1, bad, at_once=True)


def test_a_request_to_stop_is_heard_after_all_steps_were_looked_at(tmp_path):
    looking = watch(tmp_path)
    assert not looking.see(1, metrics(signals=(0.25, 0.0)), at_once=False)
    assert looking.see(2, metrics(), at_once=False)
    looking = watch(tmp_path)
    looking.see(1, metrics(signals=(0.25, 0.0)), at_once=False)
    with pytest.raises(InputError, match="at step 2,"):
        looking.see(2, metrics(loss=jnp.inf), at_once=False)


def test_looking_does_not_wait_for_the_step_just_made(tmp_path, as_users_run_it):
    looked = []

    class Slow:
        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            looked.append(self.step)
            return np.zeros(2, np.float32)

    looking = watch(tmp_path)
    for step in (1, 2, 3):
        looking.see(step, {"loss": np.float32(1), "signals": Slow(step)}, at_once=False)
        assert looked == list(range(1, step))


def test_the_feed_continues_at_any_step_without_repeating_or_skipping():
    source = data.open_source("digits")
    whole = Feed(config(), source, 0)
    labels = [whole.next(threading.Event())["label"] for _ in range(8)]
    resumed = Feed(config(), source, 5)
    for step in range(5, 8):
        np.testing.assert_array_equal(resumed.next(threading.Event())["label"], labels[step])
