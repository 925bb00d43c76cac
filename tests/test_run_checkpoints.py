"""Checkpoints of a run: whole or passed over, never half; what they hold comes back bit for bit."""

import json
import resource
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowturbo_jax import run_checkpoints
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.run_checkpoints import Checkpoints


class Pair(NamedTuple):
    count: jax.Array
    values: dict


def state(step: int) -> Pair:
    values = {"a": jnp.arange(6.0).reshape(2, 3) * step, "b": {"c": -jnp.zeros(3), "d": jnp.inf}}
    return Pair(jnp.asarray(step, jnp.int32), jax.tree.map(jnp.asarray, values))


def assert_same_bits(a, b):
    def check(x, y):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())

    jax.tree.map(check, a, b)


def saved(directory, steps=(2, 4)) -> None:
    checkpoints = Checkpoints(directory)
    for step in steps:
        checkpoints.save(step, state(step), {"seed": 0, "step": step})


def files_of(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    saved(tmp_path)
    again = Checkpoints(tmp_path)
    assert again.latest_step == 4
    assert again.config() == {"seed": 0, "step": 4}
    assert_same_bits(again.state(state(0)), state(4))


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path).latest_step is None
    assert Checkpoints(tmp_path / "none").latest_step is None
    assert not (tmp_path / "none").exists()


def test_only_the_newest_stay(tmp_path):
    saved(tmp_path, steps=(1, 2, 3, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "3"]


def test_a_step_is_not_saved_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(3), {})
    before = (tmp_path / "3" / "checksums.json").stat().st_ino
    checkpoints.save(3, state(5), {})
    assert (tmp_path / "3" / "checksums.json").stat().st_ino == before


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "empty"])
def test_damage_in_any_file_is_named_and_the_checkpoint_before_is_used(tmp_path, damage):
    saved(tmp_path / "whole")
    names = files_of(tmp_path / "whole" / "4")
    assert len(names) >= 5
    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", directory)
        file = directory / "4" / name
        content = bytearray(file.read_bytes())
        if damage == "remove":
            file.unlink()
        elif damage == "empty":
            if not content:
                continue
            file.write_bytes(b"")
        elif damage == "shorten":
            if not content:
                continue
            file.write_bytes(content[:-1])
        else:
            for place in {0, len(content) // 2, len(content) - 1} if content else ():
                changed = bytearray(content)
                changed[place] ^= 0x10
                file.write_bytes(changed)
                fault = run_checkpoints.find_fault(directory / "4")
                assert fault is not None, f"byte {place} of {name}"
                assert str(name) in fault
            if not content:
                file.write_bytes(b"x")
        lines = []
        checkpoints = Checkpoints(directory, report=lines.append)
        assert checkpoints.latest_step == 2, name
        assert_same_bits(checkpoints.state(state(0)), state(2))
        (line,) = lines
        assert "step 4 is damaged" in line
        assert str(name) in line
        assert "step 2 is used" in line
        assert (directory / "damaged-4").is_dir()  # nothing is thrown away
        checkpoints.save(4, state(4), {})
        assert Checkpoints(directory).latest_step == 4


def test_a_checkpoint_with_a_strange_file_is_passed_over(tmp_path):
    saved(tmp_path)
    (tmp_path / "4" / "state" / "more").write_text("x")
    lines = []
    assert Checkpoints(tmp_path, report=lines.append).latest_step == 2
    assert "state/more does not belong to it" in lines[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"config.json": 3}', '{"config.json": ["x", "y"]}', "\xff"]
)
def test_nonsense_among_the_checksums_is_a_fault(tmp_path, text):
    saved(tmp_path)
    (tmp_path / "4" / "checksums.json").write_bytes(text.encode("latin-1"))
    assert Checkpoints(tmp_path, report=[].append).latest_step == 2


def test_without_any_whole_checkpoint_nothing_begins_anew(tmp_path):
    saved(tmp_path)
    for step in (2, 4):
        (tmp_path / str(step) / "config.json").write_text("{}")
    for _ in range(2):  # a second start must not find an empty folder
        with pytest.raises(
            InputError, match=r"no checkpoint in .* is whole \(of 4, config.json has"
        ):
            Checkpoints(tmp_path)


def test_what_an_interrupted_save_left_is_ignored_and_removed(tmp_path):
    saved(tmp_path)
    shutil.copytree(tmp_path / "4", tmp_path / ".6")
    shutil.copytree(tmp_path / "2", tmp_path / ".old-1")
    assert Checkpoints(tmp_path).latest_step == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]


def test_another_tree_is_refused_with_the_difference(tmp_path):
    saved(tmp_path)
    other = state(0)._replace(values={"a": jnp.zeros((2, 4))})
    with pytest.raises(InputError, match=r"values\.a is \[2, 3\], not \[2, 4\]"):
        Checkpoints(tmp_path).state(other)


# Orbax closes its event loop at the first array that fails; tensorstore still reports the others to
# it, from threads, and Python can only say that nobody caught that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_while_saving_keeps_what_was_saved(tmp_path):
    saved(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    large = state(6)._replace(
        values={"a": np.random.default_rng(0).normal(size=(2, 300_000)), "b": {"c": 1, "d": 2}}
    )
    large = jax.tree.map(np.asarray, large)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond that
    try:
        with pytest.raises(
            InputError, match=r"cannot save the checkpoint of step 6 .* step 4 is kept"
        ):
            checkpoints.save(6, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
    assert_same_bits(Checkpoints(tmp_path).state(state(0)), state(4))
    checkpoints.save(6, state(6), {})  # and there is room again
    assert Checkpoints(tmp_path).latest_step == 6


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"0\.00 GB are free; the checkpoint of step 4 is kept"):
        Checkpoints(tmp_path).save(6, state(6), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]


def test_checksums_cover_every_file(tmp_path):
    saved(tmp_path)
    named = json.loads((tmp_path / "4" / "checksums.json").read_text())["files"]
    assert {*named, "checksums.json"} == {str(name) for name in files_of(tmp_path / "4")}
