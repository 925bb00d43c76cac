"""A SiT for scikit-learn's digits by flow matching, from scratch.

python train.py --config=configs/digits_predictor.py --workdir=runs/digits_predictor

About half an hour on two cores; writes runs/digits_predictor/model, 1.4 M parameters. The last
evaluation/loss should be about 0.311; docs/digits.md has what its samples reach.
"""

from flowturbo_jax.train_config import TrainConfig


def get_config():
    return TrainConfig(
        name="digits_predictor",
        objective="flow_matching",
        data="digits",
        model={
            "family": "sit",
            "input_size": 8,
            "in_channels": 1,
            "patch_size": 2,
            "hidden_size": 96,
            "depth": 8,
            "num_heads": 3,
            "num_classes": 10,
            "learn_sigma": False,
        },
        steps=8_000,
        batch_size=128,
        learning_rate=1e-3,
        learning_rate_decay="cosine",
        warmup_steps=200,
        ema_decay=0.999,
        remat=True,  # on CPU a third faster, not slower
        schedule="H8",
    ).to_config_dict()
