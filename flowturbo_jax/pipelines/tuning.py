"""Finds the best schedules of a model: cheap screens of many, then a close look at a few.

A plan's error is the relative root mean square distance of a latent from the fine solution of the
same flow from the same noise, averaged over noises; no data set is needed. (A mean of squares over
all of them would be ruled by the few that end in another place.) Its cost is the time of its
blocks. What is kept from one screen to the next is near the front: no other plan is both cheaper
and closer.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowturbo_jax import path
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import stepwise
from flowturbo_jax.pipelines.candidates import Space
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.fine_solution import fine_solution
from flowturbo_jax.pipelines.fronts import Finalist, Screened, near_front, thinned
from flowturbo_jax.pipelines.kept_results import KeptResults
from flowturbo_jax.pipelines.plan import Plan

ROUNDS = 3  # of variations, unless one changes nothing before
FIRST_SHARE, SECOND_SHARE = 8, 2  # the screens take an eighth and a half of the noises
VARIED = 10  # plans of the front whose variations a round tries
GOLDEN_RATIO = 0.6180339887498949
WORST = 4.0  # times the baseline's error: worse plans are of no use
KEPT_FIRST, KEPT = 1.6, 1.15  # times the front's error, still worth another look


class Tuner:
    """Measures plans of one model on one set of noises; every result is kept in a file.

    Args:
      pipe: the model.
      exact: the same model with networks that compute in float32, for the fine solution.
      directory: for the fine solutions and the results.
      noises: how many noises the errors of finalists are measured on; screens take fewer.
      seed: noise i is that of image i of this seed, in [0, 2^32); labels are spread over all.
      batch_size: noises solved at once, and at most in a screen.
      latency_batch: images of the calls whose time is a plan's cost.
      cost: seconds of such a call by a plan; the measured times of its blocks if None.
      on_progress: told in a word what is done, how much of it, and of how much.
    """

    def __init__(
        self,
        pipe: ClassToImage,
        exact: ClassToImage,
        directory: Path,
        *,
        noises: int = 128,
        seed: int = 0,
        batch_size: int = 64,
        latency_batch: int = 8,
        cost: Callable[[Plan], float] | None = None,
        on_progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
    ):
        if not 0 <= seed < 2**32:
            raise InputError(f"seed is {seed}; it must be in [0, 2^32)")
        if noises < FIRST_SHARE or batch_size < 1 or latency_batch < 1:
            raise InputError(
                f"{noises} noises, batches of {batch_size}, latency of {latency_batch}: there must "
                f"be at least {FIRST_SHARE} noises, and 1 of the others"
            )
        self.pipe, self._exact, self._directory = pipe, exact, directory
        self._noises, self._progress = noises, on_progress
        self._few = max(FIRST_SHARE, noises // FIRST_SHARE)
        # The size of the first screen, so that both screens share their programs.
        self._batch, self._solved_at_once = min(batch_size, self._few), min(batch_size, noises)
        config = pipe.model.description.predictor
        seeds = np.full(noises, seed, np.uint32)
        indices = np.arange(noises, dtype=np.uint32)
        self.noise = np.asarray(
            jax.jit(path.sample_noise, static_argnums=2)(
                jnp.asarray(seeds), jnp.asarray(indices), config.shape
            )
        )
        # Every share of the noises sees labels from all over: 1,000 classes are more than noises.
        shares = np.arange(noises) * GOLDEN_RATIO % 1
        self.labels = (shares * max(config.num_classes, 1)).astype(np.int32)
        self._latency_batch = latency_batch
        identity = self._identity(seed, latency_batch)
        self._results = KeptResults(directory, "measured", identity)
        self._cost = cost or stepwise.Costs(pipe, latency_batch, self._results.costs).of
        self._solutions: dict[str, np.ndarray] = {}
        self._screened: dict[Plan, Screened] = {}

    @property
    def screened(self) -> list[Screened]:
        """Everything that was tried, as it was measured last; costs per image."""
        return [
            one._replace(cost=one.cost / self._latency_batch) for one in self._screened.values()
        ]

    def _identity(self, seed: int, latency_batch: int) -> dict[str, Any]:
        model, description = self.pipe.model, self.pipe.model.description
        networks = [model.predictor] + ([] if model.refiner is None else [model.refiner])
        return {
            "fingerprints": model.fingerprints,
            "networks": [repr(network) for network in networks],
            "guided_channels": description.guided_channels,
            "seed": seed,
            "latency_batch": latency_batch,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }

    def search(self, space: Space, baseline: Plan, learnt: Sequence[Plan] = ()) -> list[Screened]:
        """Searches a space, and returns the front of what is worth having, cheapest first.

        Args:
          space: what may be tried.
          baseline: what a user would take without a search; plans far worse are not looked into.
            Its guidance scale is that of all plans.
          learnt: more plans to begin with, by the model's own solvers.

        Raises:
          InputError: the fine solution fails, or the folder cannot be written to.
        """
        few = self._few
        screened = self.screen([*space.start(baseline.scale), *learnt], few, "first screen")
        kept, some = near_front(screened, KEPT_FIRST), max(few, self._noises // SECOND_SHARE)
        found = self.screen([one.plan for one in kept], some, "second screen")
        (known,) = self.screen([baseline], some, "")
        worst = WORST * known.error
        for number in range(ROUNDS):
            front = thinned(near_front(_below(found, worst), KEPT), VARIED)
            tried = {one.plan for one in found}
            beside = {plan: None for one in front for plan in space.beside(one.plan)}
            new = [plan for plan in beside if plan not in tried]
            if not new:
                break
            what = f"variations {number + 1} of {ROUNDS}"
            near = self.screen(new, few, what)
            # Against the front as it stands, so that of many variations few are looked at closely.
            worth = [one for one in near_front([*near, *self._at(front, few)], KEPT) if one in near]
            closer = self.screen([one.plan for one in worth], some, what)
            if not any(one in near_front([*found, *closer], 1.0) for one in closer):
                break
            found += closer
        front = near_front(_below(found, worst), 1.0)
        if not front:
            raise InputError(
                "no schedule gave finite latents; look at the weights, the guidance scale and dtype"
            )
        return front

    def _at(self, screened: Iterable[Screened], noises: int) -> list[Screened]:
        return self.screen([one.plan for one in screened], noises, "")

    def screen(self, plans: Sequence[Plan], noises: int, what: str) -> list[Screened]:
        """Measures cost and error of plans; what was measured before is read.

        Args:
          plans: how to sample.
          noises: how many of the noises to take.
          what: is done, for the progress.
        """
        result = []
        try:
            for number, plan in enumerate(plans):
                key = f"{_key(plan)} {noises}"
                error = self._results.get(key)
                if error is None:
                    error = self.error(plan, noises)
                    self._results.put(key, error)
                result.append(Screened(plan, self._cost(plan), error, noises))
                self._screened[plan] = result[-1]
                if what:
                    self._progress(what, number + 1, len(plans))
        finally:  # also of what was interrupted
            self._results.write()
        return result

    def error(
        self, plan: Plan, noises: int, sampler: Callable[..., Any] = stepwise.sample_latents
    ) -> float:
        """Mean relative distance of a plan's latents from the fine solution.

        Args:
          plan: how to sample.
          noises: how many of the noises to take, from the first.
          sampler: `(pipe, noise, labels, plan) -> latents`.
        """
        exact, parts = self._solution(plan, noises), []
        for first in range(0, noises, self._batch):
            # One shape, so that nothing compiles for the last batch; what it repeats is cut.
            rows = np.minimum(np.arange(first, first + self._batch), noises - 1)
            made = sampler(self.pipe, self.noise[rows], self.labels[rows], plan)
            parts.append(np.asarray(made)[: min(self._batch, noises - first)])
        error = relative_distance(np.concatenate(parts), exact)
        return error if np.isfinite(error) else float("inf")

    def _solution(self, plan: Plan, noises: int) -> np.ndarray:
        # With all channels guided both modes are one flow until something is refined.
        official = plan.guidance == "official"
        partial = official and self.pipe.model.description.guided_channels is not None
        mode = "official" if partial else ("none" if plan.guidance == "none" else "paired")
        if mode not in self._solutions:
            self._solutions[mode] = fine_solution(
                self._exact,
                self.noise,
                self.labels,
                plan._replace(guidance=mode),
                self._directory / "solutions",
                self._solved_at_once,
                lambda done, total: self._progress("fine solution", done, total),
            )
        return self._solutions[mode][:noises]

    def finalists(self, plans: Sequence[Plan], repeats: int = 7) -> list[Finalist]:
        """Measures plans at last: compiled as one program each, and on all noises.

        Args:
          plans: how to sample.
          repeats: of each timed call, whose median counts; taken in turns, so that what else the
            machine does falls on all alike.
        """
        screened = self.screen(plans, self._noises, "finalists: errors")
        new = [plan for plan in plans if self._results.get(f"{_key(plan)} ms") is None]
        for number, plan in enumerate(new):
            self._call(plan)
            self._progress("finalists: compiling", number + 1, len(new))
        seconds = [[self._call(plan) for plan in new] for _ in range(repeats)]
        for plan, ms in zip(new, np.median(seconds, axis=0) * 1e3, strict=True):
            self._results.put(f"{_key(plan)} ms", float(ms) / self._latency_batch)
        self._results.write()
        times = [self._results.get(f"{_key(plan)} ms") for plan in plans]
        return [
            Finalist(one.plan, ms, one.error, {}, one.error)
            for one, ms in zip(screened, times, strict=True)
        ]

    def _call(self, plan: Plan) -> float:
        """Seconds of a call of the compiled sampler."""
        noise = np.resize(self.noise, (self._latency_batch, *self.noise.shape[1:]))
        labels = np.resize(self.labels, self._latency_batch)
        begin = time.perf_counter()
        made = self.pipe.sample_latents(
            jnp.asarray(noise),
            labels,
            **plan.settings,
        )
        jax.block_until_ready(made)
        return time.perf_counter() - begin


def _key(plan: Plan) -> str:
    """A plan without any rounding."""
    numbers = "" if plan.solver is None else f" {plan.solver.sha256}"
    return f"{plan.schedule} {plan.guidance} {float(plan.scale)!r} {plan.interval!r}{numbers}"


def _below(screened: Sequence[Screened], worst: float) -> list[Screened]:
    """Those whose error is at most that; all if none is."""
    return [one for one in screened if one.error <= worst] or list(screened)


def relative_distance(latents: np.ndarray, exact: np.ndarray) -> float:
    """Mean over a batch of |latent - exact| / |exact|, Euclidean norms, in float64.

    Args:
      latents: `[B, ...]`.
      exact: `[B, ...]`, what they should be.
    """
    exact = exact.reshape(len(exact), -1).astype(np.float64)
    apart = np.linalg.norm(latents.reshape(exact.shape) - exact, axis=1)
    return float(np.mean(apart / np.linalg.norm(exact, axis=1)))


def space_for(pipe: ClassToImage, space: Space) -> Space:
    """A space for a model: without R if it has no refiner, and with modes if none are given.

    Raises:
      InputError: the model cannot be guided, but a guided mode is asked for.
    """
    description = pipe.model.description
    modes = space.modes
    if not modes:
        own = description.guidance
        modes = (own,) if own == "none" else (own, "official" if own == "paired" else "paired")
    for mode in modes:
        pipe.plan("H1", guidance=mode)
    steps = space.max_refiner_steps if description.refiner is not None else 0
    return dataclasses.replace(space, modes=modes, max_refiner_steps=steps)
