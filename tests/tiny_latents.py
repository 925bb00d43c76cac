"""The smallest caches of latents: a small autoencoder, and moments that tell images apart."""

from functools import cache
from pathlib import Path

import jax
import numpy as np

from flowturbo_jax import model_directory
from flowturbo_jax.data.latent_cache import Manifest
from flowturbo_jax.data.latent_writer import writing
from flowturbo_jax.models import VAE, VAEConfig

CONFIG = VAEConfig(
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    latent_channels=3,
    scaling_factor=0.5,
    shift_factor=0.25,
)
CLASSES = ("even", "odd")


@cache
def params(seed: int = 0):
    """Parameters of the autoencoder, in numpy: no device is touched."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(VAE(CONFIG).initialise, jax.random.key(0))
    return jax.tree.map(lambda a: generator.normal(0, 0.3, a.shape).astype(np.float32), shapes)


def plan(directory: Path, **fields) -> Manifest:
    """10 images of 8 x 8 pixels in shards of 4."""
    defaults = {
        "source": "numbered",
        "source_fingerprint": "abc",
        "class_names": CLASSES,
        "images": 10,
        "image_size": 8,
        "crop": "none",
        "vae": CONFIG,
        "vae_fingerprint": model_directory.fingerprint(params()),
        "vae_dtype": "float32",
        "moments_dtype": "float16",
        "shard_size": 4,
        "batch_size": 2,
        "directory": directory,
    }
    return Manifest(**{**defaults, **fields})


def moments(manifest: Manifest, index: int) -> np.ndarray:
    """What an encoder might say of image `index` and its mirror image: `[2, h, w, 2c]`."""
    return np.random.default_rng(index).normal(size=manifest.moments_shape).astype(np.float32)


def fill(writer, unreadable: tuple[int, ...] = ()) -> None:
    """Writes every shard that is missing."""
    manifest = writer.manifest
    for number in writer.missing:
        with writer.shard(number) as shard:
            for index in manifest.shard_images(number):
                if index in unreadable:
                    shard.leave_out(f"image {index}")
                else:
                    shard.add(index % 2, moments(manifest, index))


def write(directory: Path, unreadable: tuple[int, ...] = (), **fields) -> Manifest:
    """Writes a whole cache."""
    with writing(plan(directory, **fields), params()) as writer:
        fill(writer, unreadable)
        return writer.finish()


def contents(directory: Path) -> dict[str, bytes]:
    """What lies in a cache, but for the VAE, of which Orbax names files differently each time."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in (".lock", "vae.sha256")
    }
