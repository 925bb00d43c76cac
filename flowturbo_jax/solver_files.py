"""The learnt solvers of a model directory: `solvers/SCHEDULE.json`, found, read and written."""

import contextlib
import os
from pathlib import Path

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.learnt_solver import LearntSolver
from flowturbo_jax.schedule import Schedule

FOLDER = "solvers"


def place(directory: Path, schedule: Schedule) -> Path:
    """The file of a schedule's solver in a model directory."""
    return directory / FOLDER / f"{schedule}.json"


def of_model(directory: Path, schedule: Schedule, can_learn: bool = True) -> LearntSolver:
    """The solver that a model directory has for a schedule.

    Args:
      directory: of the model.
      schedule: a learnt one.
      can_learn: whether `solve` takes such a model, so that a message may advise it.

    Raises:
      InputError: it has none, or it is of another schedule or not consistent.
    """
    file = place(directory, schedule)
    if not file.is_file():
        there = ", ".join(map(str, learnt_schedules(directory))) or "none"
        advice = "take a schedule of E, H and P"
        if can_learn:
            advice = f"learn it: python -m flowturbo_jax solve {directory} --schedule={schedule}"
        raise InputError(
            f"the model in {directory} has no solver {schedule} (it has {there}); {advice}"
        )
    found = LearntSolver.read(file)
    if found.schedule != schedule:
        raise InputError(f"{file} is the solver of {found.schedule}; give it back its name")
    return found


def learnt_schedules(directory: Path) -> list[Schedule]:
    """The schedules that a model directory has solvers for, the cheapest first."""
    found = []
    for file in (directory / FOLDER).glob("*.json"):
        try:
            schedule = Schedule.parse(file.stem)
        except InputError:
            continue  # a file of the user's own
        if schedule.learnt and file == place(directory, schedule):
            found.append(schedule)
    return sorted(found, key=lambda one: (one.predictor_evaluations, one.steps, str(one)))


def write(directory: Path, solver: LearntSolver) -> Path:
    """Writes a solver into a model directory, whole or not at all.

    Args:
      directory: of the model.
      solver: to write; one of the same schedule is replaced.

    Returns:
      The file.

    Raises:
      InputError: it cannot be written.
    """
    file = place(directory, solver.schedule)
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        file.parent.mkdir(exist_ok=True)
        draft.write_text(solver.to_json())
        os.replace(draft, file)
    except OSError as error:
        with contextlib.suppress(OSError):  # as where there is no folder
            draft.unlink()
        raise InputError(
            f"cannot write {file}: {error.strerror}; copy the model to a place that can be "
            "written to"
        ) from error
    return file
