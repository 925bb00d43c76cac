"""The refiner of the text-to-image model of digits with captions.

python train.py --config=configs/digit_captions_refiner.py

Its teacher is what configs/digit_captions_predictor.py writes, whose text encoder stays as it is.
Eight minutes of CPU time, of two cores. The last evaluation/loss should be about 0.0241, where
keeping the velocity has 0.0539; docs/text_to_image.md has what samples reach with it.
"""

from flowturbo_jax.train_config import TrainConfig


def get_config():
    return TrainConfig(
        name="digit_captions_refiner",
        objective="refiner",
        data="digit_captions",
        model_dir="runs/digit_captions_predictor/model",
        model={},
        steps=3_000,
        batch_size=32,
        learning_rate=1e-3,
        learning_rate_decay="cosine",
        warmup_steps=100,
        gradient_clip=1.0,
        ema_decay=0.999,
        dt_max=0.25,
        schedule="H1P3R2",
        evaluate_every=1_000,
        checkpoint_every=1_000,
    ).to_config_dict()
