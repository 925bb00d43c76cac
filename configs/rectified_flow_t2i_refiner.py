r"""The refiner of 2-Rectified Flow's U-Net, on pairs of image and caption, as in the paper.

  python -m flowturbo_jax encode --data=captions:laion-50k --image-size=512 --vae=models/2rf \
      --out=caches/laion-50k
  python train.py --config=configs/rectified_flow_t2i_refiner.py

The paper's setting: 50,000 pairs, AdamW at 2e-5 without weight decay, 100 steps of warm-up,
gradients clipped at 0.01, 10,000 steps of 16 images; captions are dropped to the empty text with
probability 0.1. Widths 160, 160, 320, 320, one layer per block: 43.5 M parameters are trained;
the U-Net of 860 M is evaluated twice a step. Per image and step that is two evaluations of 0.38
TMAC and three of 0.04 TMAC, so 290 PFLOP in all; the paper took five and a half hours on one A800.
Captions are encoded to text states by `encode`, once.
"""

from flowturbo_jax.train_config import TrainConfig


def get_config():
    return TrainConfig(
        name="rectified_flow_t2i_refiner",
        objective="refiner",
        data="latents:caches/laion-50k",
        model_dir="models/2rf",
        model={},
        horizontal_flip=False,
        steps=10_000,
        batch_size=16,
        learning_rate=2e-5,
        warmup_steps=100,
        gradient_clip=0.01,
        ema_decay=0.999,
        dt_max=0.12,
        dtype="bfloat16",
        teacher_dtype="bfloat16",
        schedule="H1P4R2",
        checkpoint_every=1_000,
        evaluate_every=1_000,
        evaluation_size=64,
    ).to_config_dict()
