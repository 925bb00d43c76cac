"""What a run writes down, and what it does when that fails."""

import json
import resource

import numpy as np
import pytest

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.logbook import Logbook


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_last_checkpoint_are_made_again_not_twice(tmp_path):
    with Logbook(tmp_path) as logbook:
        for step in range(1, 5):
            logbook.scalars(step, {"loss": step}, {"detail": 0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "los')  # cut in the middle
        file.write(b"\n\xff\xfe\n")
    with Logbook(tmp_path, first_step=3) as logbook:
        logbook.scalars(3, {"loss": 9.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    assert lines_of(tmp_path)[0] == {"step": 1, "loss": 1.0, "detail": 0.0}
    assert lines_of(tmp_path)[2]["loss"] == 9.0


def test_tensorboard_can_read_what_was_written(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    assert masked_crc32c(b"") is not None
    with Logbook(tmp_path) as logbook:
        logbook.scalars(7, {"loss": 0.5})
        logbook.picture(7, "samples", np.zeros((4, 4, 3), np.uint8))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    while content:  # length, its checksum, event, its checksum
        size = int.from_bytes(content[:8], "little")
        events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
        content = content[12 + size + 4 :]
    tags = [value.tag for event in events for value in event.summary.value]
    assert tags == ["loss", "samples"]
    assert {event.step for event in events[1:]} == {7}


def test_a_full_disk_is_one_line_and_ends_at_once(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*; checkpoints are kept"):
        fill(tmp_path)
    assert all(line["step"] for line in lines_of(tmp_path)[:-1])


def fill(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Logbook(folder) as logbook:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            for step in range(1, 1000):
                logbook.scalars(step, {"loss": step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_place_that_is_taken_is_refused(tmp_path, name):
    if name == "tensorboard":
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"cannot write .*{name}"):
        Logbook(tmp_path)


def test_a_reader_that_went_away_ends_no_run(tmp_path, monkeypatch):
    def broken(text):
        raise BrokenPipeError

    monkeypatch.setattr("flowturbo_jax.logbook.tqdm.write", broken)
    with Logbook(tmp_path) as logbook:
        logbook.scalars(1, {"loss": 1})
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
