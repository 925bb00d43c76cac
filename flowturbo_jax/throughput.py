"""How fast training is: samples per second, time spent waiting for input, use of the hardware."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Peak dense products per second, in FLOP: of bfloat16 and, where the maker gives one, of float32
# without TF32. By the start of the device kind, the longest that fits; makers' data sheets.
PEAKS: dict[str, dict[str, float]] = {
    "NVIDIA A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "NVIDIA A800": {"bfloat16": 312e12, "float32": 19.5e12},
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.4e12, "float32": 66.9e12},
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float32": 51.2e12},
    "NVIDIA H200": {"bfloat16": 989.4e12, "float32": 66.9e12},
    "NVIDIA L4": {"bfloat16": 121e12, "float32": 30.3e12},
    "NVIDIA L40S": {"bfloat16": 362e12, "float32": 91.6e12},
    "NVIDIA GeForce RTX 4090": {"bfloat16": 165.2e12, "float32": 82.6e12},
    "NVIDIA GeForce RTX 3090": {"bfloat16": 71e12, "float32": 35.6e12},
    "TPU v3": {"bfloat16": 61.5e12},  # half a chip: JAX shows its two cores
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12},
    "TPU v5": {"bfloat16": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12},
}


def peak(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP per second of one device, or None where it is not known.

    Args:
      device_kind: as JAX names it.
      dtype: of the products, "float32" or "bfloat16".
    """
    known = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(known, key=len)].get(dtype) if known else None


class Meter:
    """Measures the steps between two readings.

    Args:
      samples_per_step: in all processes together.
      flop_per_step: floating point operations of a step, in all processes together.
      peak_flop: of all devices together, per second; None where it is not known.
    """

    def __init__(self, samples_per_step: int, flop_per_step: float, peak_flop: float | None):
        self._samples, self._flop, self._peak = samples_per_step, flop_per_step, peak_flop
        self._start: float | None = None
        self._steps = self._waited = 0.0

    def begin(self) -> None:
        """Begins to measure anew, such as after an evaluation."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def step(self) -> None:
        """Counts a step."""
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as time that training waited for its input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def rates(self) -> dict[str, float]:
        """The rates since `begin`; empty before it, and before the first step.

        Returns:
          `images_per_second`, `ms_per_step`, `input_wait` (fraction of the time), and `mfu`
          (fraction of the peak, where that is known).
        """
        if self._start is None or not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rates = {
            "images_per_second": self._steps * self._samples / seconds,
            "ms_per_step": 1e3 * seconds / self._steps,
            "input_wait": self._waited / seconds,
        }
        if self._peak:
            rates["mfu"] = self._steps * self._flop / seconds / self._peak
        return rates


def duration(seconds: float) -> str:
    """A time to go, such as "2 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
