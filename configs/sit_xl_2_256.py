r"""SiT-XL/2 on ImageNet 256 x 256 with the published refiner: FlowTurbo's eight example classes.

  python -m flowturbo_jax convert --predictor SiT-XL-2-256x256.pt --refiner SiT-XL-2-Refiner.pt \
      --vae sd-vae-ft-ema/ --out models/sit-xl-2-256
  python sample.py --config=configs/sit_xl_2_256.py

Seven evaluations of the predictor and six of the refiner, each on a guided pair, and one decoding
per image: on two CPU cores most of a minute an image. Golden retriever, otter, red panda, geyser,
macaw, valley, balloon and Arctic fox.
"""

from flowturbo_jax.sample_config import SampleConfig


def get_config():
    return SampleConfig(
        name="sit_xl_2_256",
        model_dir="models/sit-xl-2-256",
        schedule="H1P5R3",
        labels="207,360,387,974,88,979,417,279",  # SiT sample.py
        samples=8,
        columns=4,
        batch_size=8,
        guidance="official",
        guidance_scale=4.0,  # SiT sample.py, FlowTurbo sample.py
    ).to_config_dict()
