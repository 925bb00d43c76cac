"""Learnt solvers as a search would leave them, in files and beside models, good and edited."""

import json

import numpy as np
import tiny

import flowturbo_jax as ft
from flowturbo_jax import model_directory, solver_files
from flowturbo_jax.learnt_solver import LearntSolver, Numbers
from flowturbo_jax.model_description import Preset
from flowturbo_jax.multistep import Solver
from flowturbo_jax.schedule import Schedule

TEXTS = ["S1", "S5", "H1S3", "S2R1", "(S1R1)x2", "H1P3@learnt", "H1A3x2@learnt", "E1S1P1S1R2"]
FIRST = ("numbers", 0)


def numbers_of(text, scale=1.5, seed=0):
    """Some numbers of a learnt schedule, as a search would leave them."""
    schedule, rng = Schedule.parse(text), np.random.default_rng(seed)
    lengths = rng.uniform(0.5, 1, schedule.steps)
    times = np.concatenate([[0], np.cumsum(lengths / lengths.sum())])
    weights = rng.normal(0, 0.3, (schedule.steps, max(schedule.remembered, 1)))
    weights[:, -1] += 1 - weights.sum(axis=1)
    weights[0] = np.eye(weights.shape[1])[-1]
    for i, row in enumerate(weights):
        row[-1] += row[: max(len(row) - i - 1, 0)].sum()
    found = Solver(times, weights if schedule.learns_weights else None)
    return Numbers.of_arrays(schedule, scale, found, {"held_out_rmse": 0.03, "steps": 300})


def solver_of(text="S3", scales=(1.5,), **fields):
    each = tuple(numbers_of(text, scale, seed) for seed, scale in enumerate(scales))
    schedule = Schedule.parse(text)
    defaults = {
        "guidance": "paired",
        "guidance_interval": None,
        "predictor_sha256": "a" * 64,
        "refiner_sha256": "b" * 64 if schedule.needs_refiner else None,
        "card": {"seed": 3, "versions": {"jax": "0.0"}},
    }
    return LearntSolver(schedule, numbers=each, **{**defaults, **fields})


def made_for(pipe, text, scales=(1.5,), **fields):
    """One whose fingerprints are a model's."""
    sha256 = pipe.model.fingerprints
    refiner = sha256["refiner"] if Schedule.parse(text).needs_refiner else None
    prints = {"predictor_sha256": sha256["predictor"], "refiner_sha256": refiner}
    return solver_of(text, scales, **{**prints, **fields})


def saved_with_solvers(directory):
    """A tiny model with the solvers S3, S2R1 and H1P2@learnt, and the preset fast, which is S3."""
    tiny.save_model(directory)
    model_directory.write_schedules(directory, {"fast": Preset("S3", "paired")})
    pipe = ft.ClassToImage.load(directory)
    for text in ("S3", "S2R1", "H1P2@learnt"):
        solver_files.write(directory, made_for(pipe, text, (1.5, 3.0)))
    return pipe


def edited(change, text="S3", scales=(1.5, 3.0)):
    """The text of a file after a change of its fields."""
    fields = json.loads(solver_of(text, scales).to_json())
    change(fields)
    return json.dumps(fields)


def put(*path_and_value):
    """A change: sets what is at a path, such as ("numbers", 0, "times", 1)."""
    *path, last, value = path_and_value

    def change(fields):
        for key in path:
            fields = fields[key]
        fields[last] = value

    return change


def drop(*path):
    """A change: takes out what is at a path."""
    *path, last = path

    def change(fields):
        for key in path:
            fields = fields[key]
        del fields[last]

    return change
