"""Learnt solvers: the numbers of a schedule such as S5, as a file that a model directory keeps.

`solvers/S5.json` holds, for each guidance scale that it was learnt at, a time grid and the weights
of each step, to be read and checked by a person. Between scales the numbers are interpolated.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax.guidance import MODES, check_interval
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.multistep import Solver
from flowturbo_jax.schedule import Schedule

FORMAT = 1
DIGITS = 7  # of times and weights; float32 has as many
TOLERANCE = 1e-6  # of sums of rounded weights
LARGEST = 1e6  # of a weight; float32 keeps nothing of the sum of larger ones

Rows = tuple[tuple[float, ...] | None, ...]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What was learnt at one guidance scale.

    Attributes:
      guidance_scale: that scale; 1 of a model without guidance.
      times: flow times `[N + 1]`, rising from 0 to 1.
      weights: of each step i, on the velocities that steps 0 to i started from, oldest first; they
        sum to 1. None for a step whose weights are not learnt.
      results: what the search measured, for people; nothing depends on it.
    """

    guidance_scale: float
    times: tuple[float, ...]
    weights: Rows
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def of_arrays(
        cls, schedule: Schedule, scale: float, solver: Solver, results: Mapping[str, Any]
    ) -> "Numbers":
        """Rounds arrays to what a file holds.

        Args:
          schedule: whose numbers they are.
          scale: guidance scale that they were learnt at.
          solver: the arrays.
          results: what the search measured.
        """
        times = [round(float(t), DIGITS) for t in solver.times]
        rows: list[tuple[float, ...] | None] = []
        for i, learnt in enumerate(schedule.learnt_rows):
            if not learnt:
                rows.append(None)
                continue
            row = np.asarray(solver.weights[i], np.float64)[schedule.remembered - i - 1 :]
            older = [round(float(weight), DIGITS) for weight in row[:-1]]
            rows.append((*older, round(1 - sum(older), DIGITS)))
        return cls(float(scale), (0.0, *times[1:-1], 1.0), tuple(rows), dict(results))


