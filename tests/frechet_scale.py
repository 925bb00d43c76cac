"""Measures time and memory of a Fréchet distance at the size of an ImageNet evaluation.

  PYTHONPATH=. python tests/frechet_scale.py

Streams 50,000 features of 2,048 dimensions twice, as they come from the network, and prints as JSON
seconds and the most memory the process ever held; about a minute on two cores. Not a test: pytest
does not collect it.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flowturbo_jax.metrics import Moments, frechet_distance


def chunks(seed: int, samples: int, dimensions: int, chunk: int) -> Iterator[np.ndarray]:
    """Correlated features of one kind, `[chunk, D]` float32."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((64, dimensions), np.float32)
    for first in range(0, samples, chunk):
        count = min(chunk, samples - first)
        noise = rng.standard_normal((count, dimensions), np.float32)
        yield np.abs(rng.standard_normal((count, 64), np.float32) @ mixing / 8 + noise) / 2


def peak_bytes() -> int:
    """The most memory this process ever held (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(samples: int, dimensions: int, chunk: int) -> dict[str, float]:
    """Seconds and bytes of two statistics and their distance.

    Making the features is not timed.
    """
    both, adding = [], 0.0
    for seed in (1, 2):
        moments = Moments()
        for features in chunks(seed, samples, dimensions, chunk):
            begin = time.perf_counter()
            moments.add(features)
            adding += time.perf_counter() - begin
        both.append(moments.statistics())
    a, b = both
    begin = time.perf_counter()
    distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    return {
        "distance": distance,
        "accumulation_seconds": round(adding, 2),
        "distance_seconds": round(time.perf_counter() - begin, 2),
        "peak_gigabytes": round(peak_bytes() / 1e9, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=250)
    sys.stdout.write(json.dumps(measure(**vars(parser.parse_args()))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
