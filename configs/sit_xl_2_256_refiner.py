r"""The one-block refiner of SiT-XL/2 for 256 x 256 ImageNet, with the paper's hyper-parameters.

  python -m flowturbo_jax encode --data=tfds:imagenet2012 --image-size=256 \
      --vae=models/sit-xl-2-256 --out=caches/imagenet-256
  python train.py --config=configs/sit_xl_2_256_refiner.py

Per step and image two evaluations of the teacher and three of the refiner (forward, and twice that
backward): 0.50 TFLOP, so 270 PFLOP in all; the paper took about two hours on one A800. 29.7 M
parameters are trained; the teacher needs 1.35 GB. On several devices take a multiple of their
number for batch_size.

As in the paper but for four keys that made refiners better where we could measure it
(docs/refiner_training.md): a step size per sample, t + dt <= 1, an average that keeps up with the
run, and the paper's own label handling in place of the official code's. configs/
sit_xl_2_256_refiner_official.py has those of the official code.
"""

from flowturbo_jax.train_config import TrainConfig


def get_config():
    return TrainConfig(
        name="sit_xl_2_256_refiner",
        objective="refiner",
        data="latents:caches/imagenet-256",
        model_dir="models/sit-xl-2-256",
        model={"depth": 1},
        horizontal_flip=True,
        steps=30_000,
        batch_size=18,
        learning_rate=5e-5,
        ema_decay=0.9999,
        dt_max=0.12,
        dtype="bfloat16",
        teacher_dtype="bfloat16",
        schedule="H1P5R3",
        checkpoint_every=2_500,
        evaluate_every=2_500,
    ).to_config_dict()
