"""Fits a mixture of Gaussians to scikit-learn's digits, and writes it as a model without a refiner.

  PYTHONPATH=. python tests/digits_mixture.py --out runs/mixture/model --components 2

Five seconds on one core. The model's velocity is exact: what its samples lack is the sampler's
fault alone. Prints as JSON the Fréchet distance of pixels from the mixture to the digits (0.0082),
and from 5,000 exact samples to the mixture, about what a perfect sampler has (0.025). Not a test:
pytest does not collect it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from flowturbo_jax import data, mixtures, model_directory
from flowturbo_jax.metrics import frechet_distance, statistics
from flowturbo_jax.model_description import Description


def write_model(out: Path, components: int, seed: int) -> dict[str, float]:
    """Fits, writes the model directory, and measures the mixture.

    Returns:
      Fréchet distances of pixels: mixture to digits, and 5,000 exact samples to the mixture.
    """
    source = data.open_source("digits")
    images, labels = data.arrays(source)
    config, params = mixtures.fit(images, labels, components, seed)
    description = Description(
        family="mixture",
        predictor=config,
        refiner=None,
        class_names=source.class_names,
        guidance="paired",
        guidance_scale=1.5,  # as the shipped digits model
        guided_channels=None,
        source={
            "predictor": {
                "data_fingerprint": source.fingerprint,
                "seed": seed,
                "floor": mixtures.FLOOR,
            },
        },
    )
    model_directory.save(out, description, params, None)
    exact = mixtures.moments(config, params)
    wanted = (np.arange(5000) % config.num_classes).astype(np.int32)
    samples = mixtures.draw(config, params, wanted, np.random.default_rng(seed))
    real, drawn = (statistics(array.reshape(len(array), -1)) for array in (images, samples))
    return {
        "mixture_to_digits": frechet_distance(*exact, real.mean, real.covariance),
        "exact_samples_to_mixture": frechet_distance(*exact, drawn.mean, drawn.covariance),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--components", type=int, default=2, help="Gaussians per class")
    parser.add_argument("--seed", type=int, default=0, help="of the fit's first guess")
    args = parser.parse_args()
    report = write_model(args.out, args.components, args.seed)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
