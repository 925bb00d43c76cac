"""The one-block refiner of the digits predictor.

python train.py --config=configs/digits_refiner.py --workdir=runs/digits_refiner

Four minutes on two cores; writes runs/digits_refiner/model: its predictor, and it. The last
evaluation/loss should be about 0.0114, where keeping the velocity has 0.0241; docs/digits.md has
what its samples reach.
"""

from flowturbo_jax.train_config import TrainConfig


def get_config():
    return TrainConfig(
        name="digits_refiner",
        objective="refiner",
        data="digits",
        model_dir="digits",
        model={"depth": 1},
        steps=4_000,
        batch_size=64,
        learning_rate=1e-3,
        learning_rate_decay="cosine",
        ema_decay=0.999,
        dt_max=0.15,
        schedule="H1P3R2",
    ).to_config_dict()
