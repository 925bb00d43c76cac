r"""2-Rectified Flow (Stable Diffusion 1.5 made straight, by InstaFlow's authors): images of texts.

  python -m flowturbo_jax convert --pipeline 2-rectified-flow/ --out models/2rf
  python sample.py --config=configs/rectified_flow_t2i.py --config.prompts_file=configs/prompts.txt
  python sample.py --config=configs/rectified_flow_t2i.py --config.prompt="a fox | a bear" \
      --config.seeds=1,2 --config.negative_prompt=blurry --config.image_size=512x768

Say what the images show by prompt or prompts_file; the recipe itself has no text. The first command
makes four images of 512 x 512 pixels. H1P6 needs no refiner: eight evaluations of the U-Net, each
on a guided pair, and one decoding, 7 TMAC an image: minutes each on two CPU cores. With a refiner,
of configs/rectified_flow_t2i_refiner.py, take --config.schedule=H1P6R3, which the paper finds as
good as H8, of 16 evaluations. On a GPU add --config.dtype=bfloat16.
"""

from flowturbo_jax.sample_config import SampleConfig


def get_config():
    return SampleConfig(
        name="rectified_flow_t2i",
        model_dir="models/2rf",
        schedule="H1P6",
        columns=2,
        batch_size=4,
        guidance_scale=1.5,  # PAPER section 6
    ).to_config_dict()
