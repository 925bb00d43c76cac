"""A small text-to-image model, trained from scratch on digits with captions.

python train.py --config=configs/digit_captions_predictor.py

U-Net, text encoder and tokenizer are all learnt from the 1,797 digits that come with scikit-learn
and captions such as "a handwritten seven". 22 minutes of CPU time, of two cores;
docs/text_to_image.md has what its samples reach with and without the refiner of
configs/digit_captions_refiner.py. The last evaluation/loss should be about 0.333.
"""

from flowturbo_jax.train_config import TrainConfig


def get_config():
    return TrainConfig(
        name="digit_captions_predictor",
        objective="flow_matching",
        data="digit_captions",
        model={
            "family": "unet",
            "sample_size": (8, 8),
            "in_channels": 1,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "attention_heads": (4, 4),
            "cross_attention": (False, True),
            "cross_attention_dim": 64,
            "norm_num_groups": 8,
            "text_encoder": {
                "num_layers": 2,
                "num_heads": 4,
                "vocab_size": 700,
                "max_length": 16,
            },
        },
        steps=5_000,
        batch_size=32,
        learning_rate=1e-3,
        learning_rate_decay="cosine",
        warmup_steps=100,
        gradient_clip=1.0,
        ema_decay=0.999,
        schedule="H8",
        evaluate_every=1_000,
        checkpoint_every=1_000,
    ).to_config_dict()