@dataclasses.dataclass(frozen=True)
class LearntSolver:
    """A learnt solver, validated at construction. It can stand where a schedule is asked for.

    Attributes:
      schedule: whose numbers these are; it is learnt.
      guidance: mode that it was learnt for: "none", "official" or "paired".
      guidance_interval: first and last flow time of guidance; None for all of the time.
      numbers: at each guidance scale, rising.
      predictor_sha256: fingerprint of the predictor's parameters that it was learnt for.
      refiner_sha256: that of the refiner; None where the schedule has no R.
      card: how it was learnt, for people; nothing depends on it.
    """

    schedule: Schedule
    guidance: str
    guidance_interval: tuple[float, float] | None
    numbers: tuple[Numbers, ...]
    predictor_sha256: str
    refiner_sha256: str | None
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        if not self.schedule.learnt:
            raise InputError(f"schedule {self.schedule} is not learnt, so it has no solver")
        if self.guidance not in MODES:
            raise InputError(f"guidance is {self.guidance!r}; it must be one of {', '.join(MODES)}")
        object.__setattr__(self, "guidance_interval", check_interval(self.guidance_interval))
        if self.guidance == "none" and self.guidance_interval is not None:
            raise InputError("guidance 'none' has no guidance_interval; it must be null")
        for network in ("predictor", "refiner"):
            used = network == "predictor" or self.schedule.needs_refiner
            sha256 = getattr(self, f"{network}_sha256")
            if not isinstance(sha256, str) and (used or sha256 is not None):
                raise InputError(
                    f"{network}_sha256 is {sha256!r}; it must be the text that says which "
                    f"{network} it was learnt for"
                )
        for numbers in self.numbers:
            _check(numbers, self.schedule)
        scales = [numbers.guidance_scale for numbers in self.numbers]
        if not scales or any(a >= b for a, b in itertools.pairwise(scales)):
            raise InputError(f"the guidance scales are {scales}; one or more are needed, rising")

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales that it was learnt at."""
        return tuple(numbers.guidance_scale for numbers in self.numbers)

    @property
    def sha256(self) -> str:
        """Of all that sampling depends on, in hexadecimal."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def __repr__(self) -> str:
        fields = (self.guidance, self.guidance_interval, self.predictor_sha256, self.refiner_sha256)
        numbers = [(one.guidance_scale, one.times, one.weights) for one in self.numbers]
        return f"LearntSolver({str(self.schedule)!r}, {fields!r}, {numbers!r})"

    def at(self, scale: float | jax.Array) -> Solver:
        """The numbers at a guidance scale, as float32 arrays: linear between neighbours.

        Args:
          scale: guidance scale, may be traced; beyond those learnt at, the nearest one counts.
        """
        xp = jnp if isinstance(scale, jax.Array) else np
        each = [self._arrays(numbers) for numbers in self.numbers]
        shares = [xp.interp(scale, np.asarray(self.scales), row) for row in np.eye(len(each))]
        times, weights = (
            None if parts[0] is None else sum(s * p for s, p in zip(shares, parts, strict=True))
            for parts in zip(*each, strict=True)
        )
        times = xp.concatenate([np.zeros(1), times[1:-1], np.ones(1)]).astype(np.float32)
        return Solver(times, None if weights is None else weights.astype(np.float32))

    def _arrays(self, numbers: Numbers) -> Solver:
        if not self.schedule.learns_weights:
            return Solver(np.asarray(numbers.times), None)
        weights = np.zeros((self.schedule.steps, self.schedule.remembered))
        for i, row in enumerate(numbers.weights):
            if row is not None:
                weights[i, -len(row) :] = row
        return Solver(np.asarray(numbers.times), weights)

    def check_model(self, fingerprints: Mapping[str, str | None]) -> None:
        """Refuses a model that it was not learnt for.

        Args:
          fingerprints: of the model's networks, by name.

        Raises:
          InputError: they are others.
        """
        for network in ("predictor", "refiner"):
            learnt_for = getattr(self, f"{network}_sha256")
            if learnt_for is not None and fingerprints[network] != learnt_for:
                raise InputError(
                    f"solver {self.schedule} was learnt for another {network}; learn one for this "
                    f"model: python -m flowturbo_jax solve MODEL_DIR --schedule={self.schedule}"
                )

    def with_numbers(self, numbers: Numbers) -> "LearntSolver":
        """The same, with the numbers of one more scale, or others for one that it has."""
        others = [one for one in self.numbers if one.guidance_scale != numbers.guidance_scale]
        ordered = sorted([*others, numbers], key=lambda one: one.guidance_scale)
        return dataclasses.replace(self, numbers=tuple(ordered))

    def to_json(self) -> str:
        """The text of the file: one line per row of weights."""
        fields = {"format": FORMAT, "schedule": str(self.schedule), "guidance": self.guidance}
        fields |= {"guidance_interval": self.guidance_interval, "numbers": None}
        fields |= {"predictor_sha256": self.predictor_sha256, "refiner_sha256": self.refiner_sha256}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
        lines[list(fields).index("numbers")] = f' "numbers": [{self._numbers_text()}]'
        lines.append(f' "card": {json.dumps(dict(self.card), indent=2)}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def _numbers_text(self) -> str:
        texts = []
        for one in self.numbers:
            rows = ",\n    ".join(json.dumps(row) for row in one.weights)
            texts.append(
                f'{{"guidance_scale": {one.guidance_scale!r},\n   "times": '
                f'{json.dumps(one.times)},\n   "weights": [\n    {rows}],\n   "results": '
                f"{json.dumps(dict(one.results))}}}"
            )
        return ",\n  ".join(texts)

    @classmethod
    def read(cls, file: str | Path) -> "LearntSolver":
        """Reads and validates a file.

        Raises:
          InputError: it cannot be read, or is not consistent.
        """
        try:
            return cls.from_json(Path(file).read_text())
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise InputError(f"cannot read {file}: {reason}") from error
        except InputError as error:
            raise InputError(f"{file}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "LearntSolver":
        """Reads the text of a file.

        Raises:
          InputError: it is not JSON, of another format, or its numbers are not consistent.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"it is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise InputError("it must hold a JSON object with the keys format, schedule, ...")
        if fields.pop("format", None) != FORMAT:
            raise InputError(f"it is not of format {FORMAT}; learn it anew")
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - fields.keys()), sorted(fields.keys() - names)
        if missing or unknown:
            raise InputError(f"it has the wrong keys: missing {missing}, unknown {unknown}")
        if not isinstance(fields["card"], dict):
            raise InputError("its card must be a JSON object")
        try:
            numbers = tuple(_read_numbers(one) for one in fields["numbers"])
            read = {"schedule": Schedule.parse(fields["schedule"]), "numbers": numbers}
            read["guidance_interval"] = check_interval(fields["guidance_interval"])
            return cls(**{**fields, **read})
        except (TypeError, ValueError) as error:  # InputError, too
            raise InputError(f"its numbers are wrong: {error}") from error


def _read_numbers(fields: Any) -> Numbers:
    names = [field.name for field in dataclasses.fields(Numbers)]
    if not isinstance(fields, dict) or fields.keys() != set(names):
        raise InputError(f"at each guidance scale they need the keys {', '.join(names)}")
    if not isinstance(fields["results"], dict):
        raise InputError("results must be a JSON object")
    rows = tuple(None if row is None else tuple(row) for row in fields["weights"])
    times = tuple(fields["times"])
    return Numbers(**{**fields, "times": times, "weights": rows})


def _check(numbers: Numbers, schedule: Schedule) -> None:
    """Refuses numbers that are not consistent, or not of the schedule."""
    scale, times, weights = numbers.guidance_scale, numbers.times, numbers.weights
    where = f"at guidance scale {scale!r:.20}"
    flat = [scale, *times, *(weight for row in weights if row is not None for weight in row)]
    if not all(_is_number(value) for value in flat):
        raise InputError(f"{where} not all of its times and weights are finite numbers, below 1e6")
    if len(times) != schedule.steps + 1 or len(weights) != schedule.steps:
        raise InputError(
            f"{where} it has {len(times)} times and {len(weights)} rows of weights; schedule "
            f"{schedule} needs {schedule.steps + 1} and {schedule.steps}"
        )
    steps = np.diff(np.asarray(times, np.float32))  # as sampling takes them
    if (times[0], times[-1]) != (0, 1) or (steps <= 0).any():
        raise InputError(f"{where} the times {list(times)} do not rise from 0 to 1")
    for i, (row, learnt) in enumerate(zip(weights, schedule.learnt_rows, strict=True)):
        if (row is not None) != learnt or (learnt and len(row) != i + 1):
            needed = f"{i + 1} weights" if learnt else "null"
            raise InputError(f"{where} step {i + 1} of {schedule} needs {needed}, not {row}")
        if learnt and abs(sum(row) - 1) > TOLERANCE * len(row):
            raise InputError(f"{where} the weights of step {i + 1} sum to {sum(row):.7g}, not to 1")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < LARGEST  # not of NaN
