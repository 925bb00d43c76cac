"""Trains a predictor or a refiner by a recipe.

python train.py                                         the digits refiner, minutes on two cores
python train.py --config=configs/digits_predictor.py    the digits predictor, from scratch
python train.py --config=FILE --workdir=DIR --config.KEY=VALUE

Several GPUs of one machine are used by themselves. Several processes, on one machine or many, run
the same command: under srun or mpirun (a process per GPU) as it is, on a TPU pod with
--coordinator_address=auto, elsewhere, also for a process per machine, each with
--coordinator_address=HOST:PORT --num_processes=N --process_id=I.

The folder --workdir (runs/NAME by default, NAME being the recipe's) gets checkpoints, metrics,
samples and, at the end, model/. The same command continues a run that was stopped.
"""

from collections.abc import Sequence
from pathlib import Path

from flowturbo_jax import parallel, trainer
from flowturbo_jax.commands import entry
from flowturbo_jax.train_config import TrainConfig


def main(argv: Sequence[str]) -> None:
    """Reads the flags, trains, and says what to do next."""
    flags = entry.read_flags(
        argv,
        entry.ROOT / "configs/digits_refiner.py",
        TrainConfig,
        __doc__,
        workdir="",
        coordinator_address="",
        num_processes="",
        process_id="",
    )
    parallel.join(flags.coordinator_address, flags.num_processes, flags.process_id)
    workdir = Path(flags.workdir or Path("runs") / flags.config.name)
    state = trainer.train_and_evaluate(flags.config, workdir)
    if not parallel.is_first():
        return
    if int(state.step) < flags.config.steps:
        print(f"stopped at step {int(state.step)}; the same command continues the run")
    else:
        print(f"wrote {workdir / 'model'}; sample it with --config.model_dir={workdir / 'model'}")


if __name__ == "__main__":
    entry.run(main)
