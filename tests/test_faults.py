"""What happens to a real train.py: it is killed, stopped, started twice, and continues."""

import os
import random
import signal
import time

import jax
import pytest
import tiny
import train_runs

from flowturbo_jax import data, run_folder, tasks, train_state, trainer, training_step
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.train_config import TrainConfig

# More, to search for a moment that does harm: FLOWTURBO_TEST_KILLS=20 python -m pytest -k killed
KILLS = int(os.environ.get("FLOWTURBO_TEST_KILLS", "3"))
STEPS = 80


def shape_of_state(**fields):
    """Any state of the tiny recipe."""
    config = TrainConfig.create(tiny.recipe(**fields))
    task = tasks.make_task(config, data.open_source("digits"))
    params = task.network.initialise(jax.random.key(0))
    return train_state.create(params, training_step.optimizer_of(config))


def wait_for(condition, process, seconds=120):
    """Waits until a condition holds; False if the process ended first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("nothing happened")


def steps_saved(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names), default=0)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_an_undisturbed_one(tmp_path):
    fields = {"steps": STEPS, "checkpoint_every": 1, "log_every": 10, "evaluate_every": 20}
    recipe = train_runs.write_recipe(tmp_path, **fields)
    code, _, errors = train_runs.run(recipe, tmp_path / "whole")
    assert code == 0, errors
    seed = time.time_ns()
    moments = random.Random(seed)
    killed, half_written = [], 0
    while len(killed) < KILLS:
        before = steps_saved(tmp_path / "run")
        # What is compiled is kept apart: a kill may damage it.
        process = train_runs.start(recipe, tmp_path / "run", compiled=str(tmp_path))
        # A random point of what is left, each run getting some way, then a random instant in it.
        goal = before + 1 + moments.randrange(max(2 * STEPS // KILLS, 2))
        alive = wait_for(lambda g=goal: steps_saved(tmp_path / "run") >= min(g, STEPS), process)
        time.sleep(moments.random() * 0.05)
        process.kill()
        train_runs.finish(process)
        if not alive:  # it came to its end first
            break
        killed.append(steps_saved(tmp_path / "run"))
        half_written += bool(list((tmp_path / "run" / "checkpoints").glob(".*")))
    assert killed, "the run ended before it was killed once"
    code, _, errors = train_runs.run(recipe, tmp_path / "run")
    assert code == 0, f"seed {seed}, killed at {killed}: {errors}"
    assert half_written or KILLS < 20, "no moment was one of saving, which takes most of the time"
    like = shape_of_state(**fields)
    whole = train_runs.final_state(tmp_path / "whole", like)
    train_runs.assert_same_bits(train_runs.final_state(tmp_path / "run", like), whole)
    assert train_runs.metrics(tmp_path / "run") == train_runs.metrics(tmp_path / "whole")
    for name in ("model", "samples"):
        assert (tmp_path / "run" / name).is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_says_how_to_go_on_and_exits_with_0(tmp_path, number):
    recipe = train_runs.write_recipe(tmp_path, steps=100_000, checkpoint_every=100_000)
    process = train_runs.start(recipe, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(number)
    code, out, errors = train_runs.finish(process)
    assert code == 0, errors
    step = steps_saved(tmp_path / "run")
    assert f"stopped at step {step}; the same command continues the run" in out
    assert step > 0
    assert not (tmp_path / "run" / "model").exists()


def test_two_runs_in_one_workdir_are_refused(tmp_path):
    with run_folder.reserved(tmp_path):
        with pytest.raises(InputError, match=rf"in use by process {os.getpid()} on .*--workdir"):
            trainer.train_and_evaluate(tiny.recipe(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert int(trainer.train_and_evaluate(tiny.recipe(), tmp_path).step) == 6


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    tmp_path, capsys
):
    recipe = tiny.recipe(checkpoint_every=2)
    whole = trainer.train_and_evaluate(recipe, tmp_path)
    file = next((tmp_path / "checkpoints" / "6" / "state").rglob("d/*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = trainer.train_and_evaluate(recipe, tmp_path)
    out = capsys.readouterr().out
    assert "the checkpoint of step 6 is damaged" in out
    assert "resuming from step 4" in out
    train_runs.assert_same_bits(again, whole)


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage

    def filling(path):
        full = (tmp_path / "checkpoints" / "4").is_dir()
        return usage(path)._replace(free=10) if full else usage(path)

    recipe = tiny.recipe(checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", filling)
        with pytest.raises(InputError, match=r"step 6 .* free; the checkpoint of step 4 is kept"):
            trainer.train_and_evaluate(recipe, tmp_path)
    whole = trainer.train_and_evaluate(recipe, tmp_path / "whole")
    train_runs.assert_same_bits(trainer.train_and_evaluate(recipe, tmp_path), whole)
