"""How a solver is learnt, and what the optimiser moves."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.multistep import Solver, adams_bashforth
from flowturbo_jax.schedule import Schedule
from flowturbo_jax.spacing import LEARNT

LOSSES = ("latents", "pixels")
MOST_STEPS = 64
REMATS = ("none", "evaluations", "blocks")


@dataclasses.dataclass(frozen=True)
class Search:
    """How a solver is learnt, validated at construction.

    Attributes:
      schedule: what is learnt: its grid, and the weights of its S and R steps.
      steps: of the optimiser, Adam with a learning rate that falls to 0 as a cosine.
      batch_size: noises of a step.
      learning_rate: at the start.
      noises: how many there are to learn from.
      held_out: how many more there are to measure the error on.
      trajectory_weight: of the distance on the way, beside 1 for that at the end.
      loss: "latents", or "pixels": the distance at the end is that of decoded images.
      evaluate_every: steps from one measurement of the held-out error to the next.
      patience: so many measurements without a better one end the search.
      labels: those to learn from; all if (). The error is then measured on the others, too.
      seed: of noises and batches, in [0, 2^32).
      remat: what the backward pass computes again: "none", "evaluations" of the networks, or
        their "blocks", too, which takes least memory; "" chooses by the model's size.
    """

    schedule: Schedule
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 2e-2
    noises: int = 512
    held_out: int = 256
    trajectory_weight: float = 0.1
    loss: str = "latents"
    evaluate_every: int = 25
    patience: int = 6
    labels: tuple[int, ...] = ()
    seed: int = 0
    remat: str = ""

    def __post_init__(self):
        if not self.schedule.learnt:
            learnt = dataclasses.replace(self.schedule, shift=1.0, spacing=LEARNT)
            raise InputError(
                f"schedule {self.schedule} has nothing to learn; take S5, S4R1, H1S4 or {learnt}"
            )
        if self.schedule.steps > MOST_STEPS:
            raise InputError(
                f"schedule {self.schedule} has {self.schedule.steps} steps; up to {MOST_STEPS} are "
                "learnt: more gain nothing"
            )
        for name in ("steps", "batch_size", "noises", "held_out", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.batch_size > self.noises:
            raise InputError(
                f"a batch of {self.batch_size} needs as many noises, not {self.noises}"
            )
        if not (0 < self.learning_rate < 10 and 0 <= self.trajectory_weight < 1e6):
            raise InputError(
                f"learning_rate is {self.learning_rate}, trajectory_weight "
                f"{self.trajectory_weight}; the one must be above 0, the other 0 or more"
            )
        if self.loss not in LOSSES or self.remat not in ("", *REMATS):
            raise InputError(
                f"loss is {self.loss!r}, remat {self.remat!r}; known are {', '.join(LOSSES)}, and "
                f"{', '.join(REMATS)}"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it must be in [0, 2^32)")


class Parameters(NamedTuple):
    """What the optimiser moves.

    Attributes:
      grid: `[N]` float32; steps are its softmax.
      weights: `[N, K]` float32; the newest one of a row is what is missing to 1.
    """

    grid: Float[Array, " steps"]
    weights: Float[Array, "steps remembered"]


def start(schedule: Schedule) -> Parameters:
    """Where a search begins: even steps, with the weights of Adams-Bashforth of order 2."""
    times = np.linspace(0, 1, schedule.steps + 1)
    weights = adams_bashforth(times, [2] * schedule.steps, max(schedule.remembered, 2))
    weights = weights[:, -max(schedule.remembered, 1) :]  # of a single step the newest
    return Parameters(jnp.zeros(schedule.steps), jnp.asarray(weights, jnp.float32))


def solver_of(schedule: Schedule, parameters: Parameters) -> Solver:
    """The solver's numbers: times that rise from 0 to 1, weights that sum to 1.

    Args:
      schedule: whose numbers they are.
      parameters: what the optimiser moves; any values will do.
    """
    inner = jnp.cumsum(jax.nn.softmax(parameters.grid))[:-1]
    times = jnp.concatenate([jnp.zeros(1), inner, jnp.ones(1)])
    if not schedule.learns_weights:
        return Solver(times)
    steps, remembered = parameters.weights.shape
    lag = np.arange(remembered - 1, -1, -1)
    older = (lag > 0) & (lag <= np.arange(steps)[:, None])
    weights = jnp.where(older, parameters.weights, 0)
    return Solver(times, weights.at[:, -1].set(1 - weights.sum(axis=1)))


def parameters_of(solver: Solver) -> Parameters:
    """What the optimiser is to begin with, to go on from a solver's numbers.

    Args:
      solver: times that rise from 0 to 1, and weights.
    """
    grid = jnp.log(jnp.diff(jnp.asarray(solver.times)))
    steps = len(solver.times) - 1
    weights = jnp.zeros((steps, 1)) if solver.weights is None else jnp.asarray(solver.weights)
    return Parameters(grid, weights)
