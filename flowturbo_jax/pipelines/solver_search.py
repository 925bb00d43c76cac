"""Learns a solver for a model: its time grid and weights, by gradients through the sampler.

From noise and labels alone: the loss is the distance of the sampler's latents from a fine
solution of the same flow from the same noise, at the end and on the way. The networks stay as they
are; a few dozen numbers are learnt. Noises that the search does not see say when it is done.
"""

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from flowturbo_jax import parallel, sampler, stopping
from flowturbo_jax.interfaces import InputError, Latents
from flowturbo_jax.learnt_solver import Numbers
from flowturbo_jax.multistep import Solver
from flowturbo_jax.pipelines import programs, solver_networks
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.kept_results import KeptResults
from flowturbo_jax.pipelines.plan import Plan
from flowturbo_jax.pipelines.solver_examples import Examples, examples, on_the_way
from flowturbo_jax.pipelines.solver_settings import Parameters, Search, solver_of, start

DIVERGED = 4.0  # times the error that the search began with
SOLVED_AT_ONCE = 64  # by the fine solution; its steps are those that all of them need


class SolverSearch:
    """Learns the solver of one schedule at one guidance scale.

    Args:
      pipe: the model, as it will sample.
      exact: the same with networks that compute in float32, for the fine solution.
      search: how.
      plan: guidance mode, scale and interval; the fine solution is guided all of the time.
      work: folder for fine solutions and for what a later call goes on from.
      on_progress: told in a word what is done, how much of it, and of how much.

    Attributes:
      frozen: parameters and guidance on the devices, as `step` hands them to its program.
      seconds: that the steps of a search took, in all calls of `run` together.
    """

    def __init__(
        self,
        pipe: ClassToImage,
        exact: ClassToImage,
        search: Search,
        plan: Plan,
        work: Path,
        on_progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
    ):
        parallel.check_batch_size(search.batch_size)
        self._pipe, self._exact, self._search, self._plan = pipe, exact, search, plan
        self._work, self._progress = Path(work), on_progress
        self._networks = programs.Networks(solver_networks.recomputing(pipe, search.remat))
        decoder = pipe.decoder_params if search.loss == "pixels" else {}
        self.frozen = parallel.replicate((pipe.params, decoder, *plan.arguments[:2]))
        self._optimizer = optax.adam(
            optax.cosine_decay_schedule(search.learning_rate, search.steps)
        )
        self.seconds = 0.0
        self._step = parallel.data_parallel(self._make_step, donate=False)
        self._errors = parallel.map_batch(self.squared_errors)
        self._kept = KeptResults(self._work, "search", self._identity())

    def at(self, plan: Plan, on_progress: Callable[[str, int, int], Any]) -> "SolverSearch":
        """The same search at another guidance scale, by the same compiled programs.

        Args:
          plan: of the same guidance mode, with an interval where this has one.
          on_progress: as of this.
        """
        other = copy.copy(self)
        other._plan, other._progress = plan, on_progress
        other.frozen = (*self.frozen[:2], *parallel.replicate(plan.arguments[:2]))
        other._kept = KeptResults(other._work, "search", other._identity())
        return other

    def run(self) -> Numbers:
        """Learns, and returns the numbers with the least held-out error.

        Raises:
          InputError: the fine solution fails, the start is not finite, or the folder cannot be
            written to.
          KeyboardInterrupt: SIGINT or SIGTERM asked to stop; a later call goes on from there.
        """
        seen, held_out, others = self.data()
        state = self._restored() or self._begin(held_out)
        search, ended = self._search, "steps"
        with stopping.requests() as stop:
            while state["step"] < search.steps and not state["ended"]:
                state = self._advance(state, seen, held_out)
                self._kept.put("state", state)
                self._kept.write()
                self._progress(f"{self._plan.schedule}", state["step"], search.steps)
                if stop.is_set():
                    raise KeyboardInterrupt
        self.seconds, ended = state["seconds"], state["ended"] or ended
        best = self._unpacked(state["best"]["parameters"])
        solver = jax.tree.map(np.asarray, solver_of(search.schedule, best))
        results = {
            "held_out_rmse": state["best"]["rmse"],
            "start_rmse": state["curve"][0][1],
            "best_step": state["best"]["step"],
            "steps": state["step"],
            "ended": ended,
        }
        if others is not None:
            results["held_out_rmse_other_labels"] = self.rmse(solver, others)
        return Numbers.of_arrays(search.schedule, self._plan.scale, solver, results)

    def begin(self) -> Any:
        """What a search moves, before its first step: parameters, and the optimiser's state."""
        parameters = start(self._search.schedule)
        return parallel.replicate((parameters, self._optimizer.init(parameters)))

    def step(self, moving: Any, batch: Examples) -> Any:
        """One step of the optimiser; the arrays given stay as they are.

        Args:
          moving: as `begin` makes it.
          batch: as many examples as `Search.batch_size`.
        """
        return self._step(moving, self.frozen, batch)

    def compiled(self, moving: Any, batch: Examples) -> Any:
        """The program of a step on one device, `(moving, frozen, batch) -> moving`, compiled."""
        alone = jax.jit(partial(self._make_step, mean=lambda tree: tree))
        return alone.lower(moving, self.frozen, batch).compile()

    def loss(self, parameters: Parameters, frozen: Any, batch: Examples) -> Float[Array, ""]:
        """Relative square distance from the fine solution, at the end and on the way.

        Args:
          parameters: what the optimiser moves.
          frozen: as the attribute, without its axis of devices.
          batch: noises, and where they lead.
        """
        search = self._search
        solver = solver_of(search.schedule, parameters)
        end, states = self._sampled(solver, frozen, batch, lambda state: state.x)
        loss = _relative(*self._compared(end, batch.way[:, -1], frozen))
        if search.trajectory_weight:
            each = jax.vmap(lambda x, t: _relative(x, on_the_way(batch.way, batch.noise, t)))
            loss += search.trajectory_weight * each(states, solver.times[1:]).mean()
        return loss

    def squared_errors(self, frozen: Any, batch: Examples) -> Float[Array, " batch"]:
        """Mean square distance of each sample's end from the fine solution's.

        Args:
          frozen: as of `loss`, and a solver.
          batch: noises, and where they lead.
        """
        frozen, solver = frozen
        end, _ = self._sampled(solver, frozen, batch)
        end, exact = self._compared(end, batch.way[:, -1], frozen)
        return jnp.mean((end - exact) ** 2, axis=tuple(range(1, end.ndim)))

    def rmse(self, solver: Solver, held_out: Examples) -> float:
        """Root mean square distance of a solver's latents from the fine solution.

        Args:
          solver: its numbers.
          held_out: noises, and where they lead.
        """
        size, count, sums = self._search.batch_size, len(held_out.noise), 0.0
        solver = jax.tree.map(jnp.asarray, solver)
        frozen = (self.frozen, parallel.replicate(solver))
        for first in range(0, count, size):
            rows = np.minimum(np.arange(first, first + size), count - 1)
            found = self._errors(frozen, held_out.rows(rows))
            sums += float(np.asarray(found, np.float64)[: count - first].sum())
        return float(np.sqrt(sums / count))

    def data(self) -> tuple[Examples, Examples, Examples | None]:
        """What is learnt from, what the error is held out on, and that of labels left out."""
        search, classes = self._search, self._classes()
        labels = self._labels(classes)
        seen = self._examples(0, search.noises, labels, "fine solution")
        unseen = np.setdiff1d(np.arange(classes), labels)
        others = self.held_out(unseen) if len(unseen) else None
        return seen, self.held_out(), others

    def held_out(self, labels: np.ndarray | None = None) -> Examples:
        """The noises that the search does not see, under some labels (those of the search)."""
        search, classes = self._search, self._classes()
        labels = self._labels(classes) if labels is None else labels
        first = search.noises
        return self._examples(first, search.held_out, labels, "fine solution, held out")

    def _classes(self) -> int:
        return max(self._pipe.model.description.predictor.num_classes, 1)

    def _labels(self, classes: int) -> np.ndarray:
        labels = np.asarray(self._search.labels or range(classes))
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise InputError(f"labels are {labels.tolist()}; there are 0 to {classes - 1}")
        return labels

    def _examples(self, first: int, count: int, labels: np.ndarray, what: str) -> Examples:
        search = self._search
        return examples(
            self._exact,
            self._plan,
            first,
            count,
            labels,
            search.seed,
            self._work / "solutions",
            SOLVED_AT_ONCE,
            lambda done, total: self._progress(what, done, total),
        )

    def _identity(self) -> dict[str, Any]:
        model, plan = self._pipe.model, self._plan
        search = {**dataclasses.asdict(self._search), "schedule": str(self._search.schedule)}
        del search["remat"]  # changes memory and time, not the numbers
        return {
            "search": search,
            "fingerprints": model.fingerprints,
            "dtype": np.dtype(model.predictor.dtype).name,
            "guidance": [plan.guidance, float(plan.scale), plan.interval],
            "guided_channels": model.description.guided_channels,
            "devices": parallel.total_devices(),
        }

    def _begin(self, held_out: Examples) -> dict[str, Any]:
        moving = self.begin()
        rmse = self.rmse(solver_of(self._search.schedule, moving[0]), held_out)
        if not np.isfinite(rmse):
            raise InputError(
                "the sampler's latents are not finite; look at the weights, the guidance scale and "
                "the dtype"
            )
        best = {"rmse": rmse, "step": 0, "parameters": _packed(moving[0])}
        curve, packed = [[0, rmse]], _packed(moving)
        state = {"step": 0, "packed": packed, "best": best, "curve": curve, "ended": ""}
        return {**state, "seconds": 0.0}

    def _restored(self) -> dict[str, Any] | None:
        return self._kept.get("state")

    def _advance(self, state: dict[str, Any], seen: Examples, held_out: Examples) -> dict[str, Any]:
        """Some steps of the optimiser, and a measurement."""
        search, first, clock = self._search, state["step"], time.perf_counter()
        last = min(first + search.evaluate_every, search.steps)
        moving = self._unpacked(state["packed"], optimizer=True)
        for step in range(first, last):
            order = np.random.default_rng((search.seed, step))
            chosen = order.choice(search.noises, search.batch_size, replace=False)
            moving = self.step(moving, seen.rows(chosen))
        parameters = moving[0]
        rmse = self.rmse(solver_of(search.schedule, parameters), held_out)
        curve, best, ended = [*state["curve"], [last, rmse]], state["best"], ""
        if rmse < best["rmse"]:
            best = {"rmse": rmse, "step": last, "parameters": _packed(parameters)}
        if not rmse < DIVERGED * curve[0][1]:  # or not a number
            ended, curve[-1][1] = "diverged", None
        elif last - best["step"] >= search.patience * search.evaluate_every:
            ended = "no better for long"
        return {
            "step": last,
            "packed": _packed(moving) if ended != "diverged" else state["packed"],
            "best": best,
            "curve": curve,
            "ended": ended,
            "seconds": state["seconds"] + time.perf_counter() - clock,
        }

    def _unpacked(self, packed: Any, optimizer: bool = False) -> Any:
        like: Any = start(self._search.schedule)
        like = (like, self._optimizer.init(like)) if optimizer else like
        leaves, tree = jax.tree.flatten(like)
        found = [
            jnp.asarray(np.asarray(values, leaf.dtype).reshape(leaf.shape))
            for values, leaf in zip(packed, leaves, strict=True)
        ]
        return parallel.replicate(jax.tree.unflatten(tree, found))

    def _make_step(self, moving: Any, frozen: Any, batch: Examples, mean: parallel.Mean) -> Any:
        parameters, optimizer_state = moving
        gradients = mean(jax.grad(self.loss)(parameters, frozen, batch))
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers and floats
            updates, optimizer_state = self._optimizer.update(
                gradients, optimizer_state, parameters
            )
            return optax.apply_updates(parameters, updates), optimizer_state

    def _sampled(self, solver: Solver, frozen: Any, batch: Examples, observe: Any = None) -> Any:
        params, _, scale, interval = frozen
        search = self._search
        flow = programs.make_flow(
            self._networks,
            params,
            batch.labels,
            scale,
            interval,
            self._plan.guidance,
            search.schedule.needs_refiner,
        )
        if solver_networks.remat_of(self._pipe, search.remat) != "none":
            refine = None if flow.refine is None else jax.checkpoint(flow.refine)
            flow = flow._replace(predict=jax.checkpoint(flow.predict), refine=refine)
        state, states = sampler.integrate(
            flow, batch.noise, search.schedule, observe=observe, solver=solver
        )
        return state.x, states

    def _compared(self, end: Latents, exact: Latents, frozen: Any) -> tuple[jax.Array, jax.Array]:
        """Two ends as the loss compares them: latents, or the pixels of those."""
        if self._search.loss == "latents":
            return end, exact
        return tuple(programs.decoded(self._networks, frozen[1], x) for x in (end, exact))


def _relative(x: Latents, exact: Latents) -> Float[Array, ""]:
    """Mean square distance, in units of the mean square of what it should be."""
    return jnp.mean((x - exact) ** 2) / jnp.mean(exact**2)


def _packed(tree: Any) -> list[Any]:
    """Arrays as lists of numbers, which JSON holds to the last bit."""
    return [np.asarray(leaf).reshape(-1).tolist() for leaf in jax.tree.leaves(tree)]
