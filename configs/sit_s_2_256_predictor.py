"""SiT-S/2 for 256 x 256 ImageNet by flow matching, from scratch.

  python train.py --config=configs/sit_s_2_256_predictor.py

33.0 M parameters and 3.7 EFLOP: a quarter of configs/sit_b_2_256_predictor.py, whose data it takes;
not three hours on one device that does 400 TFLOP/s.
"""

from configs import sit_b_2_256_predictor


def get_config():
    config = sit_b_2_256_predictor.get_config()
    config.name = "sit_s_2_256_predictor"
    config.model.size = "SiT-S/2"
    return config
