"""How a time grid is spaced: uniform or shifted, as a cosine, or as a sigmoid curve."""

import numpy as np

SHIFTED, COSINE, SIGMOID, LEARNT = "shifted", "cosine", "sigmoid", "learnt"
SPACINGS = (SHIFTED, COSINE, SIGMOID, LEARNT)
STEEPNESS = 3.0  # the sigmoid grid is of the logistic curve on [-3, 3], as in its source


def left(spacing: str, steps: int, shift: float = 1.0) -> np.ndarray:
    """The share of the way that is left at each time, from exactly 1 to exactly 0.

    With u = 1 - i / N: s u / (1 + (s - 1) u) shifted by s, (1 - cos(pi u)) / 2 as a cosine, and as
    a sigmoid the logistic curve of 6 u - 3, stretched to [0, 1].

    Args:
      spacing: "shifted", "cosine" or "sigmoid".
      steps: N.
      shift: s, of a shifted grid; 1 is uniform.

    Returns:
      `[N + 1]` float64.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
      Synthesis", eq. 23, for the shift; Chen 2023, "On the Importance of Noise Scheduling for
      Diffusion Models", for the curves.
    """
    uniform = np.arange(steps, -1, -1) / steps
    if spacing == COSINE:
        found = (1 - np.cos(np.pi * uniform)) / 2
    elif spacing == SIGMOID:
        curve = 1 / (1 + np.exp(-STEEPNESS * (2 * uniform - 1)))
        found = (curve - curve[-1]) / (curve[0] - curve[-1])
    else:
        found = shift * uniform / (1 + (shift - 1) * uniform)
    found[0] = 1  # not always, by rounding
    return found
