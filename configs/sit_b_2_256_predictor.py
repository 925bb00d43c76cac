r"""SiT-B/2 for 256 x 256 ImageNet by flow matching, from scratch, with SiT's hyper-parameters.

  python -m flowturbo_jax encode --data=tfds:imagenet2012 --image-size=256 \
      --vae=sd-vae-ft-ema/ --out=caches/imagenet-256
  python train.py --config=configs/sit_b_2_256_predictor.py

130.5 M parameters; per step and image one evaluation forward and twice that backward, 0.14 TFLOP:
14.1 EFLOP in all, which are ten hours on one device that does 400 TFLOP/s. The average's half-life
is that of decay 0.9999 at batch 256.
"""

from flowturbo_jax.train_config import TrainConfig


def get_config():
    return TrainConfig(
        name="sit_b_2_256_predictor",
        objective="flow_matching",
        data="latents:caches/imagenet-256",
        model={
            "family": "sit",
            "size": "SiT-B/2",
            "input_size": 32,
            "in_channels": 4,
            "num_classes": 1000,
        },
        horizontal_flip=True,
        steps=400_000,  # SiT paper, section 3: lr 1e-4 constant, batch 256, EMA 0.9999
        batch_size=256,
        learning_rate=1e-4,
        ema_half_life=1_774_000,
        dtype="bfloat16",
        schedule="H8",
        checkpoint_every=10_000,
        evaluate_every=10_000,
        evaluation_size=1024,
    ).to_config_dict()
