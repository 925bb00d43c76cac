"""Converts a text-to-image pipeline of full size with random weights, and samples with it once.

  python tests/full_size_text.py --workdir DIR      needs 10 GB of disk, and 16 GB of memory

Writes a diffusers folder as 2-Rectified Flow's: the U-Net, VAE and text encoder of Stable Diffusion
1.5 under their official names in float32, a vocabulary of 49,408 tokens, and the U-Net of a
refiner; converts it with the command line, loads the result, and makes one 512 x 512 image by one
guided evaluation. Prints time, memory and parameter counts as JSON. Not a test: pytest does not
collect it.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from full_size import VAE_JSON, measured, random_tensor  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from flowturbo_jax.clip_architecture import clip_config  # noqa: E402
from flowturbo_jax.convert import official_shapes  # noqa: E402
from flowturbo_jax.cost import parameter_count  # noqa: E402
from flowturbo_jax.model_directory import abstract_params  # noqa: E402
from flowturbo_jax.models import CLIPText, UNet, VAEConfig  # noqa: E402
from flowturbo_jax.unet_architecture import unet_config  # noqa: E402

INDEX = {
    "_class_name": "RectifiedFlowPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
UNET_JSON = {  # stable-diffusion-v1-5's unet/config.json
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
REFINER_JSON = {  # PAPER section 3
    **UNET_JSON,
    "block_out_channels": [160, 160, 320, 320],
    "in_channels": 8,
    "layers_per_block": 1,
}
CLIP_JSON = {  # its text_encoder/config.json
    "architectures": ["CLIPTextModel"],
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}
STEP = """
import sys, time
import numpy as np
import flowturbo_jax as ft
start = time.perf_counter()
pipe = ft.TextToImage.load(sys.argv[1])
loaded = time.perf_counter()
image = np.asarray(pipe("a photo of a cat", schedule="E1", guidance_scale=1.5))
done = time.perf_counter()
assert image.shape == (1, 512, 512, 3) and image.std() > 0
print({"load_seconds": loaded - start, "compile_and_sample_seconds": done - loaded})
"""


def write_network(folder: Path, given: dict[str, Any], kind: str, config: Any, file: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(given))
    shapes = official_shapes(kind, config)
    save_file({name: random_tensor(name, shape) for name, shape in shapes.items()}, folder / file)


def write_tokenizer(folder: Path, size: int) -> None:
    """A vocabulary in CLIP's format: bytes, bytes that end a word, pairs, start and end."""
    folder.mkdir()
    # GPT-2 encoder.py, bytes_to_unicode: those without a picture come after all others.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, shown), *(chr(256 + i) for i in range(256 - len(shown)))]
    ends = [f"{letter}</w>" for letter in letters]
    merges = list(itertools.islice(itertools.product(letters, ends), size - 2 * 256 - 2))
    tokens = [*letters, *ends, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 77, "pad_token": "<|endoftext|>"})
    )


def write(folder: Path) -> dict[str, int]:
    """Writes the pipeline and the refiner; returns the parameters of each network."""
    (folder / "pipeline").mkdir()
    (folder / "pipeline/model_index.json").write_text(json.dumps(INDEX))
    diffusers = "diffusion_pytorch_model.safetensors"
    unet = unet_config(UNET_JSON, refiner=False)
    refiner = unet_config(REFINER_JSON, refiner=True)
    clip = clip_config(CLIP_JSON)
    write_network(folder / "pipeline/unet", UNET_JSON, "unet", unet, diffusers)
    write_network(folder / "refiner", REFINER_JSON, "unet", refiner, diffusers)
    write_network(folder / "pipeline/vae", VAE_JSON, "vae", VAEConfig(), diffusers)
    write_network(folder / "pipeline/text_encoder", CLIP_JSON, "clip", clip, "model.safetensors")
    write_tokenizer(folder / "pipeline/tokenizer", clip.vocab_size)
    modules = {"predictor": UNet(unet), "refiner": UNet(refiner), "text_encoder": CLIPText(clip)}
    return {name: parameter_count(abstract_params(module)) for name, module in modules.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a folder to make and remove")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True)
    try:
        report: dict[str, Any] = {"cores": os.cpu_count(), "parameters": write(args.workdir)}
        out = args.workdir / "model"
        convert = [sys.executable, "-m", "flowturbo_jax", "convert"]
        convert += [f"--pipeline={args.workdir / 'pipeline'}", f"--out={out}"]
        convert += [f"--refiner={args.workdir / 'refiner'}"]
        report["convert"] = measured(convert)
        shutil.rmtree(args.workdir / "pipeline")
        report["load_and_sample"] = measured([sys.executable, "-c", STEP, str(out)])
    finally:
        shutil.rmtree(args.workdir)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
