"""The golden weights as the files that people publish."""

import golden

from flowturbo_jax.pipelines.conversion import Sources

FILES = golden.FOLDER


def sources(tmp_path, **fields) -> Sources:
    """The golden predictor, refiner and VAE, whose widths no published size has."""
    config = tmp_path / "heads.json"
    config.write_text('{"num_heads": 4}')
    defaults = {
        "predictor": str(FILES / "sit/sit.safetensors"),
        "refiner": str(FILES / "refiner/refiner.safetensors"),
        "vae": str(FILES / "vae/tiny"),
        "predictor_config": str(config),
        "refiner_config": str(config),
    }
    if fields.get("refiner", "") is None:
        del defaults["refiner_config"]
    return Sources(**{**defaults, **fields})
