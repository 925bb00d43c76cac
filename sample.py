"""Samples images, and compares FlowTurbo with Heun on the same noise.

python sample.py                                         the shipped digits model
python sample.py --config.schedule=H2P4R2 --config.guidance_scale=2 --config.seed=1
python sample.py --config.model_dir=runs/digits_refiner/model

Writes a picture and a JSON file with the protocol card to --config.out, and prints a table.
"""

from collections.abc import Sequence

from flowturbo_jax.commands import entry, sample
from flowturbo_jax.sample_config import SampleConfig


def main(argv: Sequence[str]) -> None:
    """Reads the flags, samples, and prints the table."""
    flags = entry.read_flags(argv, entry.ROOT / "configs/digits_sample.py", SampleConfig, __doc__)
    report = sample.sample(flags.config)
    print(sample.table(report))
    print(f"wrote {report['picture']} and {report['picture'].removesuffix('.png')}.json")


if __name__ == "__main__":
    entry.run(main)
