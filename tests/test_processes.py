"""The same run on one device, on several, and in several processes."""

import shutil
import signal
import time

import jax
import numpy as np
import pytest
import train_runs
from test_faults import shape_of_state, steps_saved, wait_for

from flowturbo_jax import parallel, trainer
from flowturbo_jax.interfaces import InputError

RECIPE = {
    "steps": 8,
    "checkpoint_every": 4,
    "log_every": 1,
    "evaluate_every": 4,
    "evaluation_size": 20,  # does not fill its last chunk
    "horizontal_flip": True,
}
# Sums over the batch in another order; Adam's first steps amplify rounding near zero gradients.
CURVE, PARAMETERS = 1e-5, 5e-5


def start_together(recipe, workdir, count, *flags, devices=2):
    return [
        train_runs.start(recipe, workdir, *own, *flags, devices=devices)
        for own in train_runs.process_flags(count)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same run on 1 x 1, 1 x 4 and 2 x 2 processes x devices."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = train_runs.write_recipe(folder, **RECIPE)
    for name, devices in (("1x1", 1), ("1x4", 4)):
        code, _, errors = train_runs.run(recipe, folder / name, devices=devices)
        assert code == 0, errors
    ends = [train_runs.finish(p) for p in start_together(recipe, folder / "2x2", 2)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "resuming" not in ends[0][1]
    assert "step 1 " in ends[0][1]
    assert "step 1 " not in ends[1][1]  # only one process speaks
    return folder


def assert_alike(folder, other):
    """Equal curves and parameters but for rounding."""
    first, second = train_runs.metrics(folder), train_runs.metrics(other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=CURVE)
    like = shape_of_state(**RECIPE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=PARAMETERS),
        train_runs.final_state(folder, like),
        train_runs.final_state(other, like),
    )


@pytest.mark.slow
@pytest.mark.parametrize("other", ["1x4", "2x2"])
def test_more_devices_and_processes_train_the_same(runs, other):
    assert_alike(runs / "1x1", runs / other)


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "continued"), [("1x1", "1x4"), ("1x4", "1x1"), ("2x2", "1x1")])
def test_a_run_continues_on_another_number_of_devices(runs, tmp_path, begun, continued):
    shutil.copytree(runs / begun, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    shutil.rmtree(tmp_path / "run" / "model")
    devices = int(continued[-1])
    code, out, errors = train_runs.run(runs / "recipe.py", tmp_path / "run", devices=devices)
    assert code == 0, errors
    assert "resuming from step 4" in out
    assert_alike(tmp_path / "run", runs / continued)


@pytest.mark.slow
def test_a_request_to_one_process_stops_all_and_they_continue_together(tmp_path):
    fields = {**RECIPE, "steps": 100_000, "checkpoint_every": 100_000, "evaluate_every": 100_000}
    recipe = train_runs.write_recipe(tmp_path, **fields)
    processes = start_together(recipe, tmp_path / "run", 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, processes[0])
    time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, errors), (other_code, _, other_errors) = map(train_runs.finish, processes)
    assert (code, other_code) == (0, 0), errors + other_errors
    step = steps_saved(tmp_path / "run")
    assert f"stopped at step {step}; the same command continues the run" in out


@pytest.mark.slow
def test_processes_started_differently_are_all_refused(tmp_path):
    recipe = train_runs.write_recipe(tmp_path, **RECIPE)
    flags = train_runs.process_flags(2)
    processes = [
        train_runs.start(recipe, tmp_path / "run", *own, f"--config.seed={seed}")
        for seed, own in enumerate(flags)
    ]
    for code, _, errors in map(train_runs.finish, processes):
        assert code == 2
        assert "do not have the same recipe, data and teacher; start them alike" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all_with_a_line(tmp_path):
    recipe = train_runs.write_recipe(tmp_path, **RECIPE)
    here, there = train_runs.process_flags(2)
    processes = [
        train_runs.start(recipe, tmp_path / "run", *here),
        train_runs.start(recipe, tmp_path / "run", *there, "--config.data=nothing"),
    ]
    (code, _, errors), (other_code, _, other_errors) = map(train_runs.finish, processes)
    assert (code, other_code) == (2, 2)
    assert "error: unknown data set 'nothing'" in other_errors
    assert "error: the start failed in process 1; its message says why" in errors


@pytest.mark.slow
def test_an_unforeseen_error_in_one_process_ends_all_soon(tmp_path):
    recipe = train_runs.write_recipe(tmp_path, **RECIPE)
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)  # process 0 alone writes there
    begun = time.monotonic()
    for code, _, errors in map(train_runs.finish, start_together(recipe, tmp_path / "run", 2)):
        assert code == 2
        assert "Traceback" not in errors
    assert time.monotonic() - begun < 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", "", ""), "--num_processes is missing"),
        (("", "2", "0"), "--coordinator_address is missing"),
        (("h:1", "two", "0"), "--num_processes is 'two'; it must be a whole number"),
        (("h:1", "2", "2"), "--process_id is 2, but there are 2 processes; take 0 to 1"),
        (("h", "2", "0"), "--coordinator_address is 'h'; it must be host:port"),
        (("h:70000", "2", "0"), "--coordinator_address is"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parallel.join(*flags)


def test_a_launcher_that_started_several_processes_is_recognised(monkeypatch):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: called.append(options))
    for name, value in (("SLURM_STEP_NUM_TASKS", "1"), ("OMPI_COMM_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    parallel.join()
    assert called == []
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_STEP_NUM_TASKS", "8")
        parallel.join()
    with monkeypatch.context() as patch:
        patch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        parallel.join()
    with monkeypatch.context() as patch:
        patch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
        parallel.join()
    parallel.join("auto")
    assert len(called) == 4
    # Nothing that would keep JAX from finding the rest.
    assert all(options.keys() == {"shutdown_timeout_seconds"} for options in called)
    assert trainer.parallel.part() == (0, 1)
