"""The one-block refiner of the digits mixture, whose velocity is exact.

PYTHONPATH=. python tests/digits_mixture.py --out runs/mixture/model --components 2
python train.py --config=configs/mixture_refiner.py

Two minutes on two cores; writes runs/mixture_refiner/model: the mixture, and its refiner. The last
evaluation/loss should be about 0.0058, where keeping the velocity has 0.0232. The mixture itself
costs less than the refiner: it is there to tell a solver's error from a network's, not to be fast.
"""

from flowturbo_jax.train_config import TrainConfig


def get_config():
    return TrainConfig(
        name="mixture_refiner",
        objective="refiner",
        data="mixture:runs/mixture/model",
        model_dir="runs/mixture/model",
        model={"depth": 1},
        steps=4_000,
        batch_size=64,
        learning_rate=1e-3,
        learning_rate_decay="cosine",
        ema_decay=0.999,
        dt_max=0.15,
        schedule="H1P3R2",
    ).to_config_dict()
