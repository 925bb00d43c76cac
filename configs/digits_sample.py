"""The shipped digits model: Heun, FlowTurbo and a learnt solver on the same noise.

  python sample.py

Half a minute on two cores; the Fréchet distances are about 0.29 (H8) and 0.22 (H1P3R2).
"""

from flowturbo_jax.sample_config import SampleConfig


def get_config():
    return SampleConfig(
        name="digits",
        model_dir="digits",
        schedule="H1P3R2",
        baseline="H8,S4R1",
        samples=2_000,
        data="digits",
    ).to_config_dict()
