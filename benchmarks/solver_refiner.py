r"""Whether a refiner that is trained further, on what a solver visits, is worth it.

  python benchmarks/solver_refiner.py --schedule S3R1 --out runs/solver_refiner

The refiner was trained on one Euler step from the data's path; a solver calls it elsewhere. From a
learnt solver of the model two searches go on, by the same loss, noises and batches: one moves the
solver's numbers alone, the other the refiner's parameters, too. What counts is the error on noises
that neither sees, beside that on those they do. Of seed 0 are the noises that the shipped solvers
were learnt from and chosen by, so another one is the default.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowturbo_jax import markdown, run_folder
from flowturbo_jax.commands import entry, output_file
from flowturbo_jax.commands.progress import bars
from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines.class_to_image import ClassToImage
from flowturbo_jax.pipelines.solver_examples import Examples
from flowturbo_jax.pipelines.solver_search import SolverSearch
from flowturbo_jax.pipelines.solver_settings import Search, parameters_of, solver_of
from flowturbo_jax.schedule import Schedule

ARMS = ("numbers", "numbers and refiner")


def main(argv: list[str]) -> None:
    """Reads the command line, trains both ways, and prints and writes the curves."""
    parser = entry.LineParser(prog="python benchmarks/solver_refiner.py", description=__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder of the results, and of the fine solutions")
    add("--model", default="digits", help="model directory (digits)")
    add("--schedule", default="S3R1", help="one with a refiner, which the model has learnt (S3R1)")
    add("--steps", type=int, default=200, help="of the optimiser (200)")
    add("--noises", type=int, default=512, help="to learn from (512)")
    add("--seed", type=int, default=1, help="of noises and batches (1)")
    add("--learning-rate", type=float, default=5e-3, help="of the numbers (0.005)")
    add("--refiner-learning-rate", type=float, default=1e-3, help="of the refiner (0.001)")
    args = parser.parse_args(argv[1:])
    pipe, schedule = ClassToImage.load(args.model), Schedule.parse(args.schedule)
    if not (schedule.learnt and schedule.needs_refiner):
        raise InputError(f"schedule {schedule} is not learnt with a refiner; take S3R1 or such")
    asked = {name: getattr(args, name) for name in ("steps", "noises", "learning_rate", "seed")}
    search = Search(schedule, **asked)
    with run_folder.reserved(Path(args.out), "--out"):
        with bars() as show:
            plan = pipe.plan(str(schedule))
            searching = SolverSearch(pipe, pipe, search, plan, Path(args.out), show)
            data = searching.data()[:2]
            curves = {
                arm: _curve(pipe, searching, plan, data, search, rate, lambda *done: show(*done))
                for arm, rate in zip(ARMS, (0.0, args.refiner_learning_rate), strict=True)
            }
        report = {**vars(args), "held_out": search.held_out, "curves": curves}
        text = json.dumps(report, indent=1) + "\n"
        output_file.replace(Path(args.out) / "solver_refiner.json", text)
    sys.stdout.write(_table(curves) + "\n")


def _curve(
    pipe: ClassToImage,
    searching: SolverSearch,
    plan: Any,
    data: tuple[Examples, Examples],
    search: Search,
    rate: float,
    show: Callable[[str, int, int], Any],
) -> list[dict[str, Any]]:
    """Errors on the noises learnt from and on the held-out ones, as training goes on.

    Args:
      pipe: the model.
      searching: whose loss it is.
      plan: how the model samples with the solver that it has.
      data: noises to learn from, and those held out.
      search: how.
      rate: learning rate of the refiner; 0 leaves it as it is.
      show: told what is done.
    """
    predictor, refiner = pipe.params
    decays = {"numbers": search.learning_rate, "refiner": rate}
    optimizer = optax.multi_transform(
        {
            name: optax.adam(optax.cosine_decay_schedule(first, search.steps))
            for name, first in decays.items()
        },
        {name: name for name in decays},
    )
    moving = {"numbers": parameters_of(plan.solver.at(plan.scale)), "refiner": refiner}
    state = optimizer.init(moving)
    guidance = jax.tree.map(jnp.asarray, plan.arguments[:2])  # scale and interval

    def frozen(moving):
        return ((predictor, moving["refiner"]), {}, *guidance)

    @jax.jit
    def step(moving, state, batch):
        gradients = jax.grad(lambda x: searching.loss(x["numbers"], frozen(x), batch))(moving)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers and floats
            updates, state = optimizer.update(gradients, state, moving)
            return optax.apply_updates(moving, updates), state

    @jax.jit
    def errors(moving, batch):
        solver = solver_of(search.schedule, moving["numbers"])
        return searching.squared_errors((frozen(moving), solver), batch)

    def rmse(examples):
        size, parts = search.batch_size, []
        for first in range(0, len(examples.noise), size):
            rows = np.minimum(np.arange(first, first + size), len(examples.noise) - 1)
            parts.append(np.asarray(errors(moving, examples.rows(rows)), np.float64))
        return float(np.sqrt(np.concatenate(parts)[: len(examples.noise)].mean()))

    curve = []
    for done in range(search.steps + 1):
        if done % 50 == 0 or done == search.steps:
            curve.append({"step": done, "learnt_from": rmse(data[0]), "held_out": rmse(data[1])})
            show(f"refiner at {rate:g}", done, search.steps)
        order = np.random.default_rng((search.seed, done))
        chosen = order.choice(search.noises, search.batch_size, replace=False)
        moving, state = step(moving, state, data[0].rows(chosen))
    return curve


def _table(curves: dict[str, list[dict[str, Any]]]) -> str:
    heading = [
        "step",
        *(f"{arm}: {part}" for arm in curves for part in ("learnt from", "held out")),
    ]
    lines = []
    for rows in zip(*curves.values(), strict=True):
        cells = [f"{row[part]:.4f}" for row in rows for part in ("learnt_from", "held_out")]
        lines.append([str(rows[0]["step"]), *cells])
    return markdown.table(heading, lines)


if __name__ == "__main__":
    entry.run(main)
