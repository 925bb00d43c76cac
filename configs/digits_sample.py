"""The shipped digits model: FlowTurbo against Heun on the same noise.

  python sample.py

Under a minute on two cores.
"""

from flowturbo_jax.sample_config import SampleConfig


def get_config():
    return SampleConfig(
        name="digits",
        model_dir="digits",
        schedule="H1P3R2",
        baseline="H8",
        samples=2_000,
        data="digits",
    ).to_config_dict()
