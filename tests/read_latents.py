"""Reads a cache of latents as large as ImageNet's as training does; prints what it takes.

    python tests/read_latents.py FOLDER STEPS

Writes one shard of 4096 images to the folder and links it 313 times, so that 0.13 GB of disk stand
for 42 GB. A process of its own, whose memory is its own.
"""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

from flowturbo_jax import data
from flowturbo_jax.data.latent_cache import Manifest, Shard
from flowturbo_jax.data.latent_manifest import pack
from flowturbo_jax.models import VAEConfig

SHARD, SHARDS, BATCH = 4096, 313, 256


def imagenet(directory: Path) -> Manifest:
    """The manifest of 313 links to one shard of random moments."""
    from array_record.python.array_record_module import ArrayRecordWriter

    plan = Manifest(
        source="random",
        source_fingerprint="random",
        class_names=tuple(f"class {label}" for label in range(1000)),
        images=SHARD * SHARDS,
        image_size=256,
        crop="none",
        vae=VAEConfig(),
        vae_fingerprint="0" * 64,
        vae_dtype="float32",
        moments_dtype="float16",
        shard_size=SHARD,
        batch_size=8,
    )
    files = [directory / plan.shard_file(number) for number in range(SHARDS)]
    moments = np.random.default_rng(0).normal(size=plan.moments_shape)
    writer = ArrayRecordWriter(str(files[0]), "group_size:1,uncompressed")
    for index in range(SHARD):
        writer.write(pack(plan, index % 1000, moments))
    writer.close()
    for file in files[1:]:
        os.link(files[0], file)
    content = files[0].read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    shards = tuple(Shard(file.name, SHARD, len(content), sha256) for file in files)
    return Manifest(**{**vars(plan), "shards": shards})


def main(directory: Path, steps: int) -> dict[str, float]:
    if not (directory / "manifest.json").exists():
        (directory / "manifest.json").write_text(imagenet(directory).to_json())
    start = time.perf_counter()
    source = data.open_source(f"latents:{directory}")
    opened = time.perf_counter() - start
    batches = data.stream(source, BATCH, seed=0, flip=True)
    next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return {
        "images": len(source.examples),
        "open_s": opened,
        "images_per_s": steps * BATCH / (time.perf_counter() - start),
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most memory this program has taken; ru_maxrss would count who started it as well."""
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line) * 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
