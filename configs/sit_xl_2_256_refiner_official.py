"""The refiner of SiT-XL/2 as the official code trains it, for the official guidance.

  python train.py --config=configs/sit_xl_2_256_refiner_official.py

Costs what configs/sit_xl_2_256_refiner.py does, about two hours on one A800 by the paper. In
miniature, on digits, this recipe made refiners that hurt (docs/refiner_training.md).
"""

from configs import sit_xl_2_256_refiner


def get_config():
    config = sit_xl_2_256_refiner.get_config()
    config.name = "sit_xl_2_256_refiner_official"
    config.label_handling = "official"
    config.guidance = "official"
    config.dt_per_sample = False
    config.times_inside = False
    config.ema_warmup = False
    return config
