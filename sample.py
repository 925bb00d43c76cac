"""Samples images, edits them, and compares FlowTurbo with Heun on the same noise.

python sample.py                                         the shipped digits model
python sample.py --config.schedule=H2P4R2 --config.guidance_scale=2 --config.seed=1
python sample.py --config.model_dir=runs/digits_refiner/model
python sample.py --config=configs/rectified_flow_t2i.py --config.prompt="a fox in the snow"
python sample.py --config.task=edit --config.image=FILE --config.labels=8 --config.strength=0.6
python sample.py --config.task=inpaint --config.image=FILE --config.mask=FILE --config.labels=3

Writes pictures and a JSON file with the protocol card to --config.out, and prints a table.
"""

from collections.abc import Sequence

from flowturbo_jax.commands import edit, entry, sample
from flowturbo_jax.commands.result_files import listed
from flowturbo_jax.sample_config import GENERATE, SampleConfig


def main(argv: Sequence[str]) -> None:
    """Reads the flags, samples, and prints the table."""
    flags = entry.read_flags(argv, entry.ROOT / "configs/digits_sample.py", SampleConfig, __doc__)
    if flags.config.task == GENERATE:
        report = sample.sample(flags.config)
        print(sample.table(report))
    else:
        report = edit.edit(flags.config)
        print(edit.table(report))
    print(f"wrote {report['picture']} and {report['picture'].removesuffix('.png')}.json")
    if "results" in report:
        print(f"wrote {listed(report['results'])}")
    if "noise" in report:
        print(f"wrote {report['noise']}: the noise, as arr_0")


if __name__ == "__main__":
    entry.run(main)
