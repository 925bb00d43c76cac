"""Converts weights of the published size, which are random, and measures time and memory.

  python tests/full_size.py --workdir DIR      needs 7 GB of disk, and 8 GB of memory

Writes SiT-XL/2 for 256 x 256 images, its refiner and the Stable Diffusion VAE under their official
names as .pt files, converts them with the command line, loads the result, and evaluates the
predictor once; then asks the compiler for the memory of large decodings, whole and in tiles. Prints
JSON. Not a test: pytest does not collect it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch_file_writer  # noqa: E402

from flowturbo_jax.convert import official_shapes  # noqa: E402
from flowturbo_jax.model_directory import abstract_params  # noqa: E402
from flowturbo_jax.models import VAE, SiTConfig, VAEConfig  # noqa: E402
from flowturbo_jax.models.tiles import tiled  # noqa: E402
from flowturbo_jax.pipelines import programs  # noqa: E402

PREDICTOR = SiTConfig.named("SiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
VAE_JSON = {  # sd-vae-ft-ema's config.json
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
STEP = """
import sys, time
import numpy as np
import jax, jax.numpy as jnp
from flowturbo_jax import model_directory
start = time.perf_counter()
model = model_directory.load(sys.argv[1])
loaded = time.perf_counter()
x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 4)), jnp.float32)
call = jax.jit(lambda p, x, t, y: model.predictor.apply({"params": p}, x, t, y))
arguments = model.predictor_params, x, jnp.zeros(()), jnp.array([207])
out = np.asarray(call(*arguments))
first = time.perf_counter()
out = np.asarray(call(*arguments))
done = time.perf_counter()
assert np.isfinite(out).all() and np.abs(out).max() > 0
print({"load_seconds": loaded - start, "first_call_seconds": first - loaded,
       "evaluation_seconds": done - first, "shape": out.shape})
"""


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng([7, *name.encode()])
    values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    return values + 1 if "norm" in name and name.endswith("weight") else values


def write(folder: Path) -> dict[str, int]:
    """Writes the three files; returns their sizes in bytes."""
    (folder / "vae").mkdir(parents=True)
    (folder / "vae/config.json").write_text(json.dumps(VAE_JSON))
    files = {
        "SiT-XL-2-256x256.pt": ("sit", PREDICTOR, None),
        "SiT-XL-2-Refiner.pt": ("sit", PREDICTOR.refiner(), "ema"),
        "vae/diffusion_pytorch_model.bin": ("vae", VAEConfig(), None),
    }
    for name, (kind, config, part) in files.items():
        entries = [
            (key, shape, partial(random_tensor, key, shape))
            for key, shape in official_shapes(kind, config).items()
        ]
        torch_file_writer.stream(folder / name, entries, part)
    return {name: (folder / name).stat().st_size for name in files}


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command: its wall time in s, its peak memory in GB, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - start,
        "peak_gb": usage.ru_maxrss * unit / 1e9,
        "printed": printed.strip().splitlines(),
    }


def decoding_gb(side: int, tile: int) -> float:
    """Temporary memory of decoding one image of side x side pixels, in GB."""
    vae = VAE(VAEConfig())
    params = {"decoder": abstract_params(vae)["decoder"]}
    z = jax.ShapeDtypeStruct((1, side // 8, side // 8, 4), jnp.float32)

    def decode(params, z):
        return tiled(
            lambda z: vae.apply({"params": params}, z, method="decode"),
            z,
            tile,
            programs.OVERLAP,
            (1, 8),
        )

    compiled = jax.jit(decode).lower(params, z).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a folder to make and remove")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True)
    try:
        report: dict[str, Any] = {"cores": os.cpu_count(), "bytes": write(args.workdir)}
        files = [
            f"--predictor={args.workdir / 'SiT-XL-2-256x256.pt'}",
            f"--refiner={args.workdir / 'SiT-XL-2-Refiner.pt'}",
            f"--vae={args.workdir / 'vae'}",
        ]
        out = args.workdir / "model"
        convert = [sys.executable, "-m", "flowturbo_jax", "convert", "--size=SiT-XL/2"]
        report["convert"] = measured([*convert, *files, f"--out={out}"])
        report["load_and_evaluate"] = measured([sys.executable, "-c", STEP, str(out)])
        report["decode_gb"] = {
            f"{side} in tiles of {8 * tile}": decoding_gb(side, tile)
            for side, tile in ((256, 64), (512, 64), (1024, 128), (1024, programs.TILE))
        }
    finally:
        shutil.rmtree(args.workdir)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
