"""Digits of captions: FlowTurbo against Heun on the same noise and texts.

  python train.py --config=configs/digit_captions_predictor.py
  python train.py --config=configs/digit_captions_refiner.py
  python sample.py --config=configs/digit_captions_sample.py

Under a minute on two free cores, after the training.
"""

from flowturbo_jax.data.digit_captions import WORDS, digit_captions
from flowturbo_jax.sample_config import SampleConfig


def get_config():
    phrasings = (digit_captions(digit)[:4] for digit in range(len(WORDS)))
    return SampleConfig(
        name="digit_captions",
        model_dir="runs/digit_captions_refiner/model",
        schedule="H1P3R2",
        baseline="H8",
        prompt=" | ".join(text for texts in phrasings for text in texts),
        columns=8,
    ).to_config_dict()
